"""Reads one user in one round trip from a Redis that may be away."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import msgspec

from eddyline.errors import EddylineError, StoreUnavailable
from eddyline.schema.partitioning import partition_of, user_slot
from eddyline.stores.state_store import LogId, StateStore, UserState
from serving.answer.deadline import Deadline

# While Redis is away one call per this time tries it; all others answer without it at once, so that
# a Redis that hangs does not hold every thread for its time-out.
PROBE_S = 0.2
# Polling for a click: ingest applies one in a few milliseconds, and a read takes about 0.2 ms.
POLL_S = 0.002
POLL_S_MAX = 0.02
# A call that waits for a click keeps this much of its deadline for the answer itself.
ANSWER_S = 0.05


@dataclass(frozen=True, slots=True)
class AfterToken:
    """The click that the answer must include, by its coordinates, and how long to wait for it."""

    partition: int
    offset: int
    wait_ms: int


@dataclass(frozen=True, slots=True)
class AfterStatus:
    """Whether the answer includes the click; if not, why."""

    applied: bool
    waited_ms: int
    why: str


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
        self._away = ""
        self._away_since = 0.0
        self._probe_at = 0.0

    def partition_of(self, user_id: str) -> int:
        """The partition of `clicks` that holds this user's events."""
        return partition_of(user_id, self._partitions)

    def read(self, user_id: str) -> UserState:
        """What a query needs of this user. Raises StoreUnavailable, at once if Redis is away."""
        with self._lock:
            now = time.monotonic()
            if self._away and now < self._probe_at:
                raise StoreUnavailable(self._away)
            self._probe_at = now + PROBE_S
        partition = self.partition_of(user_id)
        try:
            state = self._store.read_user(
                user_slot(partition), partition, user_id, self._generation
            )
        except StoreUnavailable as error:
            with self._lock:
                self._away_since = self._away_since if self._away else time.monotonic()
                self._away = str(error)
                self._probe_at = time.monotonic() + PROBE_S
            raise
        except (EddylineError, msgspec.MsgspecError) as error:
            raise StoreUnavailable(f"the user's state cannot be used: {error}") from None
        self._away = ""
        return state

    def read_after(
        self, user_id: str, after: AfterToken, deadline: Deadline
    ) -> tuple[UserState, AfterStatus]:
        """The user once `after` is applied, or at the end of the wait. Raises StoreUnavailable."""
        begun = time.monotonic()
        until = begun + min(after.wait_ms / 1000, deadline.left_s() - ANSWER_S)
        pause = POLL_S
        while True:
            state = self.read(user_id)
            reached = -1 if state.fence is None else state.fence.offset
            now = time.monotonic()
            waited_ms = int((now - begun) * 1000)
            other_log = state.fence is not None and self._log not in (None, state.fence.log)
            if reached >= after.offset and not other_log:
                return state, AfterStatus(True, waited_ms, "")
            if other_log:
                why = "the state was written for another log of clicks; see `eddyline accept-log`"
                return state, AfterStatus(False, waited_ms, why)
            if now >= until:
                applied = f"partition {after.partition} is applied up to offset {reached}"
                why = f"{applied}, not {after.offset}"
                return state, AfterStatus(False, waited_ms, why)
            time.sleep(min(pause, until - now))
            pause = min(2 * pause, POLL_S_MAX)

    def missing(self) -> str:
        """Why Redis cannot be used now, and since when; "" if it can."""
        away = self._away
        return f"{away} (since {time.monotonic() - self._away_since:.1f} s)" if away else ""
