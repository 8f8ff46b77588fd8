"""Answers from all shards: the same `Retriever` as in a worker, over a `ScatterGather`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from typing_extensions import override

from serving.answer.click_waits import ClickWaits
from serving.answer.deadline import Deadline
from serving.answer.impressions import Impressions
from serving.answer.retriever import (
    Answer,
    ItemsNotLive,
    KnownUsers,
    NearestQuery,
    Query,
    Retriever,
)
from serving.coordinator.scatter_gather import ScatterGather, StaleVectors
from serving.coordinator.shards import Connection, Shards
from serving.coordinator.vector_cache import VectorCache
from serving.proto import retrieval_pb2 as pb
from serving.rpc import converters, filter_messages
from serving.rpc.backends import (
    NoShardAnswers,
    RetrievalBackend,
    check_generation,
    fill_retriever_stats,
    no_impressions,
)
from serving.rpc.explanations import explanation_of
from serving.worker.log_watch import LogWatch

T = TypeVar("T")
# An error message names this many shards.
NAMED_MAX = 4
_SUMS = (
    "live tombstones main fresh stale rows applied ignored rejected "
    "rebuilds rebuilds_failed refused main_bytes"
).split()


@dataclass(frozen=True, slots=True)
class CoordinatorBackend(RetrievalBackend):
    """Answers from all shards. Thread rule: any thread.

    The coordinator reads the user and makes the query vector; the shards see that vector alone.
    text_names: attributes whose texts filters may name
    """

    generation: str
    dimension: int
    shards: Shards
    retriever: Retriever
    watch: LogWatch | None = None
    text_names: frozenset[str] = frozenset()
    vectors: VectorCache = field(default_factory=VectorCache)
    impressions: Impressions = field(default_factory=no_impressions)

    @property
    @override
    def waits(self) -> ClickWaits | None:
        return self.retriever.waits

    @override
    def read_users(self, user_ids: Iterable[str]) -> KnownUsers:
        return self.retriever.read_users(user_ids)

    @override
    def retrieve(
        self, query: Query, deadline: Deadline, received_us: int, users: KnownUsers | None = None
    ) -> pb.RetrieveResponse:
        filter_messages.check_texts(query.filters, self.text_names)
        impression_id = self.impressions.next_id()
        return self._answer(
            query,
            deadline,
            lambda items: self.retriever.retrieve(
                query, items, deadline, received_us, users, impression_id
            ),
            impression_id,
        )

    @override
    def nearest(
        self, query: NearestQuery, deadline: Deadline, received_us: int
    ) -> pb.RetrieveResponse:
        check_generation(query, self.generation)
        filter_messages.check_texts(query.filters, self.text_names)

        def ask(items: ScatterGather) -> Answer:
            try:
                return self.retriever.nearest(query, items, deadline, received_us)
            except ItemsNotLive as error:
                if missing := self._check_answered(items):
                    named = "; ".join(missing[:NAMED_MAX])
                    where = f"or in a shard without answer: {named}"
                    raise NoShardAnswers(f"{error}, {where}") from None
                raise

        return self._answer(query, deadline, ask)

    @override
    def explain(
        self,
        query: Query,
        item_ids: Sequence[str],
        deadline: Deadline,
        most: int,
        impression_id: str = "",
    ) -> pb.ExplainResponse:
        filter_messages.check_texts(query.filters, self.text_names)
        (found, state), items, missing = self._read(
            deadline,
            lambda items: self.retriever.explain(
                query, item_ids, items, deadline, most, impression_id
            ),
        )
        behind = self._behind(items)
        response = explanation_of(found, state, self.generation, items, behind)
        response.shards.CopyFrom(items.status())
        response.missing.extend(missing)
        return response

    def _answer(
        self,
        query: Query | NearestQuery,
        deadline: Deadline,
        ask: Callable[[ScatterGather], Answer],
        impression_id: str = "",
    ) -> pb.RetrieveResponse:
        answer, items, missing = self._read(deadline, ask)
        response = converters.response_of(answer, self.generation, items, self._behind(items))
        response.shards.CopyFrom(items.status())
        response.missing.extend(missing)
        response.impression_id = self.impressions.record(
            query, answer, self.generation, response.missing, impression_id
        )
        return response

    def _read(
        self, deadline: Deadline, ask: Callable[[ScatterGather], T]
    ) -> tuple[T, ScatterGather, list[str]]:
        """(what `ask` makes of the items of all shards, those items, the shards that are missing).

        Raises NoShardAnswers, and what `ask` raises.
        """
        items = ScatterGather(self.shards, self.dimension, deadline, self.vectors)
        try:
            found = ask(items)
        except StaleVectors:  # rare: an item of the query changed since it was cached
            items = ScatterGather(self.shards, self.dimension, deadline, self.vectors, fresh=True)
            found = ask(items)
        return found, items, self._check_answered(items)

    def _behind(self, items: ScatterGather) -> str:
        return "; ".join(why for why in (items.behind(), self._remade()) if why)

    def _check_answered(self, items: ScatterGather) -> list[str]:
        """The shards that are missing. Raises NoShardAnswers if all are."""
        status = items.status()
        missing = [
            f"shard {m.shard} at {m.address}: {m.reason}: {m.detail}" for m in status.missing
        ]
        if status.asked and not status.answered:
            more = f"; and {len(missing) - NAMED_MAX} more" if len(missing) > NAMED_MAX else ""
            raise NoShardAnswers(f"no shard answers: {'; '.join(missing[:NAMED_MAX])}{more}")
        return missing

    @override
    def fill_stats(self, response: pb.StatsResponse) -> None:
        """Sums over the shards that answer; the tail is that of the shard furthest behind."""
        answering = [shard for shard in self.shards.all if shard.failure is None]
        response.ready = bool(answering)
        response.generation = self.generation
        response.shards = 1
        response.held.extend(_status_of(shard) for shard in self.shards.all)
        fill_retriever_stats(response, self.retriever)
        if remade := self._remade():
            response.missing.append(f"kafka: {remade}")
        for shard in self.shards.all:
            failure = shard.failure
            reasons = [f"{failure.reason}: {failure.detail}"] if failure else shard.last.missing
            response.missing.extend(
                f"shard {shard.number} at {shard.address}: {reason}" for reason in reasons
            )
        if answering:
            _sum_up(response, [shard.last for shard in answering])

    def _remade(self) -> str:
        return self.watch.missing() if self.watch is not None else ""


def _status_of(shard: Connection) -> pb.ShardStatus:
    failure, last = shard.failure, shard.last
    return pb.ShardStatus(
        shard=shard.number,
        address=shard.address,
        answers=failure is None,
        generation=last.generation,
        reason=failure.reason if failure else "",
        detail=failure.detail if failure else "",
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
    estimates = [size.recall for size in sizes if size.HasField("recall")]
    if estimates:  # the worst one; those without samples come last
        worst = min(estimates, key=lambda recall: (not recall.samples, recall.estimate))
        response.index.recall.CopyFrom(worst)
    slowest = max(parts, key=lambda part: (not part.tail.caught_up, part.tail.lag_records))
    response.tail.CopyFrom(slowest.tail)
    marks = [{mark.partition: mark for mark in part.watermarks} for part in parts]
    for partition in sorted(set.intersection(*map(set, marks))):
        response.watermarks.append(
            min((known[partition] for known in marks), key=lambda mark: mark.offset)
        )
