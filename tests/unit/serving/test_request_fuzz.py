"""Any request to any call gets an answer or a reason that names the field; never INTERNAL."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.proto import retrieval_pb2 as pb
from serving.rpc.retrieval_service import RetrievalService
from serving.rules import cursor
from tests.unit.serving.test_retriever import SETTINGS, N, World

WORLD = World()
WORLD.user("ana", "i3", "i5")
WORLD.clicked({5: {"i2": 1000, "i7": 3000}})
SERVICE = RetrievalService(SETTINGS)
SERVICE.serve(WORLD.backend)
GOOD = cursor.encode(cursor.FIRST_PAGE, ["i1", "i9"], "ana", "g1", time.time())

texts = st.one_of(
    st.sampled_from(["", "ana", "i1", "i5", "categories", "tags", "g1", "click", " i1", "é", GOOD]),
    st.text(max_size=8),
    st.integers(250, 300).map("x".__mul__),
)
whole = st.one_of(
    st.sampled_from([-(2**31), -1, 0, 1, 2, N, 50, 51, 1_000, 1_001, 2**31 - 1]), st.integers(0, 9)
)
numbers = st.one_of(
    st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.1, 10.0, 1e300, float("nan"), float("inf")]),
    st.floats(width=32),
)


def messages(descriptor: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Fields of a message as its constructor takes them, each perhaps absent."""
    return st.fixed_dictionaries(
        {}, optional={field.name: values(field) for field in descriptor.fields}
    )


def values(field: Any) -> st.SearchStrategy[Any]:
    by_type: dict[int, Callable[[], st.SearchStrategy[Any]]] = {
        field.TYPE_MESSAGE: lambda: messages(field.message_type),
        field.TYPE_STRING: lambda: texts,
        field.TYPE_BOOL: st.booleans,
        field.TYPE_INT32: lambda: whole,
        field.TYPE_INT64: lambda: whole,
        field.TYPE_DOUBLE: lambda: numbers,
        field.TYPE_FLOAT: lambda: st.floats(width=32),
    }
    one = by_type[field.type]()
    repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == 3
    return st.lists(one, max_size=4) if repeated else one


class Context:
    """What the service uses of a call's context."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None
        self.detail = ""

    def time_remaining(self) -> float | None:
        return 5.0

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, detail: str) -> None:
        self.detail = detail

    def add_callback(self, call: Callable[[], None]) -> bool:
        return False  # the caller is gone: no call waits


def answered(request: Any) -> tuple[Any, Context]:
    context, sent = Context(), list[Any]()
    SERVICE.answer(request, context, sent.append)  # type: ignore[arg-type]
    return (sent[0] if sent else None), context


@pytest.mark.parametrize(
    "kind",
    [pb.RetrieveRequest, pb.SimilarItemsRequest, pb.SearchByVectorRequest, pb.ExplainRequest],
    ids=lambda kind: kind.DESCRIPTOR.name,
)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_request_ends_inside(kind: Any, data: st.DataObject) -> None:
    fields = data.draw(messages(kind.DESCRIPTOR))
    try:
        request = kind(**fields)
    except ValueError:  # a number that the field cannot hold
        return
    answer, context = answered(request)
    if answer is None:
        allowed = ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND")
        assert context.code is None or context.code.name in allowed, context.detail
        assert context.code is None or ":" in context.detail
        return
    items = [item.item_id for item in answer.items]
    assert len(items) == len(set(items))
    if kind is not pb.ExplainRequest:
        assert len(items) <= request.k and all(item.rank for item in answer.items)
        assert not set(items) & set(request.filters.deny)
    if kind is pb.RetrieveRequest and request.cursor == GOOD:
        assert not {"i1", "i9"} & set(items)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_request_of_a_batch_ends_inside(data: st.DataObject) -> None:
    some = st.one_of(good_requests, messages(pb.RetrieveRequest.DESCRIPTOR))
    requests = []
    for fields in data.draw(st.lists(some, max_size=6)):
        try:
            requests.append(pb.RetrieveRequest(**fields))
        except ValueError:
            continue
    answer, context = answered(pb.RetrieveBatchRequest(requests=requests))
    if not requests:
        assert context.code is grpc.StatusCode.INVALID_ARGUMENT
        return
    assert len(answer.answers) == len(requests)
    for one, request in zip(answer.answers, requests, strict=True):
        single, alone = answered(request) if not request.after.wait_ms else (None, None)
        assert one.code in (0, grpc.StatusCode.INVALID_ARGUMENT.value[0]), one.detail
        assert one.HasField("response") == (one.code == 0) == (not one.detail)
        if alone is not None:
            assert (single is not None) == (one.code == 0)
            ids = [item.item_id for item in one.response.items]
            assert single is None or [item.item_id for item in single.items] == ids


good_requests = st.fixed_dictionaries(
    {"user_id": st.sampled_from(["ana", "bob"]), "k": st.integers(1, N + 2)},
    optional={
        "limits": st.sampled_from([[], ["categories"], ["categories", "tags"]]).flatmap(
            lambda names: st.tuples(
                *(
                    st.builds(pb.AttributeLimit, attribute=st.just(name), most=st.integers(0, 3))
                    for name in names
                )
            )
        ),
        "diversity": st.floats(0, 1),
        "cursor": st.just(""),
        "scene": st.sampled_from(["", "home"]),
    },
)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(fields=good_requests)
def test_every_good_request_gets_k_items(fields: dict[str, Any]) -> None:
    answer, context = answered(pb.RetrieveRequest(**fields))
    assert context.code is None, context.detail
    left = N - 2 * (fields["user_id"] == "ana")
    assert len(answer.items) == min(fields["k"], left)
    assert bool(answer.next_cursor) == ("cursor" in fields and fields["k"] <= left)
