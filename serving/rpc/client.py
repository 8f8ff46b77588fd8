"""A small typed client of the query worker.

with Client("127.0.0.1:50051") as client:
    for item in client.retrieve("ana", 10).items:
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc

from eddyline.errors import EddylineError
from serving.proto import retrieval_pb2 as pb
from serving.proto import retrieval_pb2_grpc

# 1,000 items with cards are about 200 kB.
RESPONSE_BYTES_MAX = 64 * 1024 * 1024


class CallFailed(EddylineError):
    """A call got no answer.

    code: gRPC's name of the status ("INVALID_ARGUMENT", …); detail: one sentence
    """

    def __init__(self, address: str, code: str, detail: str) -> None:
        """`str()` is `worker at address: CODE: detail`."""
        super().__init__(f"worker at {address}: {code}: {detail}")
        self.code = code
        self.detail = detail


def open_channel(address: str, more: Sequence[tuple[str, int]] = ()) -> grpc.Channel:
    """A channel to `host:port`; it connects at the first call, and again after a loss."""
    options = [
        ("grpc.max_receive_message_length", RESPONSE_BYTES_MAX),
        # The client reconnects to a restarted worker within a second.
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Addresses are internal: never through a proxy of the environment.
        ("grpc.enable_http_proxy", 0),
    ]
    return grpc.insecure_channel(address, options=[*options, *more])


class Client:
    """A connection to one worker; see `open_channel`.

    Thread rule: any thread. Every call has a deadline.
    """

    def __init__(self, address: str) -> None:
        """address: `host:port`."""
        self.address = address
        self._channel = open_channel(address)
        self._stub = retrieval_pb2_grpc.RetrievalStub(self._channel)  # type: ignore[no-untyped-call]

    def retrieve(
        self,
        user_id: str,
        k: int,
        *,
        after: tuple[int, int] | None = None,
        wait_ms: int = 0,
        with_cards: bool = False,
        filters: pb.Filters | None = None,
        popularity_beta: float | None = None,
        session: Iterable[str | tuple[str, str]] = (),
        scene: str = "",
        arm: str = "",
        limits: Mapping[str, int] | None = None,
        diversity: float | None = None,
        cursor: str | None = None,
        timeout_s: float = 5.0,
    ) -> pb.RetrieveResponse:
        """The answer. Raises CallFailed.

        user_id:   "" for a guest, who has a session
        after:     (partition, offset) of a click that the answer should include
        wait_ms:   how long to wait for that click
        filters:   every item of the answer passes them
        popularity_beta: strength of the popularity correction; None: the worker's setting
        session:   items of this visit, newest first, or (item, kind); they are not stored
        scene, arm: labels for the record of the answer, see retrieval.proto
        limits:    attribute -> most items of each of its values; None: the worker's setting
        diversity: 0 … 1; None: the worker's setting
        cursor:    "" for the first page, then `next_cursor` of the page before; None: no pages
        timeout_s: the deadline of the call
        """
        request = pb.RetrieveRequest(
            user_id=user_id,
            k=k,
            with_cards=with_cards,
            filters=filters,
            popularity_beta=popularity_beta,
            session=_session(session),
            scene=scene,
            arm=arm,
            limits=_limits(limits),
            diversity=diversity,
            cursor=cursor,
        )
        if after is not None:
            request.after.CopyFrom(pb.After(partition=after[0], offset=after[1], wait_ms=wait_ms))
        response: pb.RetrieveResponse = self._call(self._stub.Retrieve, request, timeout_s)
        return response

    def retrieve_batch(
        self, requests: Sequence[pb.RetrieveRequest], *, timeout_s: float = 5.0
    ) -> pb.RetrieveBatchResponse:
        """The answers to several requests, each with a status. Raises CallFailed."""
        request = pb.RetrieveBatchRequest(requests=requests)
        response: pb.RetrieveBatchResponse = self._call(
            self._stub.RetrieveBatch, request, timeout_s
        )
        return response

    def similar_items(
        self,
        item_ids: Sequence[str],
        k: int,
        *,
        with_cards: bool = False,
        filters: pb.Filters | None = None,
        timeout_s: float = 5.0,
    ) -> pb.RetrieveResponse:
        """The items nearest to these, which are not among them. Raises CallFailed."""
        request = pb.SimilarItemsRequest(
            item_ids=item_ids, k=k, with_cards=with_cards, filters=filters
        )
        response: pb.RetrieveResponse = self._call(self._stub.SimilarItems, request, timeout_s)
        return response

    def search_by_vector(
        self,
        vector: Iterable[float],
        generation: str,
        k: int,
        *,
        with_cards: bool = False,
        filters: pb.Filters | None = None,
        timeout_s: float = 5.0,
    ) -> pb.RetrieveResponse:
        """The items nearest to a vector of this generation's space. Raises CallFailed."""
        request = pb.SearchByVectorRequest(
            vector=vector, generation=generation, k=k, with_cards=with_cards, filters=filters
        )
        response: pb.RetrieveResponse = self._call(self._stub.SearchByVector, request, timeout_s)
        return response

    def explain(
        self,
        user_id: str,
        item_ids: Sequence[str],
        k: int,
        *,
        filters: pb.Filters | None = None,
        popularity_beta: float | None = None,
        session: Iterable[str | tuple[str, str]] = (),
        scene: str = "",
        limits: Mapping[str, int] | None = None,
        diversity: float | None = None,
        cursor: str | None = None,
        impression_id: str = "",
        timeout_s: float = 5.0,
    ) -> pb.ExplainResponse:
        """Why items are, or are not, in the answer of `retrieve`. Raises CallFailed.

        impression_id: of that answer; without it, an answer without quotas is explained
        """
        query = pb.RetrieveRequest(
            user_id=user_id,
            k=k,
            filters=filters,
            popularity_beta=popularity_beta,
            session=_session(session),
            scene=scene,
            limits=_limits(limits),
            diversity=diversity,
            cursor=cursor,
        )
        request = pb.ExplainRequest(request=query, item_ids=item_ids, impression_id=impression_id)
        response: pb.ExplainResponse = self._call(self._stub.Explain, request, timeout_s)
        return response

    def stats(self, *, timeout_s: float = 5.0) -> pb.StatsResponse:
        """What the worker holds, and its progress. Raises CallFailed."""
        response: pb.StatsResponse = self._call(self._stub.Stats, pb.StatsRequest(), timeout_s)
        return response

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, method: Callable[..., Any], request: Any, timeout_s: float) -> Any:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._failed(error, timeout_s) from None

    def _failed(self, error: grpc.RpcError, timeout_s: float) -> CallFailed:
        code, detail = error.code().name, error.details() or ""
        if code == "DEADLINE_EXCEEDED" and "deadline passed" not in detail:
            detail = f"the deadline of {timeout_s * 1000:.0f} ms passed before an answer came"
        if code == "RESOURCE_EXHAUSTED" and "Concurrent" in detail:
            detail = "too many calls wait already; try again, or start another worker"
        return CallFailed(self.address, code, detail)


def _session(events: Iterable[str | tuple[str, str]]) -> list[pb.SessionEvent]:
    pairs = ((one, "") if isinstance(one, str) else one for one in events)
    return [pb.SessionEvent(item_id=item, kind=kind) for item, kind in pairs]


def _limits(limits: Mapping[str, int] | None) -> list[pb.AttributeLimit]:
    pairs = (limits or {}).items()
    return [pb.AttributeLimit(attribute=name, most=most) for name, most in pairs]


def is_ready(address: str) -> bool:
    """Whether the worker there answers queries; of a coordinator, whether all its shards answer."""
    try:
        with Client(address) as client:
            stats = client.stats(timeout_s=0.5)
    except CallFailed:
        return False
    return stats.ready and all(shard.answers for shard in stats.held)
