"""Writes the golden bundle of format 2 again in the current format.

Run once per format version, in the root: `python -m tests.golden_bundle`. The file belongs to
its version and is never written again.
"""

import tempfile
import zipfile
from pathlib import Path

from embeddings.bundle import bundle
from embeddings.bundle.bundle import NewBundle
from embeddings.bundle.manifest import FORMAT_VERSION

FOLDER = Path(__file__).parent / "golden"


def main() -> None:
    target = FOLDER / f"bundle-v{FORMAT_VERSION}.zip"
    if target.exists():
        raise SystemExit(f"{target} exists already; a golden file is never overwritten")
    with tempfile.TemporaryDirectory() as name:
        old, new = Path(name) / "old", Path(name) / "new"
        with zipfile.ZipFile(FOLDER / "bundle-v2.zip") as packed:
            packed.extractall(old)
        loaded = bundle.load(old)
        content = NewBundle(
            generation=loaded.generation,
            created_ms=loaded.created_ms,
            model=loaded.model,
            item_ids=loaded.item_ids,
            item_vectors=loaded.item_vectors,
            item_partitions=loaded.item_partitions,
            item_offsets=loaded.item_offsets,
            item_attributes=list(loaded.item_attributes),
            cut=loaded.cut,
            measured=loaded.measured,
        )
        bundle.write(new, content)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(new.iterdir()):
                packed.write(path, path.name)


if __name__ == "__main__":
    main()
