"""Calls that wait for a click (`after`): parked without a thread, resumed once it is applied.

A watcher reads the fences of the partitions that calls wait for, one watcher for each server of
Redis, so that a slow one delays no other. A parked call costs nothing but its place.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from eddyline.errors import EddylineError
from eddyline.kafka.topics import CLICKS
from eddyline.schema.partitioning import user_slot
from eddyline.stores.state_store import LogId, Source, StateStore
from serving.answer.click_ends import ClickEnds
from serving.answer.user_reader import AfterToken

log = logging.getLogger(__name__)

# Ingest applies a click in a few milliseconds, and reading a fence takes about 0.1 ms: a partition
# is looked at so soon after a new call, then at longer and longer intervals.
POLL_S = 0.002
POLL_S_MAX = 0.02
# A click that is not applied after so long may not exist. Not earlier: with acks=1 a producer knows
# the offset of its record some milliseconds before the log's end includes it.
END_S = 0.05
CLOSE_S = 5.0


class ClickPending(Exception):
    """The click of the query is not applied yet, and the query may wait for it."""


class TooManyWait(EddylineError):
    """As many calls wait for a click as may."""


@dataclass(slots=True, eq=False)
class ParkedCall:
    """One call that waits; times are monotonic. exists: whether the log holds the offset."""

    after: AfterToken
    begun_s: float
    until_s: float
    resume: Callable[[AfterToken], None]
    exists: bool = False


@dataclass(slots=True)
class _Watched:
    """The calls that wait for one partition, and when its fence is read next."""

    calls: list[ParkedCall] = field(default_factory=list)
    next_s: float = 0.0
    pause_s: float = POLL_S


class ClickWaits:
    """Parks calls, and resumes each exactly once. Thread rule: any thread; nothing waits here."""

    def __init__(
        self,
        store: StateStore,
        *,
        log_id: LogId | None = None,
        ends: ClickEnds | None = None,
        calls_max: int = 256,
        threads: int = 2,
    ) -> None:
        """log_id: of the log that tokens belong to; None: unchecked.

        ends: None: every offset may still come
        calls_max: calls at a time that are parked, or resumed and not answered yet
        threads: that run resumed calls
        """
        self._store = store
        self._log_id = log_id
        self._ends = ends
        self._calls_max = calls_max
        self._lock = threading.Lock()
        self._watchers: dict[str, _Watcher] = {}
        self._parked: set[ParkedCall] = set()
        self._resumed = 0
        self._applied: dict[int, int] = {}
        self._closed = False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="waited")

    def __len__(self) -> int:
        """The number of calls that are parked, or resumed and not answered yet."""
        return len(self._parked) + self._resumed

    def check(self, after: AfterToken) -> None:
        """Raise TooManyWait if this token would have to wait and no place is free."""
        applied = self._applied.get(after.partition, -1)
        if applied < after.offset and len(self) >= self._calls_max:
            raise TooManyWait(
                f"{self._calls_max} calls wait for a click already (waiting_calls_max); "
                "ask again, or without `after`"
            )

    def park(
        self, after: AfterToken, wait_s: float, resume: Callable[[AfterToken], None]
    ) -> ParkedCall:
        """Have `resume` called on another thread once the click is applied, or need not be awaited.

        resume: gets the token with `wait_ms` 0, the time waited, and why it was not applied
        Raises TooManyWait.
        """
        begun_s = time.monotonic()
        call = ParkedCall(after, begun_s, begun_s + wait_s, resume)
        server = self._store.server_of(user_slot(after.partition))
        with self._lock:
            self.check(after)
            self._parked.add(call)
            if not self._closed:
                # Names of servers change with a failover only: there are never more than a few.
                if server not in self._watchers:
                    self._watchers[server] = _Watcher(self)
                self._watchers[server].add(call)
                return call
        self.resume(call, "the worker stops")
        return call

    def cancel(self, call: ParkedCall) -> None:
        """Forget a call whose caller is gone."""
        with self._lock:
            self._parked.discard(call)

    def resume(self, call: ParkedCall, why: str = "") -> None:
        """Resume a call, unless it was resumed or cancelled before."""
        with self._lock:
            if call not in self._parked:
                return
            self._parked.remove(call)
            self._resumed += 1
        waited_ms = int((time.monotonic() - call.begun_s) * 1000)
        after = replace(call.after, wait_ms=0, waited_ms=waited_ms, why=why)
        try:
            self._pool.submit(self._run, call, after)
        except RuntimeError:  # the pool is shut down: answer on this thread
            self._run(call, after)

    def close(self) -> None:
        """Resume all parked calls and stop the threads."""
        with self._lock:
            self._closed = True
            parked, watchers = list(self._parked), list(self._watchers.values())
        for watcher in watchers:
            watcher.close()
        for call in parked:
            self.resume(call, "the worker stops")
        if self._ends is not None:
            self._ends.close()
        self._pool.shutdown()

    def _run(self, call: ParkedCall, after: AfterToken) -> None:
        try:
            call.resume(after)
        finally:
            with self._lock:
                self._resumed -= 1

    def is_parked(self, call: ParkedCall) -> bool:
        """Whether the call still waits."""
        return call in self._parked

    def look(self, partition: int, calls: list[ParkedCall]) -> None:
        """Resume those of a partition's calls that need not wait any longer."""
        slot, source = user_slot(partition), Source(CLICKS, partition)
        try:
            fence = self._store.fences(source, [slot])[slot]
        except EddylineError as error:
            for call in calls:
                self.resume(call, f"the fence cannot be read: {error}")
            return
        other_log = fence is not None and self._log_id not in (None, fence.log)
        applied = -1 if fence is None or other_log else fence.offset
        self._applied[partition] = applied
        now_s = time.monotonic()
        for call in calls:
            # Of another log: the answer says so, and no waiting helps.
            if other_log or applied >= call.after.offset or now_s >= call.until_s:
                self.resume(call)
            elif why := self._beyond_the_end(call, now_s):
                self.resume(call, why)

    def _beyond_the_end(self, call: ParkedCall, now_s: float) -> str:
        since_s = call.begun_s + END_S
        if self._ends is None or call.exists or now_s < since_s:
            return ""
        end = self._ends.look_up(call.after.partition, since_s)
        if end is None:
            return ""
        call.exists = call.after.offset < end
        where = f"partition {call.after.partition} of clicks ends before offset {end}"
        return "" if call.exists else where


class _Watcher:
    """Reads the fences of one server while calls wait for them."""

    def __init__(self, waits: ClickWaits) -> None:
        self._waits = waits
        self._watched: dict[int, _Watched] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="click-waits", daemon=True)
        self._thread.start()

    def add(self, call: ParkedCall) -> None:
        """Watch its partition, at first at short intervals."""
        with self._changed:
            watched = self._watched.setdefault(call.after.partition, _Watched())
            watched.calls.append(call)
            watched.next_s, watched.pause_s = min(watched.next_s, time.monotonic()), POLL_S
            self._changed.notify()

    def close(self) -> None:
        """Stop watching."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (pause_s := self._pause_s()) > 0:
                    self._changed.wait(pause_s)
                if self._closed:
                    return
                now_s = time.monotonic()
                due = {p: list(w.calls) for p, w in self._watched.items() if w.next_s <= now_s}
            for partition, calls in due.items():
                try:
                    self._waits.look(partition, calls)
                except Exception as error:
                    log.exception("calls that wait for a click go on without it")
                    for call in calls:
                        self._waits.resume(call, f"{type(error).__name__} while it waited")
            with self._changed:
                for partition in due:
                    self._look_later(partition)

    def _pause_s(self) -> float:
        if not self._watched:
            return threading.TIMEOUT_MAX
        return min(watched.next_s for watched in self._watched.values()) - time.monotonic()

    def _look_later(self, partition: int) -> None:
        watched = self._watched[partition]
        watched.calls = [call for call in watched.calls if self._waits.is_parked(call)]
        if not watched.calls:
            del self._watched[partition]
            return
        now_s = time.monotonic()
        first_s = min(call.until_s for call in watched.calls)
        watched.next_s = max(now_s, min(now_s + watched.pause_s, first_s))
        watched.pause_s = min(2 * watched.pause_s, POLL_S_MAX)
