"""Answers from all shards: the worker's own retrieval, over what the shards hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from eddyline.stores.state_store import StateStore
from serving.answer.deadline import Deadline
from serving.answer.retriever import Query, Retriever
from serving.answer.user_reader import UserReader
from serving.coordinator.scatter_gather import ScatterGather, StaleShard
from serving.coordinator.shards import Connection, Shards
from serving.coordinator.vector_cache import VectorCache
from serving.proto import retrieval_pb2 as pb
from serving.recall.popular import PopularPath
from serving.recall.towers import TowersPath
from serving.rpc import converters
from serving.rpc.backends import NoShardAnswers

# So many shards are named in an error's sentence.
NAMED_MAX = 4
_SUMS = (
    "live",
    "tombstones",
    "main",
    "fresh",
    "stale",
    "rows",
    "applied",
    "ignored",
    "rejected",
    "rebuilds",
    "rebuilds_failed",
    "refused",
    "main_bytes",
)


@dataclass(frozen=True, slots=True)
class CoordinatorBackend:
    """What a coordinator answers from; see `serving.rpc.retrieval_service.RetrievalBackend`. Thread rule: any thread.

    The user is read once, and one query vector is made, here; the shards see that vector alone.
    """

    generation: str
    dimension: int
    shards: Shards
    store: StateStore
    users: UserReader
    towers: TowersPath
    popular: PopularPath
    item_slots: int
    remembered: VectorCache = field(default_factory=VectorCache)

    def retrieve(self, query: Query, deadline: Deadline, received_us: int) -> pb.RetrieveResponse:
        """See `RetrievalBackend`; an answer without some shards says which and why."""
        try:
            items = ScatterGather(self.shards, self.dimension, deadline, self.remembered)
            answer = self._retriever(items).retrieve(query, deadline, received_us)
        except (
            StaleShard
        ):  # seldom: an item of the user's list has changed since anyone last used it
            items = ScatterGather(
                self.shards, self.dimension, deadline, self.remembered, fresh=True
            )
            answer = self._retriever(items).retrieve(query, deadline, received_us)
        status = items.status()
        missing = [
            f"shard {m.shard} at {m.address}: {m.reason}: {m.detail}" for m in status.missing
        ]
        if status.asked and not status.answered:
            more = f"; and {len(missing) - NAMED_MAX} more" if len(missing) > NAMED_MAX else ""
            raise NoShardAnswers(f"no shard answers: {'; '.join(missing[:NAMED_MAX])}{more}")
        response = converters.response_of(answer, self.generation, items)
        response.shards.CopyFrom(status)
        response.missing.extend(missing)
        return response

    def _retriever(self, items: ScatterGather) -> Retriever:
        return Retriever(
            store=self.store,
            index=items,
            users=self.users,
            by_towers=self.towers,
            by_popularity=self.popular,
            item_slots=self.item_slots,
            index_missing=items.behind,
        )

    def tell(self, response: pb.StatsResponse) -> None:
        """See `RetrievalBackend`: sums over the shards that answer, the tail of the one that is furthest behind."""
        shards = [shard for shard in self.shards.all if shard.why is None]
        response.ready = bool(shards)
        response.generation = self.generation
        response.shards = 1
        response.held.extend(_status_of(shard) for shard in self.shards.all)
        response.popular.items = self.popular.size()
        response.popular.age_ms = self.popular.age_ms()
        for server in (self.users.missing(), self.popular.missing()):
            if server:
                response.missing.append(f"redis: {server}")
        for shard in self.shards.all:
            why = shard.why
            told = [f"{why.reason}: {why.detail}"] if why else list(shard.last.missing)
            response.missing.extend(
                f"shard {shard.number} at {shard.address}: {what}" for what in told
            )
        if shards:
            _sum_up(response, [shard.last for shard in shards])


def _status_of(shard: Connection) -> pb.ShardStatus:
    why, last = shard.why, shard.last
    return pb.ShardStatus(
        shard=shard.number,
        address=shard.address,
        answers=why is None,
        generation=last.generation,
        reason=why.reason if why else "",
        detail=why.detail if why else "",
        live=last.index.live,
        lag_records=last.tail.lag_records,
        misses=shard.misses,
    )


def _sum_up(response: pb.StatsResponse, parts: list[pb.StatsResponse]) -> None:
    sizes = [part.index for part in parts]
    for name in _SUMS:
        setattr(response.index, name, sum(getattr(size, name) for size in sizes))
    response.index.dimension = sizes[0].dimension
    response.index.main_name = sizes[0].main_name
    response.index.breadth = max(size.breadth for size in sizes)
    response.index.rebuilding = any(size.rebuilding for size in sizes)
    response.index.rebuild_s = max(size.rebuild_s for size in sizes)
    response.index.rebuild_error = next(
        (size.rebuild_error for size in sizes if size.rebuild_error), ""
    )
    watched = [size.recall for size in sizes if size.HasField("recall")]
    if watched:  # the worst one, those that know nothing yet last
        worst = min(watched, key=lambda recall: (not recall.samples, recall.estimate))
        response.index.recall.CopyFrom(worst)
    slowest = max(parts, key=lambda part: (not part.tail.caught_up, part.tail.lag_records))
    response.tail.CopyFrom(slowest.tail)
    marks = [{mark.partition: mark for mark in part.watermarks} for part in parts]
    for partition in sorted(set.intersection(*map(set, marks))):
        response.watermarks.append(
            min((known[partition] for known in marks), key=lambda mark: mark.offset)
        )
