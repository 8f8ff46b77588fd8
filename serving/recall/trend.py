"""Popularity decayed by events (ADR 36), as last read: one list for each half-life."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eddyline.schema.event_decay import EventDecay, decays
from eddyline.settings.loader import Settings
from eddyline.stores.popularity import NO_TREND, SlotTrend
from eddyline.stores.state_store import StateStore
from serving.recall.item_sums import ItemNames, ItemSums

Pace = Literal["fast", "slow"]
# Names of items that left every list are dropped once so many of them are kept.
_UNUSED_MAX = 10_000


class _Sums(NamedTuple):
    """One epoch of a half-life in one slot: rows of `ItemNames`, and their decayed events."""

    rows: NDArray[np.int64]
    events: NDArray[np.float64]


class Trend:
    """The sums of all slots, and the lists of them. Thread rule: one thread but for `TrendList`."""

    def __init__(self, settings: Settings, store: StateStore, limit: int) -> None:
        """limit: items of a list, and that are read of each epoch."""
        self._store = store
        self._limit = limit
        fast, slow = decays(settings)
        self.lists: dict[Pace, TrendList] = {
            "fast": TrendList(self, fast),
            "slow": TrendList(self, slow),
        }
        self._decays = [*dict.fromkeys((fast, slow))]
        self._names = ItemNames()
        self._read: dict[str, SlotTrend] = {}
        self._sums: dict[tuple[str, EventDecay], list[_Sums]] = {}
        self._changed = False

    def read(self, slot: str) -> None:
        """Read what changed of a slot. Raises StoreUnavailable; the slot stays as it was then."""
        known = self._read.get(slot, NO_TREND)
        found = self._store.popular_trend(slot, self._decays, self._limit, known)
        if found is known:
            return
        self._read[slot], self._changed = found, True
        for decay in self._decays:
            self._sums[slot, decay] = [
                _Sums(
                    self._names.rows(part.items),
                    decay.scale(found.events, part.epoch) * np.array(part.sums, float),
                )
                for part in found.parts
                if part.decay == decay
            ]
        self._drop_unused_names()

    def rank(self) -> None:
        """Make the lists of what was read, if that changed."""
        if self._changed:
            self._changed = False
            for one in self.lists.values():
                one.replace(self._names.top(self._sums_of(one.decay), self._limit))

    def scores(self, decay: EventDecay, place_of: Mapping[str, int]) -> NDArray[np.float64]:
        """See `TrendList.scores`."""
        return self._names.by_place(self._sums_of(decay), self._limit, place_of)

    def _sums_of(self, decay: EventDecay) -> ItemSums:
        """In the order of slots and epochs: every worker adds in one order and gets equal bits."""
        sums = ItemSums.zero(len(self._names))
        for key in sorted(key for key in self._sums if key[1] == decay):
            for part in self._sums[key]:
                sums.add(part.rows, part.events)
        return sums

    def _drop_unused_names(self) -> None:
        every = [part.rows for parts in self._sums.values() for part in parts]
        if len(self._names) > _UNUSED_MAX + sum(map(len, every)):
            used = self._names.keep(every)
            self._sums = {
                key: [part._replace(rows=np.searchsorted(used, part.rows)) for part in parts]
                for key, parts in self._sums.items()
            }


class TrendList:
    """Items by their events, each of which loses half its weight every half-life.

    Thread rule: any thread may read `ranked`; readers take no lock.
    """

    def __init__(self, trend: Trend, decay: EventDecay) -> None:
        self.decay = decay
        self._trend = trend
        self._ranked: Sequence[tuple[str, float]] = []

    @property
    def ranked(self) -> Sequence[tuple[str, float]]:
        """(item id, decayed events), most first."""
        return self._ranked

    def scores(self, place_of: Mapping[str, int]) -> NDArray[np.float64]:
        """As `Popularity.scores`, decayed events."""
        return self._trend.scores(self.decay, place_of)

    def replace(self, ranked: Sequence[tuple[str, float]]) -> None:
        """Take over a new list."""
        self._ranked = ranked
