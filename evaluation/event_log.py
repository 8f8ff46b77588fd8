"""A log of events in the order of the protocol: by time, then user, then position in the files.

Held as columns, about 40 bytes an event, whatever the size of the files it was read from.
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

# About 8 GB.
EVENTS_MAX = 200_000_000
DISLIKE = KINDS.index("dislike")


@dataclass(frozen=True, slots=True)
class EventLog:
    """Sorted events. Thread rule: any thread; immutable.

    user_ids, item_ids: of the rows `users` and `items`
    users, items:  int32 (n,); at_ms: int64 (n,); kinds: int8 (n,), index into `events.KINDS`
    weights:       float64 (n,), with the dwell time applied
    positions:     int64 (n,), place in the files, 0 … n − 1
    own_ids:       event ids by position, of events that have one of their own
    changes:       items by time, stable; profiles likewise
    """

    user_ids: list[str]
    item_ids: list[str]
    users: npt.NDArray[np.int32]
    items: npt.NDArray[np.int32]
    at_ms: Ints
    kinds: npt.NDArray[np.int8]
    weights: npt.NDArray[np.float64]
    positions: Ints
    own_ids: dict[int, str]
    changes: list[Item]
    profiles: list[UserProfile]

    def __len__(self) -> int:
        """The number of events."""
        return len(self.at_ms)

    def click(self, number: int) -> Click:
        """Event `number` in the order of the protocol."""
        position = int(self.positions[number])
        return Click(
            user_id=self.user_ids[self.users[number]],
            item_id=self.item_ids[self.items[number]],
            at_ms=int(self.at_ms[number]),
            kind=KINDS[self.kinds[number]],
            weight=float(self.weights[number]),
            event_id=self.own_ids.get(position, f"evaluate/{position}"),
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
    _own_ids: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """The events so far."""
        return len(self._at_ms)

    def add(self, click: Click, *, own_id: bool = True) -> None:
        """Add the next event. own_id: whether its id is to be kept. Raises SettingsError."""
        if len(self) >= EVENTS_MAX:
            raise SettingsError(f"the log has more than {EVENTS_MAX:,} events: evaluate a part")
        if own_id and click.event_id is not None:
            self._own_ids[len(self)] = click.event_id
        self._users.append(self._user_rows.setdefault(click.user_id, len(self._user_rows)))
        self._items.append(self._item_rows.setdefault(click.item_id, len(self._item_rows)))
        self._at_ms.append(click.at_ms)
        self._kinds.append(KINDS.index(click.kind))
        self._weights.append(user_history.strength(click, self.dwell_ms_full))

    def build(self) -> EventLog:
        """The sorted log. Without items, each is live from its first event on."""
        at_ms, users = np.array(self._at_ms, np.int64), np.array(self._users, np.int32)
        user_ids, item_ids = list(self._user_rows), list(self._item_rows)
        order_of_user = np.empty(len(user_ids), np.int64)
        order_of_user[sorted(range(len(user_ids)), key=user_ids.__getitem__)] = np.arange(
            len(user_ids)
        )
        order = np.lexsort((order_of_user[users], at_ms))  # stable: the position breaks ties
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
            positions=order,
            own_ids=self._own_ids,
            changes=sorted(changes, key=lambda item: item.at_ms),
            profiles=sorted(self.profiles, key=lambda profile: profile.at_ms),
        )


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
