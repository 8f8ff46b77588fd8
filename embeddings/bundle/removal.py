"""Removal of what belongs to ended generations: item-vectors topic, bundle, records.

Ingest removes their embeddings (`streams.ended_generations`). Every step may be repeated: after a
crash the next call goes on. The end of a generation stays recorded, so the order of the steps is
that of their weight: topic, bundle, and last the manifest that names them.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import msgspec

from eddyline import generations
from eddyline.errors import BundleError
from eddyline.kafka import topics
from eddyline.settings.loader import Settings
from embeddings.bundle.manifest import MANIFEST

log = logging.getLogger(__name__)

# A bundle that is being removed; no generation's name begins with a dot.
_REMOVED = ".{}.removed"


class _Named(msgspec.Struct):
    generation: str


def remove_ended(settings: Settings, now_ms: int | None = None) -> list[str]:
    """Remove what belongs to ended generations whose time has come; returns their names.

    Only bundles below `bundle_dir` are removed, and only here: run it where the bundles are.
    Raises KafkaUnavailable, KafkaRefused, BundleError.
    """
    found = generations.read(settings)
    removable = found.removable(time.time_ns() // 1_000_000 if now_ms is None else now_ms)
    if not removable:
        return []
    removed = set(removable) & found.manifests.keys()
    topics.delete_topics(settings, [topics.item_vectors(name) for name in removable])
    removed |= _remove_bundles(settings.bundles, set(removable))
    generations.clear_records(settings, removable)
    names = [name for name in removable if name in removed]
    for name in names:
        log.info("an ended generation was removed", extra={"generation": name})
    return names


def _remove_bundles(folder: Path, names: set[str]) -> set[str]:
    """Remove the bundles of these generations, and what an earlier call left of one."""
    removed = set[str]()
    try:
        for left in folder.glob(_REMOVED.format("*")):
            shutil.rmtree(left)
        for path in folder.glob("*"):
            name = _generation(path)
            if name in names:
                # Renamed first: a folder with the name of a bundle is complete or absent.
                shutil.rmtree(path.rename(path.with_name(_REMOVED.format(path.name))))
                removed.add(name)
    except OSError as error:
        raise BundleError(
            f"{folder}: the bundle of an ended generation cannot be removed: {error}"
        ) from None
    return removed


def _generation(folder: Path) -> str:
    """The generation of the bundle in a folder; "" where there is none."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Named).generation
    except (OSError, msgspec.DecodeError):
        return ""
