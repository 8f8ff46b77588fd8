"""One data set: a catalogue, users, and their events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from eddyline.errors import EddylineError
from eddyline.schema.events import Click, Item, UserProfile

# (what is being done, done so far, of how many); a total of 0 means that it is not known.
Progress = Callable[[str, int, int], None]


class DatasetUnavailable(EddylineError):
    """A world cannot be had here. The message says which step failed, why and what to do."""


@dataclass(frozen=True, slots=True)
class Dataset:
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
