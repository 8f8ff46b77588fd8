"""What the services of a worker answer from: a whole index, or one shard of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from typing_extensions import override

from eddyline.errors import EddylineError
from index.port import Index
from serving.answer.click_waits import ClickWaits
from serving.answer.deadline import Deadline
from serving.answer.retriever import Query, Retriever
from serving.proto import retrieval_pb2 as pb
from serving.rpc import converters
from serving.sharding import ShardAssignment
from serving.worker.log_watch import LogWatch
from serving.worker.publish_barrier import PublishBarrier
from serving.worker.replica import Replica


class NoShardAnswers(EddylineError):
    """No shard answered; the message gives the reason of each."""


class HoldsOneShard(EddylineError):
    """This worker holds one shard of the items; its coordinator answers users."""


class RetrievalBackend(Protocol):
    """What a service answers from. Thread rule: any thread."""

    @property
    def waits(self) -> ClickWaits | None:
        """Where queries wait for a click; None if none does."""
        return None

    def retrieve(self, query: Query, deadline: Deadline, received_us: int) -> pb.RetrieveResponse:
        """The answer.

        Raises BadQuery, DeadlinePassed, NoShardAnswers, HoldsOneShard, ClickPending.
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


def fill_retriever_stats(response: pb.StatsResponse, retriever: Retriever) -> None:
    """Fill in the popular list's state, and what the retriever lacks."""
    response.popular.items = len(retriever.popularity.ranked)
    response.popular.age_ms = retriever.popularity.age_ms()
    response.missing.extend(retriever.missing())


@dataclass(frozen=True, slots=True)
class WorkerBackend(RetrievalBackend):
    """Answers from all items."""

    held: LocalIndex
    retriever: Retriever

    @property
    @override
    def waits(self) -> ClickWaits | None:
        return self.retriever.waits

    @override
    def retrieve(self, query: Query, deadline: Deadline, received_us: int) -> pb.RetrieveResponse:
        held = self.held
        converters.check_ranges(query.filters, held.index)
        answer = self.retriever.retrieve(query, held.index, deadline, received_us)
        behind = held.missing()
        return converters.response_of(answer, held.generation, held.index, behind)

    @override
    def fill_stats(self, response: pb.StatsResponse) -> None:
        response.shards = 1
        fill_retriever_stats(response, self.retriever)
        self.held.fill_index_stats(response)


@dataclass(frozen=True, slots=True)
class ShardBackend(RetrievalBackend):
    """Holds one shard; the coordinator answers users."""

    held: LocalIndex
    assignment: ShardAssignment

    @override
    def retrieve(self, query: Query, deadline: Deadline, received_us: int) -> pb.RetrieveResponse:
        name = self.assignment.name
        raise HoldsOneShard(f"this worker holds {name} only; ask the coordinator of the shards")

    @override
    def fill_stats(self, response: pb.StatsResponse) -> None:
        response.shard, response.shards = self.assignment
        response.popular.age_ms = -1
        self.held.fill_index_stats(response)
