"""Embeddings of an ended generation are removed; the process that uses it ends in time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from eddyline import generations
from eddyline.errors import FenceMoved, GenerationEnded, KafkaUnavailable
from eddyline.generations import End, Generations, Manifest
from eddyline.kafka.topics import CLICKS
from eddyline.schema.step_ranges import StepRanges, always
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, Source, UserEffects
from streams.clicks.step_ranges import OpenedSlot, RecordedStepRanges
from streams.ended_generations import EndedGenerations
from streams.fences import published_source
from tests.unit.streams.test_generations import LOG, SETTINGS, Process, two

SLOT, CLICKS_0 = "u0", Source(CLICKS, 0)
LEAVE_MS, REMOVE_MS = 2_000, 3_000
END = End(ended_ms=1_000, leave_ms=LEAVE_MS, remove_ms=REMOVE_MS)


def manifest(name: str) -> Manifest:
    return Manifest(generation=name, bundle=name, dimension=2, created_ms=0)


@pytest.fixture
def topic(monkeypatch: pytest.MonkeyPatch) -> list[Generations]:
    """What the topic `generations` says: the last one of the list."""
    said = [Generations("new", {n: manifest(n) for n in ("old", "new")}, {}, {"old": END})]
    monkeypatch.setattr(generations, "read", lambda settings: said[-1])
    return said


def ended_of(process: Process, *live: str, on_end: Any = None) -> EndedGenerations:
    cache = process.handlers.clicks.cache
    return EndedGenerations(
        SETTINGS, process.store, cache, threading.Lock(), live or ("new",), on_end or pytest.fail
    )


def stored(store: MemoryStore) -> Mapping[str, StepRanges]:
    """The generations of which the slot says that it may have embeddings."""
    return store.read_slot(SLOT, CLICKS_0).step_ranges


def had_both() -> Process:
    """A process of the new generation, on a slot where the old one also has embeddings."""
    old, new = two()
    first = Process(MemoryStore(), old)
    first.change("i0")
    first.click("i0", "i1", user="ana")
    first.click("i0", "i1", user="bo")
    first.handlers.clicks.flush()
    process = Process(first.store, new)
    process.click("i0", "i1", user="ana")
    process.handlers.clicks.flush()
    return process


def test_embeddings_go_when_their_time_is_over_and_not_before(topic: list[Generations]) -> None:
    process = had_both()
    ended = ended_of(process)
    for now_ms in (0, LEAVE_MS, REMOVE_MS - 1):
        ended.check(now_ms)
    assert process.embedding("old") and process.embedding("old", "bo") and ended.removed == 0
    assert published_source("old", 0) in {of for _, of in process.store.snapshot().fences}
    ended.check(REMOVE_MS)
    assert ended.removed == 2
    assert process.embedding("old") is None and process.embedding("old", "bo") is None
    assert process.embedding("new") is not None
    assert published_source("old", 0) not in {of for _, of in process.store.snapshot().fences}
    # The name goes with the next fenced write.
    assert set(stored(process.store)) == {"old", "new"}
    process.click("i1")
    assert set(stored(process.store)) == {"new"}
    ended.check(REMOVE_MS + 1)
    assert ended.removed == 2


def test_a_crash_before_the_name_is_gone_removes_again(topic: list[Generations]) -> None:
    process = had_both()
    ended_of(process).check(REMOVE_MS)
    again = Process(process.store, two()[1])
    again.handlers.clicks.prepare([0])
    assert set(stored(again.store)) == {"old", "new"}
    ended_of(again).check(REMOVE_MS)
    again.click("i0")
    assert set(stored(again.store)) == {"new"}


def test_an_embedding_that_another_process_wrote_meanwhile_goes_too(
    topic: list[Generations],
) -> None:
    """A process that was frozen writes after the removal, before the next write of the owner."""
    process = had_both()
    ended = ended_of(process)
    ended.check(REMOVE_MS)
    frozen = process.handlers.clicks.fences.expected(CLICKS_0, SLOT)
    assert frozen is not None
    late = UserEffects(embeddings={"old": {"ana": (9, b"12345678")}})
    process.store.write_users(SLOT, CLICKS_0, frozen, Fence(frozen.offset + 1, LOG), late)
    with pytest.raises(FenceMoved):
        process.click("i0")
    process.next[CLICKS] = process.open(CLICKS)
    process.handlers.clicks.prepare([0])
    ended.check(REMOVE_MS)
    assert process.embedding("old") is None
    process.click("i0", "i1")  # the slot has the first one
    assert set(stored(process.store)) == {"new"}


def test_a_slot_that_was_read_again_during_the_removal_keeps_the_name(
    topic: list[Generations], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = had_both()
    remove = process.store.remove_embeddings

    def and_meanwhile(generation: str, slots: Any) -> Any:
        yield from remove(generation, slots)
        process.open(CLICKS)
        process.handlers.clicks.prepare([0])

    monkeypatch.setattr(process.store, "remove_embeddings", and_meanwhile)
    ended_of(process).check(REMOVE_MS)
    process.click("i0")
    assert set(stored(process.store)) == {"old", "new"}


def test_a_forgotten_user_loses_what_is_not_removed_yet(topic: list[Generations]) -> None:
    process = had_both()
    ended_of(process).check(REMOVE_MS - 1)
    process.forget("bo")
    assert process.embedding("old", "bo") is None and process.embedding("old") is not None


def test_the_process_that_uses_it_ends_before_anything_is_removed(
    topic: list[Generations], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(MemoryStore(), two()[0])
    process.click("i0", "i1")
    found: list[Exception] = []
    ended = ended_of(process, "old", on_end=found.append)
    ended.check(LEAVE_MS - 1)
    for now_ms in (LEAVE_MS, REMOVE_MS):
        with pytest.raises(GenerationEnded, match="generation old has ended"):
            ended.check(now_ms)
    ended.start()
    ended.close()
    assert [type(error) for error in found] == [GenerationEnded]
    assert process.embedding("old") is not None


def test_an_unreachable_kafka_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(settings: Any) -> Generations:
        raise KafkaUnavailable("away")

    monkeypatch.setattr(generations, "read", away)
    ended = ended_of(Process(MemoryStore(), two()[1]))
    ended.start()
    ended.close()


class Log:
    """The topic, as `RecordedStepRanges` uses it."""

    def __init__(self, said: Generations) -> None:
        self.said, self.written = said, dict[tuple[str, int], StepRanges]()

    def read(self) -> Generations:
        return self.said

    def write(self, ranges: Mapping[tuple[str, int], StepRanges]) -> None:
        self.written |= ranges


def test_removed_ranges_of_an_ended_generation_do_not_come_back(topic: list[Generations]) -> None:
    log = Log(topic[0])
    slot = OpenedSlot(0, "log", 7, {"old": always("log")})
    [ranges] = RecordedStepRanges(log).open([slot], ["new"])
    # The slot still has embeddings of it, which a Forget has to delete.
    assert set(ranges) == {"old", "new"} and set(log.written) == {("new", 0)}


def test_no_slot_is_opened_with_a_generation_that_must_not_be_used() -> None:
    said = Generations("new", {"old": manifest("old")}, {}, {"old": END})
    slot = OpenedSlot(0, "log", 7, {})
    with pytest.raises(GenerationEnded):
        RecordedStepRanges(Log(said)).open([slot], ["old"])
    later = replace(said, ended={"old": End(ended_ms=0, leave_ms=2**52, remove_ms=2**52)})
    assert RecordedStepRanges(Log(later)).open([slot], ["old"])
