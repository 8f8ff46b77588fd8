"""What a service answers from: a whole index, or one shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from eddyline.errors import EddylineError
from index.port import Index
from serving.answer.deadline import Deadline
from serving.answer.retriever import Query, Retriever
from serving.proto import retrieval_pb2 as pb
from serving.recall.popular import PopularPath
from serving.rpc import converters
from serving.sharding import ShardAssignment
from serving.worker.replica import TailState


class NoShardAnswers(EddylineError):
    """No shard answered; the message says why, shard by shard."""


class HoldsOneShard(EddylineError):
    """This worker holds one shard of the items; answers come from its coordinator."""


class RetrievalBackend(Protocol):
    """What a service answers from. Thread rule: any thread."""

    def retrieve(self, query: Query, deadline: Deadline, received_us: int) -> pb.RetrieveResponse:
        """The answer. Raises DeadlinePassed, NoShardAnswers, HoldsOneShard."""

    def tell(self, response: pb.StatsResponse) -> None:
        """Fill in what it holds and how far it has come."""


@dataclass(frozen=True, slots=True)
class WorkerBackend:
    """All that a worker answers from; handed over once it can."""

    generation: str
    retriever: Retriever
    index: Index
    popular: PopularPath
    tail: Callable[[], TailState]

    def retrieve(self, query: Query, deadline: Deadline, received_us: int) -> pb.RetrieveResponse:
        """See `RetrievalBackend`."""
        answer = self.retriever.retrieve(query, deadline, received_us)
        return converters.response_of(answer, self.generation, self.index)

    def tell(self, response: pb.StatsResponse) -> None:
        """See `RetrievalBackend`."""
        _fill_index_stats(response, self.generation, self.index, self.tail())
        response.shards = 1
        response.popular.items = self.popular.size()
        response.popular.age_ms = self.popular.age_ms()
        response.missing.extend(self.retriever.missing())


@dataclass(frozen=True, slots=True)
class ShardBackend:
    """What a worker of one shard has; answers to users are its coordinator's business.

    behind: why the index may lag behind Kafka, "" where it does not
    """

    generation: str
    share: ShardAssignment
    index: Index
    tail: Callable[[], TailState]
    behind: Callable[[], str]

    def retrieve(self, query: Query, deadline: Deadline, received_us: int) -> pb.RetrieveResponse:
        """See `RetrievalBackend`; never answers."""
        raise HoldsOneShard(
            f"this worker holds {self.share.name} only; ask the coordinator of the shards"
        )

    def tell(self, response: pb.StatsResponse) -> None:
        """See `RetrievalBackend`."""
        _fill_index_stats(response, self.generation, self.index, self.tail())
        response.shard, response.shards = self.share
        response.popular.age_ms = -1
        if self.behind():
            response.missing.append(f"kafka: {self.behind()}")


def _fill_index_stats(
    response: pb.StatsResponse, generation: str, index: Index, tail: TailState
) -> None:
    response.generation = generation
    response.index.CopyFrom(converters.sizes_of(index.stats(), index.dimension))
    response.watermarks.extend(converters.watermarks_of(index))
    response.tail.CopyFrom(converters.tail_of(tail))
