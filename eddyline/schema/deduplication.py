"""Deduplication of clicks: one rule for ingest, the archive and the trainer.

An event is a duplicate if its `event_id` was accepted at a lower offset of the same partition, at
most `dedupe_window_events` offsets back. A duplicate does not extend the window. The result depends
on the partition's log alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType

_NONE: Mapping[str, int] = MappingProxyType({})


class DedupeWindow:
    """The accepted event ids of one partition, read in log order. Thread rule: one thread.

    size:     width of the window in offsets (`dedupe_window_events`)
    known:    event id -> offset, accepted before this run; ingest keeps these in Redis. Not
              modified
    done:     offset up to which records were applied before; for these `known` holds the decision
    accepted: event id -> offset, accepted in this run, by offset; at most `size` ids

    The decision for records up to `done` is exact while no slot lags by more than `size` offsets.

    >>> window = DedupeWindow(3)
    >>> [window.accept("a", offset) for offset in (0, 2, 3, 4)]
    [True, False, False, True]
    """

    def __init__(self, size: int, known: Mapping[str, int] = _NONE, done: int = -1) -> None:
        self.accepted: OrderedDict[str, int] = OrderedDict()
        self._size = size
        self._known = known
        self._done = done

    def accept(self, event_id: str | None, offset: int) -> bool:
        """Whether the event at `offset` counts; always without an id. Offsets must grow."""
        if event_id is None:
            return True
        accepted = self.accepted
        before = accepted.get(event_id)
        if before is None:
            before = self._known.get(event_id)
        if offset <= self._done:
            return before == offset
        if before is not None and offset - before <= self._size:
            return False
        accepted.pop(event_id, None)
        accepted[event_id] = offset
        while offset - next(iter(accepted.values())) > self._size:
            accepted.popitem(last=False)
        return True
