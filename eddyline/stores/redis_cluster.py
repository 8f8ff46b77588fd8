"""A Redis Cluster with redis-py's own commands: each goes to the node that serves its key.

redis-py's `RedisCluster` connects while it is made, and sends the commands of a pipeline that broke again
one by one, each with a time-out of its own. Here nothing is asked before the first command, and one that
meets a node that hangs takes two time-outs at most: one to learn which node serves what, one itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import redis
from redis.client import Pipeline
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    ClusterError,
    ConnectionError,
    MovedError,
    NoPermissionError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from eddyline.errors import StoreRefused
from eddyline.stores.cluster_slots import Address, SlotMap, address_of, named, parse_slots, slot_of

_T = TypeVar("_T")
# A command and its options, not sent yet.
_Queued = tuple[tuple[Any, ...], dict[str, Any]]
# A slot that moves gives one redirection, two where it moves on at once; more is a cluster in disagreement.
_TRIES = 5
_REDIRECTED = (AskError, TryAgainError)


class RedisCluster(redis.Redis):
    """All nodes of one cluster. Thread rule: any thread.

    A command that names no key of ours goes to any node; `pipeline(transaction=True)` takes keys of one slot
    tag, any other pipeline is split by nodes. Errors are redis-py's.
    """

    def __init__(
        self, seeds: Sequence[Address], make: Callable[[Address], redis.Redis], timeout_s: float
    ) -> None:
        """seeds: nodes that are asked first; make: a client of one node, not connected yet.

        timeout_s: how long to look for a node that knows the cluster, beyond the first one's own time-out
        """
        self._seeds = tuple(seeds)
        self._make = make
        self._timeout_s = timeout_s
        self._nodes = {address: make(address) for address in self._seeds}
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._map: SlotMap | None = None
        self._stale = False
        self._fell: dict[Address, float] = {}
        self._failed: tuple[float, str] = (0.0, "")
        super().__init__(connection_pool=self._nodes[self._seeds[0]].connection_pool)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run one command where its key lies."""
        slot = slot_of(args)
        if slot is None:
            return self._anywhere(lambda node: _run(node, *args, **options))

        def asked(node: redis.Redis) -> Any:
            with node.pipeline(transaction=False) as pipe:
                _run(pipe, "ASKING")
                _run(pipe, *args, **options)
                return pipe.execute()[1]

        return self.on_slot(slot, lambda node: _run(node, *args, **options), asked)

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        """Commands that are sent together. transaction: read or written at one instant, of one slot tag."""
        return _Pipe(self, transaction)

    def on_slot(
        self,
        slot: int,
        call: Callable[[redis.Redis], _T],
        asked: Callable[[redis.Redis], _T] | None = None,
    ) -> _T:
        """Call with the client of the node that serves the slot, wherever it has moved.

        asked: the same on a node that is just taking the slot over; None where that cannot be done
        """
        seen = self.map()
        if seen.owners[slot] is None:
            seen = self._refresh(seen)
        target = seen.owner(slot)
        again = True
        for _ in range(_TRIES):
            try:
                return call(self.node(target))
            except MovedError as moved:
                target = address_of(moved.host, moved.port, target)
                seen = self._refresh(seen, first=target)
            except AskError as ask:
                if asked is None:
                    raise
                return asked(self.node(address_of(ask.host, ask.port, target)))
            except (AuthenticationError, AuthorizationError):
                raise
            except ConnectionError:
                self._fell[target] = time.monotonic()
                if not again:
                    raise
                again = False
                seen = self._refresh(seen)
                target = seen.owner(slot)
            except TimeoutError:
                self._fell[target] = time.monotonic()
                self._stale = True
                raise
            except (ClusterDownError, ReadOnlyError):
                self._stale = True
                raise
        raise ClusterError(f"hash slot {slot} was moved {_TRIES} times while it was asked for")

    def map(self, *, fresh: bool = False) -> SlotMap:
        """Which node serves what; asked for at the first call and after an error. fresh: asked for now."""
        known = self._map
        if known is None or self._stale or fresh:
            return self._refresh(known)
        return known

    def node(self, address: Address) -> redis.Redis:
        """The client of one node."""
        with self._lock:
            if address not in self._nodes:
                self._nodes[address] = self._make(address)
            return self._nodes[address]

    def scan_iter(self, *args: Any, **options: Any) -> Iterator[Any]:
        """All keys of all primaries, as redis-py's `scan_iter`.

        Raises ConnectionError at the end where slots moved meanwhile: keys may have been missed.
        """
        before = self.map(fresh=True)
        for address in before.primaries:
            yield from self.node(address).scan_iter(*args, **options)
        if self.map(fresh=True).owners != before.owners:
            raise ConnectionError(
                "hash slots moved while all keys were looked through; do it again"
            )

    def close(self) -> None:
        """Let go of all connections."""
        for node in list(getattr(self, "_nodes", {}).values()):
            node.close()

    def _anywhere(self, call: Callable[[redis.Redis], _T]) -> _T:
        for address in self.map().primaries:
            try:
                return call(self.node(address))
            except (AuthenticationError, AuthorizationError):
                raise
            except ConnectionError:
                self._fell[address] = time.monotonic()
        raise ConnectionError("no primary of the cluster answers")

    def _refresh(self, seen: SlotMap | None, first: Address | None = None) -> SlotMap:
        """The map as a node tells it now; another thread's where that one has replaced `seen` meanwhile."""
        asked_at = time.monotonic()
        with self._asking:
            if self._map is not None and self._map is not seen:
                return self._map
            if (
                self._failed[0] > asked_at
            ):  # another thread has just asked them all, while this one waited
                raise ConnectionError(self._failed[1])
            try:
                found = self._ask(seen, first)
            except RedisError as error:
                self._failed = (time.monotonic(), str(error))
                raise
            self._map, self._stale = found, False
            self._forget({*self._seeds, *found.primaries, *found.replicas})
            return found

    def _ask(self, seen: SlotMap | None, first: Address | None) -> SlotMap:
        """Ask one node after the other for the map, those that failed last at the end."""
        known = (*seen.primaries, *seen.replicas) if seen else ()
        candidates = dict.fromkeys((*known, *self._seeds))
        order = sorted(candidates, key=lambda address: self._fell.get(address, 0.0))
        if first is not None:
            order = [first, *(address for address in order if address != first)]
        until, tried = time.monotonic() + self._timeout_s, list[str]()
        last: RedisError = ConnectionError("none was asked")
        for address in order:
            tried.append(named(address))
            try:
                # As two words: the answer is left as it is, whatever redis-py makes of it otherwise.
                found = parse_slots(_run(self.node(address), "CLUSTER", "SLOTS"), address)
                if found.primaries:
                    return found
                last = ClusterDownError("it serves no hash slot and knows no node that does")
            except (AuthenticationError, AuthorizationError, NoPermissionError):
                raise
            except ResponseError as error:
                if "cluster support disabled" in str(error):
                    raise StoreRefused(
                        f"Redis at {named(address)} is a single server: set redis_cluster = false"
                    ) from None
                last = error
            except RedisError as error:
                self._fell[address], last = time.monotonic(), error
            if time.monotonic() > until:
                break
        raise ConnectionError(
            f"no node of the cluster answers ({', '.join(tried)}): {last}"
        ) from last

    def _forget(self, kept: set[Address]) -> None:
        """Close the clients of nodes that left the cluster."""
        with self._lock:
            gone = [self._nodes.pop(address) for address in [*self._nodes] if address not in kept]
        for address in [*self._fell]:
            if address not in kept:
                self._fell.pop(address, None)
        for node in gone:
            node.close()


class _Pipe(Pipeline):
    """Commands kept until `execute`, then sent to the nodes that they belong to. Thread rule: one thread."""

    def __init__(self, cluster: RedisCluster, transaction: bool) -> None:
        super().__init__(cluster.connection_pool, cluster.response_callbacks, transaction, None)
        self._cluster = cluster
        self._at_once = transaction
        self._queued: list[_Queued] = []

    def __len__(self) -> int:
        return len(self._queued)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Keep a command for later."""
        if slot_of(args) is None:
            raise ResponseError(
                f"{args[0]} names no key: it has no place in a pipeline to a cluster"
            )
        self._queued.append((args, options))
        return self

    def reset(self) -> None:  # type: ignore[override]
        """Forget what was kept."""
        self._queued = []

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """All answers, in the order of the commands.

        raise_on_error: raise the first error among them; else an error stands where the answer would
        """
        queued, self._queued = self._queued, []
        if not queued:
            return []
        slots = [slot_of(args) or 0 for args, _ in queued]
        if self._at_once:
            if len({*slots}) > 1:
                raise ResponseError("a transaction of a cluster takes keys of one slot tag")
            return self._cluster.on_slot(
                slots[0], lambda node: _send(node, queued, transaction=True)
            )
        answers: list[Any] = [None] * len(queued)
        for slot, places in self._by_node(slots):
            mine = [queued[at] for at in places]
            for at, answer in zip(places, self._sent(slot, mine), strict=True):
                answers[at] = answer
        for at, (args, options) in enumerate(queued):
            if isinstance(answers[at], _REDIRECTED):
                try:
                    answers[at] = self._cluster.execute_command(*args, **options)
                except RedisError as error:
                    answers[at] = error
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        if raise_on_error and errors:
            raise errors[0]
        return answers

    def _by_node(self, slots: Sequence[int]) -> list[tuple[int, list[int]]]:
        """For each node: one hash slot of it, and the places of the commands that it gets."""
        owners, found = self._cluster.map().owners, dict[Address | None, tuple[int, list[int]]]()
        for at, slot in enumerate(slots):
            found.setdefault(owners[slot], (slot, []))[1].append(at)
        return list(found.values())

    def _sent(self, slot: int, mine: list[_Queued]) -> list[Any]:
        """One node's answers. A slot that moved away meanwhile is answered by a redirection."""
        try:
            return self._cluster.on_slot(slot, lambda node: _send(node, mine))
        except RedisError as error:
            return [error] * len(mine)


def _run(node: redis.Redis, *args: Any, **options: Any) -> Any:
    return node.execute_command(*args, **options)  # type: ignore[no-untyped-call]


def _send(node: redis.Redis, queued: Sequence[_Queued], *, transaction: bool = False) -> list[Any]:
    """Send commands to one node. An error among the answers stays one of them, but in a transaction."""
    with node.pipeline(transaction=transaction) as pipe:
        for args, options in queued:
            _run(pipe, *args, **options)
        return pipe.execute(raise_on_error=transaction)
