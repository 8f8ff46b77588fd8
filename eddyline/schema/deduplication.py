"""Which events are re-sends: a function of one partition's log alone.

An event is a re-send where its `event_id` was accepted at a lower offset of the same partition, at most
`dedupe_window_events` offsets back. A re-send does not extend the window. Ingest keeps the window in Redis;
the archive and the trainer, which read a partition in its order, keep it here.
"""

from __future__ import annotations

from collections import OrderedDict


def is_resend(accepted_at: int | None, offset: int, window: int) -> bool:
    """Whether the event at `offset` is a re-send of the one that was accepted at `accepted_at`.

    >>> is_resend(None, 9, 5), is_resend(4, 9, 5), is_resend(3, 9, 5)
    (False, True, False)
    """
    return accepted_at is not None and offset - accepted_at <= window


class ResendWindow:
    """The accepted event ids of one partition, read in the order of its log. Holds at most `window` ids.

    Thread rule: one thread.

    >>> seen = ResendWindow(3)
    >>> [seen.accept("a", offset) for offset in (0, 2, 3, 4)]
    [True, False, False, True]
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._accepted: OrderedDict[str, int] = OrderedDict()

    def accept(self, event_id: str | None, offset: int) -> bool:
        """Whether the event counts; it is remembered then. Offsets only grow. None always counts."""
        accepted = self._accepted
        while accepted and offset - next(iter(accepted.values())) > self._window:
            accepted.popitem(last=False)
        if event_id is None:
            return True
        if is_resend(accepted.get(event_id), offset, self._window):
            return False
        accepted[event_id] = offset
        return True
