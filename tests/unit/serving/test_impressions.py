"""Impressions: ids, sample, what is recorded; the queue's limit; the thread on a failing Kafka."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from kafka.errors import KafkaTimeoutError, MessageSizeTooLargeError, TopicAuthorizationFailedError

from eddyline.errors import KafkaUnavailable
from eddyline.schema import answers as layout
from eddyline.schema.answers import (
    CANDIDATES_MAX,
    ITEMS_MAX,
    MISSING_MAX,
    PATHS_MAX,
    RecordedAnswer,
    decode_answer,
    encode_answer,
)
from eddyline.schema.user_history import EMPTY, Entry
from eddyline.schema.user_sample import is_sampled
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import UserState
from index.filters import Filter
from index.port import Hit
from serving.answer import impression_sender, impressions
from serving.answer.deadline import Deadline
from serving.answer.fusion import PathResult, Recommendation
from serving.answer.impression_sender import ImpressionSender
from serving.answer.impressions import ImpressionCounts, Impressions
from serving.answer.retriever import Answer, NearestQuery, Query, Stamps
from serving.recall.base import Candidates
from serving.rpc.backends import WorkerBackend
from serving.rpc.retrieval_service import RetrievalService
from tests.unit.serving.direct_call import retrieve
from tests.unit.serving.test_retriever import World

SETTINGS = Settings(namespace="t", answers_sample=1.0)
UNKNOWN = UserState(fence=None, history=EMPTY, applied_us=0, embedding=None, profile={})


def answer(items: int = 2, candidates: int = 0, paths: int = 1, id_chars: int = 0) -> Answer:
    """One with so many items, the last path's candidates among them."""
    hits = [Hit(f"i{n}".ljust(id_chars, "\\"), 1 / 3 + n, 1, 2, 3) for n in range(max(items, 1))]
    more = hits[:1] * max(0, candidates - len(hits))
    found = Candidates(hits + more)
    return Answer(
        items=[Recommendation(hit, "towers", n) for n, hit in enumerate(hits[:items], 1)],
        paths=[PathResult(f"path{n}", found, items) for n in range(paths)],
        user=UNKNOWN,
        user_partition=3,
        after=None,
        stamps=Stamps(0, 0, 0, 0, 1_234_567),
        missing=[],
        short_because="",
        cards={},
    )


def taken(made: Impressions) -> list[RecordedAnswer]:
    """What is queued, as a reader of the topic gets it."""
    return [
        decode_answer(encode_answer(queued.recorded()), key=queued.user_id)
        for queued in made.take(10**9)
    ]


# ---------------------------------------------------------------- ids and what is recorded


def test_every_answer_has_an_id_of_its_own_in_every_process_and_thread() -> None:
    found: list[str] = []

    def run(made: Impressions) -> None:
        found.extend(made.record(Query("ana", 1), answer(), "g1") for _ in range(2_000))

    one, other = Impressions(0.0), Impressions(0.0)
    threads = [threading.Thread(target=run, args=(made,)) for made in (one, one, one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == len(set(found)) == 8_000
    assert max(map(len, found)) < 40
    assert taken(one) == [], "without a sample nothing is queued"


def test_the_sample_is_by_user_and_the_same_in_every_process() -> None:
    users = [f"u{n}" for n in range(2_000)]
    for _ in range(2):
        made = Impressions(0.05)
        for user in users:
            made.record(Query(user, 1), answer(), "g1")
        chosen = [one.user_id for one in taken(made)]
        assert chosen == [user for user in users if is_sampled(user, 0.05)]
        assert 50 < len(chosen) < 150


def test_the_record_has_what_the_answer_had() -> None:
    world = World()
    world.user("ana", "i3", offset=9)
    made = Impressions(1.0)
    backend = WorkerBackend(world.backend.held, world.retriever, made)
    world.replica.away = "no answer since 3 s"
    query = Query("ana", 8, filters=Filter(deny=frozenset(["i5"])), scene="home", arm="b")
    query = replace(query, session=[Entry("i1", 0, 0)])
    response = backend.retrieve(query, Deadline(5.0), 0)
    [found] = taken(made)
    assert found.impression_id == response.impression_id
    assert (found.user_id, found.k, found.generation) == ("ana", 8, "g1")
    assert (found.scene, found.arm, found.filtered, found.user_offset) == ("home", "b", True, 9)
    assert found.session == 1
    assert found.missing == ["kafka: no answer since 3 s"]
    assert abs(found.at_ms - time.time() * 1000) < 10_000
    shown = [(i.item_id, i.path, i.path_rank, round(i.score, 6)) for i in response.items]
    assert [(i.item_id, i.path, i.path_rank, i.score) for i in found.items] == shown
    [towers] = found.paths
    assert (towers.path, towers.found, towers.taken) == ("towers", 8, 8)
    assert [c.item_id for c in towers.items] == [i.item_id for i in response.items]


def test_answers_without_a_user_have_an_id_and_are_not_recorded() -> None:
    world, made = World(), Impressions(1.0)
    backend = WorkerBackend(world.backend.held, world.retriever, made)
    guest = backend.retrieve(Query("", 3, session=[Entry("i1", 0, 0)]), Deadline(5.0), 0)
    near = backend.nearest(NearestQuery(3, item_ids=["i1"]), Deadline(5.0), 0)
    assert guest.impression_id and near.impression_id and len(near.items) == 3
    assert guest.impression_id != near.impression_id
    assert taken(made) == []


def test_a_call_gets_the_id_and_its_labels_are_limited() -> None:
    world, service = World(), RetrievalService(Settings())
    service.serve(world.backend)
    first, second = retrieve(service, "ana", 1), retrieve(service, "ana", 1)
    assert first.impression_id and first.impression_id != second.impression_id
    for chars, refused in ((63, False), (64, False), (65, True)):
        for name in ("scene", "arm"):
            if refused:
                with pytest.raises(RuntimeError, match=f"{name}: .* has 65 bytes, allowed are"):
                    retrieve(service, "ana", 1, **{name: "x" * chars})
            else:
                retrieve(service, "ana", 1, **{name: "x" * chars})


@pytest.mark.parametrize("more", [-1, 0, 1, 1_000])
def test_a_record_keeps_the_top_of_a_long_answer(more: int) -> None:
    made = Impressions(1.0)
    long = answer(ITEMS_MAX + more, CANDIDATES_MAX + more, PATHS_MAX + more)
    made.record(Query("ana", 5_000), long, "g1", ["away"] * (MISSING_MAX + more))
    [found] = taken(made)
    assert len(found.items) == min(ITEMS_MAX, ITEMS_MAX + more)
    assert len(found.paths) == min(PATHS_MAX, PATHS_MAX + more)
    assert {len(path.items) for path in found.paths} == {CANDIDATES_MAX}
    assert {path.found for path in found.paths} == {len(long.paths[0].candidates.hits)}
    assert len(found.missing) == min(MISSING_MAX, MISSING_MAX + more)


def test_the_longest_record_is_smaller_than_kafka_accepts() -> None:
    """With ids of 256 characters that JSON escapes."""
    made = Impressions(1.0)
    long = answer(1_000, 1_000, 20, id_chars=256)
    made.record(Query("u" * 256, 1_000, scene="\\" * 64), long, "g", ["\\" * 500] * 50)
    [queued] = made.take(1)
    assert 600_000 < len(encode_answer(queued.recorded())) < 1_000_000


@pytest.mark.parametrize(
    ("change", "key", "reason"),
    [
        ({}, "bob", "wrong_key"),
        ({}, None, "wrong_key"),
        ({"user_id": ""}, "", "bad_field"),
        ({"impression_id": "a\u0007"}, "ana", "control_character"),
        ({"items": [{"item_id": "i"}]}, "ana", "bad_field"),
        ({"user_offset": -2}, "ana", "bad_field"),
    ],
)
def test_a_record_that_is_none_is_refused(change: Any, key: str | None, reason: str) -> None:
    good = {"impression_id": "x.1", "user_id": "ana", "at_ms": 1, "generation": "g", "k": 1}
    good |= {"items": [], "of_a_newer_worker": 1}
    assert layout.decode_answer(msgspec.json.encode(good), key="ana").user_offset == -1
    with pytest.raises(layout.Rejected) as refused:
        layout.decode_answer(msgspec.json.encode(good | change), key=key)
    assert refused.value.reason == reason


def test_a_refusal_names_the_field() -> None:
    value = b'{"impression_id":"x.1","user_id":"ana","at_ms":1,"generation":"g","k":-1}'
    with pytest.raises(layout.Rejected) as refused:
        layout.decode_answer(value, key="ana")
    assert (refused.value.reason, refused.value.field) == ("bad_field", "k")


@pytest.mark.parametrize("value", [None, b"", b"{", b"[]", b"\xff", b'{"a":"\xff"}'])
def test_bytes_that_are_no_record_are_refused(value: bytes | None) -> None:
    with pytest.raises(layout.Rejected):
        layout.decode_answer(value, key="ana")


# ---------------------------------------------------------------- the queue


@pytest.mark.parametrize(("more", "dropped"), [(-1, 0), (0, 0), (1, 1)])
def test_the_queue_is_bounded_by_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, more: int, dropped: int
) -> None:
    # Of each answer: one, two items, three candidates of one path.
    monkeypatch.setattr(impressions, "QUEUE_ENTRIES_MAX", 60 - more)
    made = Impressions(1.0)
    ids = [made.record(Query("ana", 2), answer(2, 3), "g1") for _ in range(10)]
    assert len(set(ids)) == 10, "an answer that is dropped has its id"
    assert made.counts() == ImpressionCounts(sent=0, dropped=dropped, failed=0)
    assert [one.impression_id for one in taken(made)] == ids[: 10 - dropped]
    made.record(Query("ana", 2), answer(2, 3), "g1")
    assert made.counts().dropped == dropped and len(taken(made)) == 1, "there is room again"


# ---------------------------------------------------------------- the thread


class Future:
    """Of a record. ends: what becomes of it; None: nothing, for ever."""

    def __init__(self, ends: BaseException | bool | None) -> None:
        self.is_done = ends is not None
        self.exception = ends if isinstance(ends, BaseException) else None

    def succeeded(self) -> bool:
        return self.is_done and self.exception is None

    def failed(self) -> bool:
        return self.is_done and self.exception is not None

    def get(self, timeout: float) -> None:
        time.sleep(timeout)
        raise KafkaTimeoutError


class Kafka:
    """Producers of a server that can be away, refuse, or hang."""

    def __init__(self) -> None:
        self.away: Exception | None = None
        self.ends: Callable[[], BaseException | bool | None] = lambda: True
        self.records: list[RecordedAnswer] = []
        self.connects = self.closes = 0

    def connect(self, settings: Settings) -> Kafka:
        self.connects += 1
        if self.away is not None:
            raise self.away
        return self

    def send(self, topic: str, value: bytes, key: bytes) -> Future:
        assert topic == "t.answers"
        future = Future(self.ends())
        if future.succeeded():
            self.records.append(decode_answer(value, key=key.decode()))
        return future

    def close(self, timeout: float) -> None:
        self.closes += 1


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> Kafka:
    for name, seconds in (("INTERVAL_S", 0.01), ("AGAIN_S", 0.01), ("_STEP_S", 0.01)):
        monkeypatch.setattr(impression_sender, name, seconds)
    monkeypatch.setattr(impression_sender.clients, "translate_error", lambda _, e: _unavailable(e))
    return Kafka()


def _unavailable(error: Exception) -> KafkaUnavailable:
    return KafkaUnavailable(f"Kafka: {type(error).__name__}")


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def record(made: Impressions, n: int) -> list[str]:
    return [made.record(Query(f"u{i}", 2), answer(), "g1") for i in range(n)]


def test_answers_are_sent_in_order_and_the_rest_at_the_stop(kafka: Kafka) -> None:
    made = Impressions(1.0)
    sender = ImpressionSender(SETTINGS, made, kafka.connect)
    sender.start()
    ids = record(made, 600)
    wait_until(lambda: len(kafka.records) == 600)
    ids += record(made, 300)
    sender.close()
    assert [one.impression_id for one in kafka.records] == ids
    assert made.counts() == ImpressionCounts(sent=900, dropped=0, failed=0)
    assert (kafka.connects, kafka.closes) == (1, 1)


def test_without_a_sample_there_is_no_thread(kafka: Kafka) -> None:
    sender = ImpressionSender(SETTINGS, Impressions(0.0), kafka.connect)
    before = threading.active_count()
    sender.start()
    assert threading.active_count() == before
    sender.close()
    assert kafka.connects == 0


def test_while_kafka_is_away_answers_wait_and_are_dropped_then(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(impressions, "QUEUE_ENTRIES_MAX", 50)
    kafka.away = KafkaUnavailable("Kafka: no answer")
    made = Impressions(1.0)
    sender = ImpressionSender(SETTINGS, made, kafka.connect)
    with caplog.at_level("INFO"):
        sender.start()
        wait_until(lambda: kafka.connects > 3)
        began = time.thread_time()
        record(made, 1_000)
        assert time.thread_time() - began < 1.0
        assert made.counts() == ImpressionCounts(sent=0, dropped=990, failed=0)
        kafka.away = None
        wait_until(lambda: made.counts().sent == 10)
        sender.close()
    lines = [r.message for r in caplog.records if r.name == impression_sender.log.name]
    assert lines == ["answers are not recorded", "answers are recorded again"]


def test_answers_that_kafka_does_not_confirm_count_as_failed(kafka: Kafka) -> None:
    made = Impressions(1.0)
    sender = ImpressionSender(SETTINGS, made, kafka.connect)
    sender.start()
    for ends in (TopicAuthorizationFailedError("no"), KafkaTimeoutError("late")):
        failed, connects = made.counts().failed, kafka.connects
        kafka.ends = lambda ends=ends: ends  # type: ignore[misc]
        record(made, 3)
        wait_until(lambda failed=failed: made.counts().failed == failed + 3)  # type: ignore[misc]
        wait_until(lambda connects=connects: kafka.connects > connects)  # type: ignore[misc]
    kafka.ends = lambda: True
    record(made, 2)
    wait_until(lambda: made.counts().sent == 2)
    sender.close()
    assert made.counts() == ImpressionCounts(sent=2, dropped=0, failed=6)


def test_a_record_that_is_too_large_fails_alone(kafka: Kafka) -> None:
    ends = iter([True, MessageSizeTooLargeError("large"), True])
    kafka.ends = lambda: next(ends)
    made = Impressions(1.0)
    record(made, 3)
    sender = ImpressionSender(SETTINGS, made, kafka.connect)
    sender.start()
    wait_until(lambda: made.counts() == ImpressionCounts(sent=2, dropped=0, failed=1))
    assert kafka.connects == 1
    sender.close()


def test_an_error_of_the_code_ends_neither_the_thread_nor_the_queries(kafka: Kafka) -> None:
    made = Impressions(1.0)
    sender = ImpressionSender(SETTINGS, made, kafka.connect)
    sender.start()
    ends = iter([ValueError("unforeseen")])

    def raising() -> bool:
        for error in ends:
            raise error
        return True

    kafka.ends = raising
    record(made, 1)
    wait_until(lambda: made.counts().failed == 1)
    record(made, 1)
    wait_until(lambda: made.counts().sent == 1)
    sender.close()


def test_a_stop_waits_for_kafka_for_a_limited_time(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(impression_sender, "FLUSH_S", 0.1)
    kafka.ends = lambda: None
    made = Impressions(1.0)
    sender = ImpressionSender(SETTINGS, made, kafka.connect)
    sender.start()
    record(made, 2)
    wait_until(lambda: not made.take(0) and made._entries == 0)
    record(made, 400)
    began = time.monotonic()
    sender.close()
    assert time.monotonic() - began < 3
    assert made.counts() == ImpressionCounts(sent=0, dropped=400, failed=2)
