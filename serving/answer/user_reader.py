"""Reads one user in one round trip from a Redis that may be away."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import msgspec

from eddyline.errors import EddylineError, SlotUnavailable, StoreUnavailable
from eddyline.schema.partitioning import partition_of, user_slot
from eddyline.stores.state_store import LogId, StateStore, UserState

# While a server of Redis (or one slot of it) is away, one call per this time tries it; all others
# answer without it at once, so that one that hangs does not hold every thread for its time-out.
PROBE_S = 0.2


@dataclass(frozen=True, slots=True)
class AfterToken:
    """The click that the answer must include, by its coordinates.

    wait_ms: how long to wait for it from now
    waited_ms, why: how long the call has waited, and why it stopped; "" if it may have been applied
    """

    partition: int
    offset: int
    wait_ms: int
    waited_ms: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True)
class AfterStatus:
    """Whether the answer includes the click; if not, why."""

    applied: bool
    waited_ms: int
    why: str


@dataclass(slots=True)
class _Outage:
    """A server or a slot that does not answer.

    since, probe_at: monotonic; slots: those that were refused, any of which ends it
    """

    reason: str
    since: float
    probe_at: float
    slots: set[str] = field(default_factory=set)


class UserReader:
    """Reads users with their embeddings of one generation. Thread rule: any thread."""

    def __init__(
        self,
        store: StateStore,
        *,
        clicks_partitions: int,
        generation: str,
        log: LogId | None = None,
    ) -> None:
        """clicks_partitions: of the topic; a user's slot follows from it.

        log: the log that tokens belong to; state of another log lacks their clicks. None: unchecked
        """
        self._store = store
        self._log = log
        self._partitions = clicks_partitions
        self._generation = generation
        self._lock = threading.Lock()
        # Key of `_keys` -> its outage.
        self._outages: dict[str, _Outage] = {}

    def partition_of(self, user_id: str) -> int:
        """The partition of `clicks` that holds this user's events."""
        return partition_of(user_id, self._partitions)

    def read(self, user_id: str) -> UserState:
        """What a query needs of this user.

        Raises StoreUnavailable; at once if the server or the slot of this user is away.
        """
        partition = self.partition_of(user_id)
        slot = user_slot(partition)
        self._check_away(slot)
        try:
            state = self._store.read_user(slot, partition, user_id, self._generation)
        except StoreUnavailable as error:
            self._note_away(slot, error)
            raise
        except (EddylineError, msgspec.MsgspecError) as error:
            raise StoreUnavailable(f"the user's state cannot be used: {error}") from None
        if self._outages:
            with self._lock:
                self._outages = {k: o for k, o in self._outages.items() if slot not in o.slots}
        return state

    def _check_away(self, slot: str) -> None:
        """Raise StoreUnavailable if the slot is away, unless it is time to try it again."""
        if not self._outages:
            return
        with self._lock:
            now = time.monotonic()
            found = [
                self._outages[key]
                for key in (_slot_key(slot), self._server_key(slot))
                if key in self._outages
            ]
            for outage in found:
                if now < outage.probe_at:
                    raise StoreUnavailable(outage.reason)
            for outage in found:
                outage.probe_at = now + PROBE_S

    def _note_away(self, slot: str, error: StoreUnavailable) -> None:
        key = _slot_key(slot) if isinstance(error, SlotUnavailable) else self._server_key(slot)
        with self._lock:
            now = time.monotonic()
            outage = self._outages.setdefault(key, _Outage(str(error), now, now))
            outage.reason, outage.probe_at = str(error), now + PROBE_S
            outage.slots.add(slot)

    def _server_key(self, slot: str) -> str:
        return f"server {self._store.server_of(slot)}"

    def of_other_log(self, state: UserState) -> bool:
        """Whether the state was written for another log than that of the tokens."""
        return state.fence is not None and self._log not in (None, state.fence.log)

    def why_not_applied(self, state: UserState, after: AfterToken) -> str:
        """Why the state does not include the click; "" if it does."""
        if self.of_other_log(state):
            return "the state was written for another log of clicks; see `eddyline accept-log`"
        reached = -1 if state.fence is None else state.fence.offset
        if reached >= after.offset:
            return ""
        applied = f"partition {after.partition} is applied up to offset {reached}"
        return f"{applied}, not {after.offset}"

    def missing(self) -> str:
        """What of Redis cannot be used now, why, and since when; "" if all can."""
        with self._lock:
            outages = list(self._outages.values())
        now = time.monotonic()
        return "; ".join(f"{o.reason} (since {now - o.since:.1f} s)" for o in outages)


def _slot_key(slot: str) -> str:
    return f"slot {slot}"
