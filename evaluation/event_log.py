"""A log of events in the order of the protocol: by time, then user, then position in the files.

Events are columns in files that are mapped into memory, 37 bytes an event. In memory are the ids of
users and items, items, profiles, and event ids that do not end in a number, as `import`'s ids do:
about 200 bytes each.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from eddyline.errors import SettingsError
from eddyline.schema import user_history
from eddyline.schema.events import KINDS, Click, Item, UserProfile
from evaluation import event_files
from evaluation.event_files import EventFile, Ints

# About 8 GB, and 26 GB while they are sorted.
EVENTS_MAX = 200_000_000
# Events that are looked at together: no column is copied whole.
PART_EVENTS = 1_000_000
# Longer numbers do not fit int64.
_DIGITS_MAX = 18
DISLIKE = KINDS.index("dislike")
_SCRATCH = "eddyline-evaluate-log-"


@dataclass(frozen=True, slots=True, weakref_slot=True)
class EventLog:
    """Sorted events. Thread rule: any thread; immutable. Another process maps the same files.

    They are removed with the log that was built.

    user_ids, item_ids: of the rows `users` and `items`
    users, items:  int32 (n,); at_ms: int64 (n,); kinds: int8 (n,), index into `events.KINDS`
    weights:       float64 (n,), with the dwell time applied
    id_starts:     of the rows `id_start_of`; id_start_of: int32 (n,); id_numbers: int64 (n,), the
                   number at the end of the event id, -1 for none
    resent:        events that were left out, as an earlier one has their id
    changes:       items by time, stable; profiles likewise
    """

    user_ids: list[str]
    item_ids: list[str]
    users: npt.NDArray[np.int32]
    items: npt.NDArray[np.int32]
    at_ms: Ints
    kinds: npt.NDArray[np.int8]
    weights: npt.NDArray[np.float64]
    id_starts: list[str]
    id_start_of: npt.NDArray[np.int32]
    id_numbers: Ints
    resent: int
    changes: list[Item]
    profiles: list[UserProfile]
    folder: Path

    def __reduce__(self) -> tuple[Any, ...]:
        """The files are named, not copied."""
        columns = event_files.EVENT.names or ()
        names = [one.name for one in fields(self) if one.name not in columns]
        return _reopened, ({name: getattr(self, name) for name in names},)

    def __len__(self) -> int:
        """The number of events."""
        return len(self.at_ms)

    def parts(self, begin: int, end: int) -> Iterator[slice]:
        """Successive parts of the events from `begin` to `end`."""
        for start in range(begin, end, PART_EVENTS):
            yield slice(start, min(start + PART_EVENTS, end))

    def counts(self, column: npt.NDArray[np.int32], of: int, end: int) -> Ints:
        """int64 (of,): how often each number is in the column before `end`."""
        found = np.zeros(of, np.int64)
        for part in self.parts(0, end):
            found += np.bincount(column[part], minlength=of)
        return found

    def click(self, number: int) -> Click:
        """Event `number` in the order of the protocol."""
        start, last = self.id_starts[self.id_start_of[number]], int(self.id_numbers[number])
        return Click(
            user_id=self.user_ids[self.users[number]],
            item_id=self.item_ids[self.items[number]],
            at_ms=int(self.at_ms[number]),
            kind=KINDS[self.kinds[number]],
            weight=float(self.weights[number]),
            event_id=start if last < 0 else f"{start}/{last}",
        )

    def split(self, share: float) -> int:
        """The number of events before the split: that share, rounded; a time is never cut."""
        first = round(len(self) * share)
        if 0 < first < len(self):
            first = int(np.searchsorted(self.at_ms, self.at_ms[first], side="left"))
        return first


@dataclass
class LogBuilder:
    """Collects events in the order of the files. Thread rule: one thread.

    dwell_ms_full: see the setting
    descriptions:  item id -> the item, for `build` without `changes`
    """

    dwell_ms_full: int = 0
    changes: list[Item] = field(default_factory=list)
    profiles: list[UserProfile] = field(default_factory=list)
    descriptions: dict[str, Item] = field(default_factory=dict)
    _user_rows: dict[str, int] = field(default_factory=dict)
    _item_rows: dict[str, int] = field(default_factory=dict)
    _id_rows: dict[str, int] = field(default_factory=dict)
    _folder: Path = field(default_factory=lambda: Path(mkdtemp(prefix=_SCRATCH)))
    _file: EventFile = field(init=False)

    def __post_init__(self) -> None:
        """Have the folder removed in the end."""
        self._file = EventFile(self._folder)
        self._removal = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __len__(self) -> int:
        """The events so far."""
        return len(self._file)

    def add(self, click: Click) -> None:
        """Add the next event. Raises SettingsError."""
        if len(self) >= EVENTS_MAX:
            raise SettingsError(f"the log has more than {EVENTS_MAX:,} events: evaluate a part")
        start, number = _split_id(click.event_id or f"evaluate/{len(self)}")
        columns = self._file.columns
        columns["id_start_of"].append(self._id_rows.setdefault(start, len(self._id_rows)))
        columns["id_numbers"].append(number)
        columns["users"].append(self._user_rows.setdefault(click.user_id, len(self._user_rows)))
        columns["items"].append(self._item_rows.setdefault(click.item_id, len(self._item_rows)))
        columns["at_ms"].append(click.at_ms)
        columns["kinds"].append(KINDS.index(click.kind))
        columns["weights"].append(user_history.strength(click, self.dwell_ms_full))
        self._file.added()

    def build(self) -> EventLog:
        """The sorted log. Without items, each is live from its first event on.

        Of events with one id the first in the files counts, as in ingest.
        """
        given = len(self)
        user_ids, item_ids = list(self._user_rows), list(self._item_rows)
        columns = event_files.sort(self._file.close(), places(user_ids), self._folder)
        changes = self.changes or _first_seen(
            item_ids, columns["items"], columns["at_ms"], self.descriptions
        )
        log = EventLog(
            user_ids=user_ids,
            item_ids=item_ids,
            id_starts=list(self._id_rows),
            resent=given - len(columns["at_ms"]),
            changes=sorted(changes, key=lambda item: item.at_ms),
            profiles=sorted(self.profiles, key=lambda profile: profile.at_ms),
            folder=self._folder,
            **columns,
        )
        self._removal.detach()
        weakref.finalize(log, shutil.rmtree, self._folder, ignore_errors=True)
        return log


def places(ids: Sequence[str]) -> Ints:
    """The place of each id among all in order, int64 (n,): the same for any order of the files."""
    found = np.empty(len(ids), np.int64)
    found[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(len(ids))
    return found


def _reopened(others: Mapping[str, Any]) -> EventLog:
    """The log of another process."""
    return EventLog(**others, **event_files.mapped_columns(others["folder"]))


def _split_id(event_id: str) -> tuple[str, int]:
    """("a", 7) of "a/7"; (the id, -1) of one that does not end so.

    >>> _split_id("import/f/7"), _split_id("a/07"), _split_id("b")
    (('import/f', 7), ('a/07', -1), ('b', -1))
    """
    start, slash, last = event_id.rpartition("/")
    if slash and len(last) <= _DIGITS_MAX and last.isdecimal() and str(int(last)) == last:
        return start, int(last)
    return event_id, -1


def _first_seen(
    item_ids: Sequence[str],
    items: npt.NDArray[np.int32],
    at_ms: Ints,
    descriptions: Mapping[str, Item],
) -> list[Item]:
    """Items at the time of their first event."""
    first_ms = np.full(len(item_ids), -1, np.int64)
    for start in range(0, len(items), PART_EVENTS):
        rows, first = np.unique(items[start : start + PART_EVENTS], return_index=True)
        new = first_ms[rows] < 0
        first_ms[rows[new]] = at_ms[start + first[new]]
    return [
        msgspec.structs.replace(descriptions.get(item_id) or Item(item_id=item_id), at_ms=first)
        for item_id, first in zip(item_ids, first_ms.tolist(), strict=True)
        if first >= 0
    ]
