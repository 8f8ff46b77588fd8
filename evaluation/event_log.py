"""A log of events in the order of the protocol: by time, then user, then position in the files.

Held as columns: about 40 bytes an event. An event id that does not end in a number, as `import`'s
ids do, needs about 200 bytes more.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from eddyline.errors import SettingsError
from eddyline.schema import user_history
from eddyline.schema.events import KINDS, Click, Item, UserProfile

Ints = npt.NDArray[np.int64]

# About 8 GB, and 24 GB while they are sorted.
EVENTS_MAX = 200_000_000
# Longer numbers do not fit int64.
_DIGITS_MAX = 18
DISLIKE = KINDS.index("dislike")


@dataclass(frozen=True, slots=True)
class EventLog:
    """Sorted events. Thread rule: any thread; immutable.

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

    def __len__(self) -> int:
        """The number of events."""
        return len(self.at_ms)

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
    _users: array[int] = field(default_factory=lambda: array("i"))
    _items: array[int] = field(default_factory=lambda: array("i"))
    _at_ms: array[int] = field(default_factory=lambda: array("q"))
    _kinds: array[int] = field(default_factory=lambda: array("b"))
    _weights: array[float] = field(default_factory=lambda: array("d"))
    _id_rows: dict[str, int] = field(default_factory=dict)
    _id_start_of: array[int] = field(default_factory=lambda: array("i"))
    _id_numbers: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        """The events so far."""
        return len(self._at_ms)

    def add(self, click: Click) -> None:
        """Add the next event. Raises SettingsError."""
        if len(self) >= EVENTS_MAX:
            raise SettingsError(f"the log has more than {EVENTS_MAX:,} events: evaluate a part")
        start, number = _split_id(click.event_id or f"evaluate/{len(self)}")
        self._id_start_of.append(self._id_rows.setdefault(start, len(self._id_rows)))
        self._id_numbers.append(number)
        self._users.append(self._user_rows.setdefault(click.user_id, len(self._user_rows)))
        self._items.append(self._item_rows.setdefault(click.item_id, len(self._item_rows)))
        self._at_ms.append(click.at_ms)
        self._kinds.append(KINDS.index(click.kind))
        self._weights.append(user_history.strength(click, self.dwell_ms_full))

    def build(self) -> EventLog:
        """The sorted log. Without items, each is live from its first event on.

        Of events with one id the first in the files counts, as in ingest.
        """
        at_ms, users = np.array(self._at_ms, np.int64), np.array(self._users, np.int32)
        user_ids, item_ids = list(self._user_rows), list(self._item_rows)
        order_of_user = np.empty(len(user_ids), np.int64)
        order_of_user[sorted(range(len(user_ids)), key=user_ids.__getitem__)] = np.arange(
            len(user_ids)
        )
        id_start_of = np.array(self._id_start_of, np.int32)
        id_numbers = np.array(self._id_numbers, np.int64)
        counts = _first_of_each(id_start_of, id_numbers)
        order = np.lexsort((order_of_user[users], at_ms))  # stable: the position breaks ties
        order = order[counts[order]]
        items = np.array(self._items, np.int32)[order]
        changes = self.changes or _first_seen(item_ids, items, at_ms[order], self.descriptions)
        return EventLog(
            user_ids=user_ids,
            item_ids=item_ids,
            users=users[order],
            items=items,
            at_ms=at_ms[order],
            kinds=np.array(self._kinds, np.int8)[order],
            weights=np.array(self._weights, np.float64)[order],
            id_starts=list(self._id_rows),
            id_start_of=id_start_of[order],
            id_numbers=id_numbers[order],
            resent=len(self) - len(order),
            changes=sorted(changes, key=lambda item: item.at_ms),
            profiles=sorted(self.profiles, key=lambda profile: profile.at_ms),
        )


def _split_id(event_id: str) -> tuple[str, int]:
    """("a", 7) of "a/7"; (the id, -1) of one that does not end so.

    >>> _split_id("import/f/7"), _split_id("a/07"), _split_id("b")
    (('import/f', 7), ('a/07', -1), ('b', -1))
    """
    start, slash, last = event_id.rpartition("/")
    if slash and len(last) <= _DIGITS_MAX and last.isdecimal() and str(int(last)) == last:
        return start, int(last)
    return event_id, -1


def _first_of_each(starts: npt.NDArray[np.int32], numbers: Ints) -> npt.NDArray[np.bool_]:
    """Whether no earlier event has the same id."""
    order = np.lexsort((numbers, starts))  # stable
    same = np.zeros(len(order), bool)
    same[1:] = (np.diff(starts[order]) == 0) & (np.diff(numbers[order]) == 0)
    found = np.empty(len(order), bool)
    found[order] = ~same
    return found


def _first_seen(
    item_ids: Sequence[str],
    items: npt.NDArray[np.int32],
    at_ms: Ints,
    descriptions: Mapping[str, Item],
) -> list[Item]:
    """Items at the time of their first event."""
    rows, first = np.unique(items, return_index=True)
    return [
        msgspec.structs.replace(
            descriptions.get(item_ids[row]) or Item(item_id=item_ids[row]), at_ms=int(at_ms[at])
        )
        for row, at in zip(rows.tolist(), first.tolist(), strict=True)
    ]
