"""Coverage-guided fuzzing of the ingest functions: `make fuzz`, options of libFuzzer after ARGS.

    make fuzz ARGS="-max_total_time=600"

A finding is written beside as crash-…; `make fuzz ARGS=crash-…` runs it again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["eddyline", "streams"]):
    from tests.fuzz.harness import CLICKS, ITEMS, USERS, Harness, seeds, towers

TOPICS = (CLICKS, ITEMS, USERS)


def main() -> None:
    """Run until libFuzzer ends."""
    with tempfile.TemporaryDirectory() as folder:
        made = towers(Path(folder))
        harness, fed = Harness(made), 0

        def one(data: bytes) -> None:
            nonlocal harness, fed
            fed += 1
            if fed % 20_000 == 0:
                harness = Harness(made)  # bounded memory
            if len(data) < 2:
                return
            cut = 2 + data[1] % 64
            key = None if data[0] & 4 else data[2:cut]
            value = None if data[0] & 8 else data[cut:]
            harness.feed(TOPICS[data[0] % 3], key, value)

        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for n, (topic, key, value) in enumerate(seeds()):
            head = TOPICS.index(topic) | (4 if key is None else 0) | (8 if value is None else 0)
            body = (key or b"") + (value or b"")
            corpus.joinpath(str(n)).write_bytes(bytes([head, len(key or b"")]) + body)
        more = sys.argv[1:] or ["-max_total_time=60"]
        paths = [] if any(not option.startswith("-") for option in more) else [str(corpus)]
        atheris.Setup([sys.argv[0], "-max_len=4096", *more, *paths], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
