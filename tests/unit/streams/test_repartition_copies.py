"""What a copy into another namespace sends: each accepted record once and in order, after kills."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import pytest

from eddyline.kafka import producers, reading, topics
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema import events
from eddyline.schema.erasure import Erasure
from eddyline.schema.events import Click, Forget, Item, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from streams.dead_letters import forget_of
from streams.operations import repartition
from streams.operations.refill_records import ArchivedRecord
from streams.operations.repartition import Copier, target_of
from tests.simulation.test_ingest_faults import Rec

SOURCE = Settings(
    clicks_partitions=3, items_partitions=2, chunk_records_max=5, dedupe_window_events=10
)
TARGET = target_of(SOURCE, "other", 5, 3)
MS = 1_700_000_000_000


class Killed(BaseException):
    """kill -9 of the copy."""


class Kafka:
    """Both namespaces in memory. kill_in: calls of the producer until the copy is killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logs: dict[str, dict[int, list[Rec]]] = {
            CLICKS: {p: [] for p in range(3)},
            USERS: {p: [] for p in range(3)},
            ITEMS: {p: [] for p in range(2)},
        }
        self.copied: list[dict[str, Any]] = []
        self.positions = {(name, p): 0 for name, log in self.logs.items() for p in log}
        self.kill_in = 10**9
        self._pending: list[dict[str, Any]] = []
        self._offsets: dict[Any, Any] = {}
        monkeypatch.setattr(topics, "end_offsets", self._ends)
        monkeypatch.setattr(topics, "beginning_offsets", lambda _, name: self._ends(_, name, 0))
        monkeypatch.setattr(reading, "read", self._read)
        monkeypatch.setattr(producers, "in_time", lambda settings, call: call())
        monkeypatch.setattr(producers, "sent_to", lambda future, settings: None)
        monkeypatch.setattr(repartition, "_BATCH", 4)

    def append(
        self, name: str, partition: int, key: str, value: bytes | None, **headers: bytes
    ) -> Rec:
        log = self.logs[name][partition]
        stamp = MS + sum(map(len, self.logs[name].values()))
        record = Rec(name, partition, len(log), stamp, key.encode(), value, tuple(headers.items()))
        log.append(record)
        return record

    def copier(self) -> Copier:
        """A process that was just started."""
        self._pending, self._offsets = [], {}
        return Copier(SOURCE, TARGET, self, self.positions, lambda copied, left_out: None)  # type: ignore[arg-type]

    def copy(self) -> Copier:
        copier = self.copier()
        copier.copy()
        return copier

    # The producer.

    def begin_transaction(self) -> None:
        self._call()

    def send(self, topic: str, **more: Any) -> None:
        self._call()
        self._pending.append({"topic": topic.removeprefix("other."), **more})

    def send_offsets_to_transaction(self, offsets: Mapping[Any, Any], group: str) -> None:
        self._call()
        assert group == "other.eddyline-repartition"
        self._offsets = dict(offsets)

    def commit_transaction(self) -> None:
        self._call()
        self.copied += self._pending
        self.positions |= {(at.topic, at.partition): o.offset for at, o in self._offsets.items()}
        self._pending = []

    def _call(self) -> None:
        self.kill_in -= 1
        if self.kill_in < 0:
            raise Killed

    def _ends(self, settings: Any, name: str, share: int = 1) -> dict[int, int]:
        return {p: share * len(log) for p, log in self.logs[name].items()}

    def _read(
        self, settings: Any, name: str, starts: Mapping[int, int], ends: Mapping[int, int]
    ) -> Iterator[Any]:
        for partition, first in starts.items():
            yield from self.logs[name][partition][first : ends[partition]]


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> Kafka:
    return Kafka(monkeypatch)


def click(user: str, item: str, event_id: str | None) -> bytes:
    return events.encode(Click(user_id=user, item_id=item, at_ms=MS, event_id=event_id))


def filled(kafka: Kafka, seed: int) -> dict[str, list[str]]:
    """Draw both topics' records; user -> the items of the clicks that count, in order."""
    rng, want = random.Random(seed), defaultdict[str, list[str]](list)
    seen: dict[int, dict[str, int]] = defaultdict(dict)
    for number in range(120):
        user, item = f"u{rng.randrange(9)}", f"i{number}"
        own, draw = partition_of(user, 3), rng.random()
        if draw < 0.1:
            kafka.append(CLICKS, own, user, b"{")
        elif draw < 0.2:
            kafka.append(CLICKS, (own + 1) % 3, user, click(user, item, None))
        else:
            event_id = rng.choice([None, f"e{number}", f"e{rng.randrange(number + 1)}"])
            record = kafka.append(CLICKS, own, user, click(user, item, event_id))
            if event_id is not None:
                before = seen[own].get(event_id)
                if before is not None and record.offset - before <= 10:
                    continue
                seen[own][event_id] = record.offset
            want[user].append(item)
    return want


def items_by_user(kafka: Kafka) -> dict[str, list[str]]:
    found = defaultdict(list)
    for one in kafka.copied:
        event = json.loads(one["value"])
        assert one["partition"] == partition_of(event["user_id"], 5)
        assert one["key"] == event["user_id"].encode()
        found[event["user_id"]].append(event["item_id"])
    return found


@pytest.mark.parametrize("seed", range(30))
def test_every_event_that_counts_is_copied_once_and_in_order_whatever_is_killed(
    kafka: Kafka, seed: int
) -> None:
    rng, want = random.Random(f"kills {seed}"), filled(kafka, seed)
    kills = 0
    while True:
        kafka.kill_in = rng.randrange(1, 40)
        try:
            kafka.copy()
        except Killed:
            kills += 1
        else:
            break
        assert kills < 200
    assert items_by_user(kafka) == want
    kafka.kill_in = 10**9
    assert kafka.copy().report.copied.total() == 0
    kafka.append(CLICKS, partition_of("u1", 3), "u1", click("u1", "new", None))
    assert kafka.copy().report.copied == {CLICKS: 1}


def test_a_running_copy_goes_on_with_new_records(kafka: Kafka) -> None:
    want, copier = filled(kafka, 1), kafka.copier()
    assert copier.copy() == 120 and copier.copy() == 0
    own = partition_of("u1", 3)
    for _ in range(2):  # sent again
        kafka.append(CLICKS, own, "u1", click("u1", "new", "x"))
    want["u1"].append("new")
    assert copier.copy() == 2
    assert items_by_user(kafka) == want and copier.report.left_out["sent again"] > 0


def test_items_and_profiles_keep_their_time_and_lose_their_origin(kafka: Kafka) -> None:
    kafka.append(ITEMS, partition_of("a", 2), "a", events.encode(Item(item_id="a", title="t")))
    kafka.append(ITEMS, 1 - partition_of("a", 2), "a", None)  # ingest forwards it
    origin = b"items/1/0"
    headers = {"origin": origin, "origin_ms": str(MS - 5).encode(), "produced_us": b"7"}
    kafka.append(ITEMS, partition_of("a", 2), "a", None, **headers)
    profile = events.encode(UserProfile(user_id="u", attributes={"n": 1}))
    kafka.append(USERS, partition_of("u", 3), "u", profile)
    kafka.append(USERS, partition_of("u", 3), "u", None)
    copier = kafka.copy()
    assert copier.report.copied == {ITEMS: 2, USERS: 2}
    assert copier.report.left_out == {"wrong partition": 1}
    shown = [(c["topic"], c["partition"], c["value"] is None, c["headers"]) for c in kafka.copied]
    u, a = partition_of("u", 5), partition_of("a", 3)
    assert shown == [
        (USERS, u, False, [("origin_ms", str(MS).encode())]),
        (USERS, u, True, [("origin_ms", str(MS + 1).encode())]),
        (ITEMS, a, False, [("origin_ms", str(MS).encode())]),
        (ITEMS, a, True, [("produced_us", b"7"), ("origin_ms", str(MS - 5).encode())]),
    ]


def test_a_forget_is_copied_before_its_null_record(kafka: Kafka) -> None:
    forget = Forget(user_id="u", forget_until_ms=MS, users_offset=0)
    kafka.append(USERS, partition_of("u", 3), "u", None)
    kafka.append(CLICKS, partition_of("u", 3), "u", events.encode(forget))
    kafka.copy()
    assert [one["topic"] for one in kafka.copied] == [CLICKS, USERS]
    copied = Erasure.of(msgspec.json.decode(kafka.copied[0]["value"], type=Forget))
    null = Rec("other.users", 0, 77, MS + 9, b"u", None, tuple(kafka.copied[1]["headers"]))
    again = Erasure.of(forget_of(TARGET, null, "u"))
    assert again.until_ms == copied.until_ms and again.repeats(copied, MS + 10)


def test_a_large_record_loses_other_headers_and_one_that_does_not_fit_is_left_out(
    kafka: Kafka,
) -> None:
    own = partition_of("a", 2)
    for size in (1_047_000, 1_048_500):
        title = Item(item_id="a", title="t", attributes={"x": "y" * size})
        kafka.append(ITEMS, own, "a", events.encode(title), trace=b"z" * 2_000)
    copier = kafka.copy()
    assert (copier.report.copied, copier.report.left_out) == ({ITEMS: 1}, {"too_large": 1})
    assert [name for name, _ in kafka.copied[0]["headers"]] == ["origin_ms"]


def test_a_merge_into_a_forgotten_user_ends_the_visitor_and_moves_nothing(kafka: Kafka) -> None:
    merge = b'{"user_id": "u", "merge_into": "forgotten since", "at_ms": %d}' % MS
    record = ArchivedRecord(CLICKS, partition_of("u", 3), 0, MS, b"u", merge, target_forgotten=True)
    kafka.append(CLICKS, partition_of("u", 3), "u", b"")
    kafka.logs[CLICKS][partition_of("u", 3)][0] = record  # type: ignore[call-overload]
    kafka.copy()
    [copy] = kafka.copied
    found = json.loads(copy["value"])
    assert (found["user_id"], found["keep_after_ms"]) == ("u", events.AT_MS_MAX)
    assert "merge_into" not in found
