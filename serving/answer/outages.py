"""Servers and slots of Redis that do not answer: one call at a time tries them, others go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from eddyline.errors import SlotUnavailable, StoreUnavailable
from eddyline.stores.state_store import StateStore

# While a server of Redis (or one slot of it) is away, one call per this time tries it; all others
# answer without it at once, so that one that hangs does not hold every thread for its time-out.
PROBE_S = 0.2
# A call that tries it ends before this: it has the time-out of Redis, and none is longer.
PROBE_S_MAX = 60.0


@dataclass(slots=True)
class _Outage:
    """A server or a slot that does not answer.

    since, probe_at: monotonic; slots: those that were refused, any of which ends it
    """

    reason: str
    since: float
    probe_at: float
    slots: set[str] = field(default_factory=set)


class Outages:
    """The outages that the calls of this process met. Thread rule: any thread."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        # Key of a slot, or of its server -> its outage.
        self._outages: dict[str, _Outage] = {}

    @contextmanager
    def guard(self, slots: Collection[str]) -> Iterator[None]:
        """Around a call that needs these slots of one server.

        Raises StoreUnavailable at once if one of them is away, unless it is time to try it again.
        A StoreUnavailable of the call is noted and passes through; any other end means that the
        server answers.
        """
        self._check(slots)
        try:
            yield
        except StoreUnavailable as error:
            self._note(slots, error)
            raise
        except BaseException:
            self._clear(slots)
            raise
        self._clear(slots)

    def missing(self) -> str:
        """What of Redis cannot be used now, why, and since when; "" if all can."""
        with self._lock:
            outages = list(self._outages.values())
        now = time.monotonic()
        return "; ".join(f"{o.reason} (since {now - o.since:.1f} s)" for o in outages)

    def _check(self, slots: Collection[str]) -> None:
        if not self._outages:
            return
        with self._lock:
            now = time.monotonic()
            keys = {key for slot in slots for key in self._keys(slot)}
            found = [self._outages[key] for key in keys if key in self._outages]
            for outage in found:
                if now < outage.probe_at:
                    raise StoreUnavailable(outage.reason)
            for outage in found:
                # Until this call has ended, nobody else tries it.
                outage.probe_at = now + PROBE_S_MAX

    def _note(self, slots: Collection[str], error: StoreUnavailable) -> None:
        with self._lock:
            now = time.monotonic()
            for slot in slots:
                of_slot, of_server = self._keys(slot)
                key = of_slot if isinstance(error, SlotUnavailable) else of_server
                outage = self._outages.setdefault(key, _Outage(str(error), now, now))
                outage.reason = str(error)
                outage.slots.add(slot)
            # Also those that this call tried and did not meet.
            for slot in slots:
                for key in self._keys(slot):
                    if key in self._outages:
                        self._outages[key].probe_at = now + PROBE_S

    def _clear(self, slots: Collection[str]) -> None:
        if not self._outages:
            return
        with self._lock:
            answering = {key for slot in slots for key in self._keys(slot)}
            self._outages = {
                key: outage
                for key, outage in self._outages.items()
                if key not in answering and not outage.slots & set(slots)
            }

    def _keys(self, slot: str) -> tuple[str, str]:
        return f"slot {slot}", f"server {self._store.server_of(slot)}"
