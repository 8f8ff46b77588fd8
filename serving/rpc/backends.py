"""What the services of a worker answer from: a whole index, or one shard of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from typing_extensions import override

from eddyline.errors import EddylineError
from eddyline.schema.events import quote
from index.filters import Filter
from index.port import Index
from serving.answer.click_waits import ClickWaits
from serving.answer.deadline import Deadline
from serving.answer.impressions import Impressions
from serving.answer.retriever import Answer, KnownUsers, NearestQuery, Query, Retriever
from serving.proto import retrieval_pb2 as pb
from serving.rpc import converters, filter_messages
from serving.rpc.explanations import explanation_of
from serving.sharding import ShardAssignment
from serving.worker.log_watch import LogWatch
from serving.worker.publish_barrier import PublishBarrier
from serving.worker.replica import Replica


class NoShardAnswers(EddylineError):
    """No shard answered; the message gives the reason of each."""


class HoldsOneShard(EddylineError):
    """This worker holds one shard of the items; its coordinator answers users."""


class OtherGeneration(EddylineError):
    """A vector of another generation than the one that is served."""


class RetrievalBackend(Protocol):
    """What a service answers from. Thread rule: any thread."""

    @property
    def waits(self) -> ClickWaits | None:
        """Where queries wait for a click; None if none does."""
        return None

    def read_users(self, user_ids: Iterable[str]) -> KnownUsers:
        """The users of several queries; see `Retriever.read_users`. Raises HoldsOneShard."""

    def retrieve(
        self, query: Query, deadline: Deadline, received_us: int, users: KnownUsers | None = None
    ) -> pb.RetrieveResponse:
        """The answer. users: see `Retriever.retrieve`.

        Raises BadQuery, DeadlinePassed, NoShardAnswers, HoldsOneShard, ClickPending.
        """

    def nearest(
        self, query: NearestQuery, deadline: Deadline, received_us: int
    ) -> pb.RetrieveResponse:
        """The items nearest to some items or to a vector.

        Raises BadQuery, DeadlinePassed, NoShardAnswers, HoldsOneShard, ItemsNotLive,
        OtherGeneration, VectorRejected.
        """

    def explain(
        self,
        query: Query,
        item_ids: Sequence[str],
        deadline: Deadline,
        most: int,
        impression_id: str = "",
    ) -> pb.ExplainResponse:
        """Why items are, or are not, in the answer; see `Retriever.explain`.

        Raises BadQuery, DeadlinePassed, NoShardAnswers, HoldsOneShard.
        """

    def fill_stats(self, response: pb.StatsResponse) -> None:
        """Fill in what the backend holds and how far it has come."""


@dataclass(frozen=True, slots=True)
class LocalIndex:
    """One generation's index in this process and the replica that feeds it."""

    generation: str
    index: Index
    replica: Replica
    barrier: PublishBarrier | None = None
    watch: LogWatch | None = None

    def check_filters(self, filters: Filter | None) -> None:
        """Raise BadQuery if a filter names an attribute that the index does not know."""
        filter_messages.check_texts(filters, self.index.text_names())
        filter_messages.check_ranges(filters, self.index)

    def missing(self) -> str:
        """Why the index may lack changes of items; "" if it has all."""
        published = self.barrier.missing() if self.barrier else ""
        remade = self.watch.missing() if self.watch else ""
        return "; ".join(why for why in (self.replica.missing(), published, remade) if why)

    def fill_index_stats(self, response: pb.StatsResponse) -> None:
        """Fill in sizes, watermarks and the replica's state."""
        response.generation = self.generation
        response.index.CopyFrom(converters.sizes_of(self.index.stats(), self.index.dimension))
        response.watermarks.extend(converters.watermarks_of(self.index))
        response.tail.CopyFrom(converters.tail_of(self.replica.state()))
        if behind := self.missing():
            response.missing.append(f"kafka: {behind}")


def no_impressions() -> Impressions:
    """Gives every answer an id, and records none."""
    return Impressions(0.0)


def fill_retriever_stats(response: pb.StatsResponse, retriever: Retriever) -> None:
    """Fill in the popular list's state, and what the retriever lacks."""
    response.popular.items = len(retriever.popularity.ranked)
    response.popular.age_ms = retriever.popularity.age_ms()
    response.rules_version = retriever.rules.version
    response.rule_items.update(retriever.rules.counts())
    response.missing.extend(retriever.missing())


@dataclass(frozen=True, slots=True)
class WorkerBackend(RetrievalBackend):
    """Answers from all items."""

    held: LocalIndex
    retriever: Retriever
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
        held = self.held
        held.check_filters(query.filters)
        impression_id = self.impressions.next_id()
        answer = self.retriever.retrieve(
            query, held.index, deadline, received_us, users, impression_id
        )
        return self._response(query, answer, impression_id)

    @override
    def nearest(
        self, query: NearestQuery, deadline: Deadline, received_us: int
    ) -> pb.RetrieveResponse:
        held = self.held
        check_generation(query, held.generation)
        held.check_filters(query.filters)
        answer = self.retriever.nearest(query, held.index, deadline, received_us)
        return self._response(query, answer)

    @override
    def explain(
        self,
        query: Query,
        item_ids: Sequence[str],
        deadline: Deadline,
        most: int,
        impression_id: str = "",
    ) -> pb.ExplainResponse:
        held = self.held
        held.check_filters(query.filters)
        found, state = self.retriever.explain(
            query, item_ids, held.index, deadline, most, impression_id
        )
        return explanation_of(found, state, held.generation, held.index, held.missing())

    @override
    def fill_stats(self, response: pb.StatsResponse) -> None:
        response.shards = 1
        fill_retriever_stats(response, self.retriever)
        self.held.fill_index_stats(response)

    def _response(
        self, query: Query | NearestQuery, answer: Answer, impression_id: str = ""
    ) -> pb.RetrieveResponse:
        held = self.held
        response = converters.response_of(answer, held.generation, held.index, held.missing())
        response.impression_id = self.impressions.record(
            query, answer, held.generation, response.missing, impression_id
        )
        return response


@dataclass(frozen=True, slots=True)
class ShardBackend(RetrievalBackend):
    """Holds one shard; the coordinator answers users."""

    held: LocalIndex
    assignment: ShardAssignment

    @override
    def read_users(self, user_ids: Iterable[str]) -> KnownUsers:
        raise self._refusal()

    @override
    def retrieve(
        self, query: Query, deadline: Deadline, received_us: int, users: KnownUsers | None = None
    ) -> pb.RetrieveResponse:
        raise self._refusal()

    @override
    def nearest(
        self, query: NearestQuery, deadline: Deadline, received_us: int
    ) -> pb.RetrieveResponse:
        raise self._refusal()

    @override
    def explain(
        self,
        query: Query,
        item_ids: Sequence[str],
        deadline: Deadline,
        most: int,
        impression_id: str = "",
    ) -> pb.ExplainResponse:
        raise self._refusal()

    @override
    def fill_stats(self, response: pb.StatsResponse) -> None:
        response.shard, response.shards = self.assignment
        response.popular.age_ms = -1
        self.held.fill_index_stats(response)

    def _refusal(self) -> HoldsOneShard:
        name = self.assignment.name
        return HoldsOneShard(f"this worker holds {name} only; ask the coordinator of the shards")


def check_generation(query: NearestQuery, served: str) -> None:
    """Raise OtherGeneration if the query's vector is not of this generation."""
    if query.vector is not None and query.generation != served:
        raise OtherGeneration(
            f"generation: {quote(query.generation)}, this worker serves {quote(served)}; vectors "
            "of two generations cannot be compared"
        )
