"""The data sets by name: a catalogue of items, users and their history.

A data set is either real ("movielens") or made from a seed ("generated"). Both are a `Dataset`, so
that nothing after `load` depends on which one it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from eddyline.schema.events import Click, Item, UserProfile
from sandbox.datasets import movielens, synthetic
from sandbox.datasets.dataset import Dataset, OnProgress

NAMES = ("movielens", "generated")
_Event = TypeVar("_Event", bound=Click | Item | UserProfile)


def load(name: str, data_dir: Path, on_progress: OnProgress) -> Dataset:
    """The data set of this name: "movielens", or "generated" with its default seed and size.

    data_dir: downloaded files are kept in its folder `data/`; the generated data set needs none
    Raises DatasetUnavailable if it cannot be downloaded, ValueError for another name.
    """
    if name == "movielens":
        return movielens.load(data_dir, on_progress)
    if name == "generated":
        return synthetic.generate(on_progress=on_progress)
    raise ValueError(f"there is no data set {name!r}; expected one of {', '.join(NAMES)}")


def shifted_to_now(events: Sequence[_Event], now_ms: int) -> list[_Event]:
    """The same events, moved in time so that the last one happens at `now_ms`; every gap is kept.

    >>> clicks = [Click(user_id="u", item_id=i, at_ms=t) for i, t in (("a", 10), ("b", 25))]
    >>> [c.at_ms for c in shifted_to_now(clicks, 1_000)]
    [985, 1000]
    """
    if not events:
        return []
    shift_ms = now_ms - max(event.at_ms for event in events)
    return [msgspec.structs.replace(event, at_ms=event.at_ms + shift_ms) for event in events]
