"""The worlds that the demo, the benchmarks and the tests run on: a catalogue, people and their history.

A world is either real ("movielens") or made from a seed ("generated"). Both come as one `World`, so that
nothing after `load` knows which it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from eddyline.errors import EddylineError
from eddyline.events import Click, Item, UserProfile

# (what is being done, done so far, of how many); a total of 0 means that it is not known.
Progress = Callable[[str, int, int], None]

NAMES = ("movielens", "generated")


class WorldUnavailable(EddylineError):
    """A world cannot be had here. The message says which step failed, why and what to do."""


@dataclass(frozen=True, slots=True)
class World:
    """A catalogue, its users and all they did.

    licence:  the sentences to show wherever the world is fetched or shown; "" where there are none
    profiles: by user id; every user of `clicks` is in it
    clicks:   sorted by (at_ms, user_id, position in the source); every event id is unique and the same
              each time the world is loaded, so a replay that is repeated is recognised as a re-send
    """

    name: str
    licence: str
    items: list[Item]
    profiles: dict[str, UserProfile]
    clicks: list[Click]


def load(name: str, data_dir: Path, on_progress: Progress) -> World:
    """The world of this name: "movielens", or "generated" with its default seed and size.

    data_dir: where fetched files are kept, in `data/`; the generated world needs none
    Raises WorldUnavailable where it cannot be fetched, ValueError for another name.
    """
    # Imported here, because both build on this file.
    from eddyline.demo import generated, movielens

    if name == "movielens":
        return movielens.load(data_dir, on_progress)
    if name == "generated":
        return generated.generate(on_progress=on_progress)
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
