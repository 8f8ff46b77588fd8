"""One data set: a catalogue, users, and their events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from eddyline.errors import EddylineError
from eddyline.schema.events import Click, Item, UserProfile


class OnProgress(Protocol):
    """Shows progress; a total of 0 is unknown."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """what: a few words."""


class DatasetUnavailable(EddylineError):
    """A data set is not available. The message names the step, the reason and what to do."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A catalogue, its users and all their events.

    licence:  the text to show wherever the data set is downloaded or shown; "" for none
    profiles: by user id; has every user of `clicks`
    clicks:   sorted by (at_ms, user_id, position in the source); every event id is unique and the
              same at each load, so ingest recognises a repeated replay as re-sent events
    """

    name: str
    licence: str
    items: list[Item]
    profiles: dict[str, UserProfile]
    clicks: list[Click]
