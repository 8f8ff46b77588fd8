"""The worlds that the demo, the benchmarks and the tests run on: a catalogue, people and their history.

A world is either real ("movielens") or made from a seed ("generated"). Both come as one `Dataset`, so that
nothing after `load` knows which it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from eddyline.schema.events import Click
from sandbox.datasets.dataset import Dataset, Progress

NAMES = ("movielens", "generated")


def load(name: str, data_dir: Path, on_progress: Progress) -> Dataset:
    """The world of this name: "movielens", or "generated" with its default seed and size.

    data_dir: where fetched files are kept, in `data/`; the generated world needs none
    Raises DatasetUnavailable where it cannot be fetched, ValueError for another name.
    """
    # Imported here, because both build on this file.
    from sandbox.datasets import movielens, synthetic

    if name == "movielens":
        return movielens.load(data_dir, on_progress)
    if name == "generated":
        return synthetic.generate(on_progress=on_progress)
    raise ValueError(f"there is no world {name!r}; the worlds are {', '.join(NAMES)}")


def shifted_to_now(clicks: Sequence[Click], now_ms: int) -> list[Click]:
    """The same clicks, moved in time so that the last one happens at `now_ms`; every gap is kept.

    >>> clicks = [Click(user_id="u", item_id=i, at_ms=t) for i, t in (("a", 10), ("b", 25))]
    >>> [c.at_ms for c in shifted_to_now(clicks, 1_000)]
    [985, 1000]
    """
    if not clicks:
        return []
    shift_ms = now_ms - max(click.at_ms for click in clicks)
    return [msgspec.structs.replace(click, at_ms=click.at_ms + shift_ms) for click in clicks]
