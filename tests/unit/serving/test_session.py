"""Events of a visit that travel with the request: a guest's session, or a known user's."""

from __future__ import annotations

import pytest

from eddyline.schema.events import KINDS
from eddyline.schema.partitioning import partition_of
from serving.proto import retrieval_pb2 as pb
from serving.rpc.client import Client
from serving.rpc.converters import SESSION_EVENTS_MAX
from tests.unit.serving.answers import fails, ids
from tests.unit.serving.test_coordinator import Plant, catalogue, seen
from tests.unit.serving.test_retriever import World


def test_a_guest_gets_what_a_user_with_this_list_gets(client: Client, world: World) -> None:
    world.user("ana", "i3", "i8")
    guest, ana = client.retrieve("", 5, session=["i3", "i8"]), client.retrieve("ana", 5)
    assert ids(guest) == ids(ana) and {item.path for item in guest.items} == {"towers"}
    assert not guest.freshness.HasField("user") and guest.freshness.worker.user_read_us == 0
    assert world.store.reads == 1


def test_nothing_of_a_session_is_kept(client: Client, world: World) -> None:
    assert ids(client.retrieve("", 2, session=["i3"])) == ["i2", "i4"]
    assert [item.path for item in client.retrieve("nobody", 2).items] == ["newest"] * 2
    world.user("ana", "i9")
    before = ids(client.retrieve("ana", 4))
    assert ids(client.retrieve("ana", 4, session=["i0"])) != before
    assert ids(client.retrieve("ana", 4)) == before


def test_a_session_stands_before_the_list(client: Client, world: World) -> None:
    """The tower reads three items: those of the session push the oldest of the list out."""
    world.user("ana", "i9", "i10", "i11")
    answer = client.retrieve("ana", 3, session=["i1", "i2", "i3"])
    assert ids(answer)[:2] == ["i0", "i4"]
    # The watermark is that of what is stored.
    assert answer.freshness.user.known and answer.freshness.user.offset == 7
    assert not {"i1", "i2", "i3", "i9", "i10", "i11"} & set(
        ids(client.retrieve("ana", 12, session=["i1", "i2", "i3"]))
    )


def test_kinds_count_as_in_clicks(client: Client) -> None:
    answer = client.retrieve("", 50, session=[("i3", "dislike"), ("i8", "like")])
    assert ids(answer)[0] in ("i7", "i9") and not {"i3", "i8"} & set(ids(answer))
    assert answer.short_because.endswith("2 of them are in the user's list or the session")
    only = client.retrieve("", 2, session=[("i3", "dislike")])
    assert only.paths[0].why == "the user's list holds dislikes only"
    for kind in ("", *KINDS):
        assert len(client.retrieve("", 2, session=[("i3", kind)]).items) == 2


def test_without_redis_a_session_is_still_answered(client: Client, world: World) -> None:
    world.store.away = True
    answer = client.retrieve("ana", 2, session=["i3"])
    assert ids(answer) == ["i2", "i4"] and answer.missing[0].startswith("redis: ")
    assert ids(client.retrieve("", 2, session=["i3"])) == ["i2", "i4"]


def test_items_that_are_not_live_make_no_vector(client: Client) -> None:
    answer = client.retrieve("", 2, session=["gone"])
    assert [item.path for item in answer.items] == ["newest"] * 2
    assert answer.paths[0].why == "none of the 1 items of the user's list is in the index"


@pytest.mark.parametrize(
    ("session", "sentence"),
    [
        ([("i1", "stare")], "session.kind: 'stare', allowed are click, "),
        ([("", "click")], "session.item_id: '' has 0 bytes, allowed are 1 … 256"),
        ([("ü" * 129, "")], "has 258 bytes, allowed are 1 … 256"),
    ],
)
def test_a_bad_event_is_refused_by_name(
    client: Client, session: list[tuple[str, str]], sentence: str
) -> None:
    found = fails(lambda: client.retrieve("ana", 2, session=session))
    assert found.startswith("INVALID_ARGUMENT: ") and sentence in found


@pytest.mark.parametrize(
    ("count", "good"),
    [(SESSION_EVENTS_MAX - 1, True), (SESSION_EVENTS_MAX, True), (SESSION_EVENTS_MAX + 1, False)],
)
def test_a_session_has_a_limit(client: Client, count: int, good: bool) -> None:
    def call() -> pb.RetrieveResponse:
        return client.retrieve("ana", 2, session=["i3"] * count)

    if good:
        assert ids(call()) == ["i2", "i4"]
    else:
        sentence = f"session: {count} events, allowed are 0 … {SESSION_EVENTS_MAX}"
        assert fails(call) == f"INVALID_ARGUMENT: {sentence}"


def test_a_guest_without_a_session_and_a_guests_click_are_refused(client: Client) -> None:
    sentence = "INVALID_ARGUMENT: user_id: '' has 0 bytes, allowed are 1 … 256"
    assert fails(lambda: client.retrieve("", 2)) == sentence
    token = (partition_of("", 8), 3)
    sentence = fails(lambda: client.retrieve("", 2, after=token, session=["i3"]))
    assert sentence == ("INVALID_ARGUMENT: after: it names a click of a user, and user_id is empty")


def test_a_coordinator_answers_as_one_worker() -> None:
    plant = Plant(3, catalogue(90))
    try:
        plant.user("ana", "item-7")
        for user, session in (("", ["item-3", "item-9"]), ("ana", ["item-3"])):
            one = plant.one.retrieve(user, 20, session=session)
            assert seen(plant.client.retrieve(user, 20, session=session)) == seen(one)
            assert {item.path for item in one.items} == {"towers"}
    finally:
        plant.close()
