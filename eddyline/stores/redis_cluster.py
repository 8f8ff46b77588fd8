"""A client of Redis Cluster: redis-py's commands, each sent to the node that serves its key.

It connects at the first command. A command takes at most two time-outs when a node hangs: one to
read the slot map, one for itself. Why redis-py's own `RedisCluster` does not do:
docs/adr/0015-redis-cluster-client.md.
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
# A queued command: arguments and options.
_Queued = tuple[tuple[Any, ...], dict[str, Any]]
# A moving slot gives one redirection, or two if it moves on at once; more means the nodes disagree.
_TRIES = 5
_REDIRECTED = (AskError, TryAgainError)


class RedisCluster(redis.Redis):
    """All nodes of one cluster. Thread rule: any thread.

    A command without a key goes to any node. `pipeline(transaction=True)` takes keys of one slot
    tag; other pipelines are split by node. Raises redis-py's errors.
    """

    def __init__(
        self, seeds: Sequence[Address], make: Callable[[Address], redis.Redis], timeout_s: float
    ) -> None:
        """seeds:     the first nodes to read the slot map from
        make:      the client of a node, unconnected
        timeout_s: limit for the search of a node that answers, beyond the time-out of the first
                   node
        """
        self._seeds = tuple(seeds)
        self._make = make
        self._timeout_s = timeout_s
        self._nodes = {address: make(address) for address in self._seeds}
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._map: SlotMap | None = None
        self._stale = False
        self._failed_s: dict[Address, float] = {}
        self._failed: tuple[float, str] = (0.0, "")
        super().__init__(connection_pool=self._nodes[self._seeds[0]].connection_pool)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run one command on the node of its key."""
        slot = slot_of(args)
        if slot is None:
            return self._anywhere(lambda node: _run(node, *args, **options))

        def with_asking(node: redis.Redis) -> Any:
            with node.pipeline(transaction=False) as pipe:
                _run(pipe, "ASKING")
                _run(pipe, *args, **options)
                return pipe.execute()[1]

        return self.on_slot(slot, lambda node: _run(node, *args, **options), with_asking)

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        """A pipeline. transaction: MULTI/EXEC; all keys have one slot tag."""
        return _Pipe(self, transaction)

    def on_slot(
        self,
        slot: int,
        call: Callable[[redis.Redis], _T],
        with_asking: Callable[[redis.Redis], _T] | None = None,
    ) -> _T:
        """Call with the client of the node that serves the slot, following redirections.

        with_asking: the call for a node that is importing the slot; None if it cannot be split off
        """
        seen = self.map()
        if seen.owners[slot] is None:
            seen = self._refresh(seen)
        target = seen.owner(slot)
        retry = True
        for _ in range(_TRIES):
            try:
                return call(self.node(target))
            except MovedError as moved:
                target = address_of(moved.host, moved.port, target)
                seen = self._refresh(seen, first=target)
            except AskError as ask:
                if with_asking is None:
                    raise
                return with_asking(self.node(address_of(ask.host, ask.port, target)))
            except (AuthenticationError, AuthorizationError):
                raise
            except ConnectionError:
                self._failed_s[target] = time.monotonic()
                if not retry:
                    raise
                retry = False
                seen = self._refresh(seen)
                target = seen.owner(slot)
            except TimeoutError:
                self._failed_s[target] = time.monotonic()
                self._stale = True
                raise
            except (ClusterDownError, ReadOnlyError):
                self._stale = True
                raise
        raise ClusterError(f"hash slot {slot} was moved {_TRIES} times during one command")

    def map(self, *, fresh: bool = False) -> SlotMap:
        """The slot map; read at the first call, after an error, and if `fresh`."""
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

    def server_of(self, key: str) -> str:
        """`host:port` of the node that serves the key, by the last slot map; "" if unknown."""
        known = self._map
        owner = None if known is None else known.owners[slot_of(("GET", key)) or 0]
        return "" if owner is None else named(owner)

    def scan_iter(self, *args: Any, **options: Any) -> Iterator[Any]:
        """All keys of all primaries, as redis-py's `scan_iter`.

        Raises ConnectionError at the end if slots moved meanwhile: keys may be missing.
        """
        before = self.map(fresh=True)
        for address in before.primaries:
            yield from self.node(address).scan_iter(*args, **options)
        if self.map(fresh=True).owners != before.owners:
            raise ConnectionError("hash slots moved during a scan of all keys; do it again")

    def close(self) -> None:
        """Close all connections."""
        for node in list(getattr(self, "_nodes", {}).values()):
            node.close()

    def _anywhere(self, call: Callable[[redis.Redis], _T]) -> _T:
        for address in self.map().primaries:
            try:
                return call(self.node(address))
            except (AuthenticationError, AuthorizationError):
                raise
            except ConnectionError:
                self._failed_s[address] = time.monotonic()
        raise ConnectionError("no primary of the cluster answers")

    def _refresh(self, seen: SlotMap | None, first: Address | None = None) -> SlotMap:
        """Read the slot map, or take the one that another thread read meanwhile."""
        started_s = time.monotonic()
        with self._refreshing:
            if self._map is not None and self._map is not seen:
                return self._map
            if self._failed[0] > started_s:  # another thread tried all nodes while this one waited
                raise ConnectionError(self._failed[1])
            try:
                found = self._read_map(seen, first)
            except RedisError as error:
                self._failed = (time.monotonic(), str(error))
                raise
            self._map, self._stale = found, False
            self._forget({*self._seeds, *found.primaries, *found.replicas})
            return found

    def _read_map(self, seen: SlotMap | None, first: Address | None) -> SlotMap:
        """Read the map from the first node that answers; nodes that failed last come last."""
        known = (*seen.primaries, *seen.replicas) if seen else ()
        candidates = dict.fromkeys((*known, *self._seeds))
        order = sorted(candidates, key=lambda address: self._failed_s.get(address, 0.0))
        if first is not None:
            order = [first, *(address for address in order if address != first)]
        until, tried = time.monotonic() + self._timeout_s, list[str]()
        last: RedisError = ConnectionError("no node was tried")
        for address in order:
            tried.append(named(address))
            try:
                # As two arguments: then redis-py leaves the answer raw.
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
                self._failed_s[address], last = time.monotonic(), error
            if time.monotonic() > until:
                break
        raise ConnectionError(
            f"no node of the cluster answers ({', '.join(tried)}): {last}"
        ) from last

    def _forget(self, kept: set[Address]) -> None:
        """Close the clients of nodes that left the cluster."""
        with self._lock:
            gone = [self._nodes.pop(address) for address in [*self._nodes] if address not in kept]
        for address in [*self._failed_s]:
            if address not in kept:
                self._failed_s.pop(address, None)
        for node in gone:
            node.close()


class _Pipe(Pipeline):
    """Queues commands until `execute`, then sends them to their nodes. Thread rule: one thread."""

    def __init__(self, cluster: RedisCluster, transaction: bool) -> None:
        super().__init__(cluster.connection_pool, cluster.response_callbacks, transaction, None)
        self._cluster = cluster
        self._transaction = transaction
        self._queued: list[_Queued] = []

    def __len__(self) -> int:
        return len(self._queued)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Queue a command."""
        if slot_of(args) is None:
            raise ResponseError(f"{args[0]} names no key: a pipeline of a cluster cannot route it")
        self._queued.append((args, options))
        return self

    def reset(self) -> None:  # type: ignore[override]
        """Drop the queued commands."""
        self._queued = []

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """All answers, in the order of the commands.

        raise_on_error: raise the first error; if False, an error is in the place of its answer
        """
        queued, self._queued = self._queued, []
        if not queued:
            return []
        slots = [slot_of(args) or 0 for args, _ in queued]
        if self._transaction:
            if len({*slots}) > 1:
                raise ResponseError("a transaction of a cluster takes keys of one slot tag")
            return self._cluster.on_slot(
                slots[0], lambda node: _send(node, queued, transaction=True)
            )
        answers: list[Any] = [None] * len(queued)
        for slot, places in self._by_node(slots):
            mine = [queued[at] for at in places]
            for at, answer in zip(places, self._answers(slot, mine), strict=True):
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
        """For each node: one of its hash slots, and the positions of its commands."""
        owners, found = self._cluster.map().owners, dict[Address | None, tuple[int, list[int]]]()
        for at, slot in enumerate(slots):
            found.setdefault(owners[slot], (slot, []))[1].append(at)
        return list(found.values())

    def _answers(self, slot: int, mine: list[_Queued]) -> list[Any]:
        """Answers of one node; errors, redirections included, are in the place of an answer."""
        try:
            return self._cluster.on_slot(slot, lambda node: _send(node, mine))
        except RedisError as error:
            return [error] * len(mine)


def _run(node: redis.Redis, *args: Any, **options: Any) -> Any:
    return node.execute_command(*args, **options)  # type: ignore[no-untyped-call]


def _send(node: redis.Redis, queued: Sequence[_Queued], *, transaction: bool = False) -> list[Any]:
    """Send commands to one node. Errors are returned in place; a transaction raises them."""
    with node.pipeline(transaction=transaction) as pipe:
        for args, options in queued:
            _run(pipe, *args, **options)
        return pipe.execute(raise_on_error=transaction)
