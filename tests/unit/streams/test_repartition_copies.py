"""What a copy into another namespace sends: each accepted record once and in order, after kills."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from kafka.errors import KafkaError, MessageSizeTooLargeError

from eddyline.archive import Archive, Archived, metadata_of, row, schema, writer
from eddyline.errors import LogMismatch, Rejected
from eddyline.kafka import producers, reading, topics
from eddyline.kafka.topics import CLICKS, ITEMS, SOURCES, USERS
from eddyline.schema import events
from eddyline.schema.erasure import Erasure
from eddyline.schema.events import Click, Forget, Item, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId
from streams.dead_letters import forget_of, record_bytes
from streams.operations import repartition, repartition_plan, retention_gaps
from streams.operations.refill_records import ArchivedRecord, batches
from streams.operations.repartition import Copier
from streams.operations.repartition_plan import target_of
from tests.simulation.test_ingest_faults import Rec

SOURCE = Settings(
    clicks_partitions=3, items_partitions=2, chunk_records_max=5, dedupe_window_events=10
)
TARGET = target_of(SOURCE, "other", 5, 3)
MS = 1_700_000_000_000


class Killed(BaseException):
    """kill -9 of the copy."""


class Sent:
    """The future of a sent record."""

    def __init__(self, refused: KafkaError | None = None) -> None:
        self._refused = refused

    def get(self, timeout: float) -> None:
        if self._refused is not None:
            raise self._refused


class Kafka:
    """Both namespaces in memory. kill_in: calls of the producer until the copy is killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # None: an offset without a record, as of a transaction's marker.
        self.logs: dict[str, dict[int, list[Rec | None]]] = {
            CLICKS: {p: [] for p in range(3)},
            USERS: {p: [] for p in range(3)},
            ITEMS: {p: [] for p in range(2)},
        }
        self.copied: list[dict[str, Any]] = []
        # The copies in each transaction.
        self.transactions: list[int] = []
        self.positions = {(name, p): 0 for name, log in self.logs.items() for p in log}
        self.ids = {
            settings.prefixed(name): LogId("cluster", settings.prefixed(name))
            for settings in (SOURCE, TARGET)
            for name in SOURCES
        }
        self.metadata: dict[str, str] = {}
        self.begins = dict.fromkeys(range(3), 0)
        self.read_hook: Callable[[], None] = lambda: None
        self.kill_in = 10**9
        self._pending: list[dict[str, Any]] = []
        self._offsets: dict[Any, Any] = {}
        monkeypatch.setattr(topics, "end_offsets", self._ends)
        monkeypatch.setattr(topics, "beginning_offsets", self._begins)
        monkeypatch.setattr(topics, "log_ids", self._log_ids)
        monkeypatch.setattr(retention_gaps, "committed", self._committed)
        monkeypatch.setattr(reading, "read", self._read)
        monkeypatch.setattr(producers, "in_time", lambda settings, call: call())
        monkeypatch.setattr(repartition, "_BATCH", 4)

    def append(
        self, name: str, partition: int, key: str, value: bytes | None, **headers: bytes
    ) -> Rec:
        log = self.logs[name][partition]
        stamp = MS + sum(map(len, self.logs[name].values()))
        record = Rec(name, partition, len(log), stamp, key.encode(), value, tuple(headers.items()))
        log.append(record)
        return record

    def copier(self, source: Settings = SOURCE, *, skip_lost: bool = False) -> Copier:
        """A process that was just started."""
        self._pending, self._offsets = [], {}
        return Copier(
            source,
            TARGET,
            self,  # type: ignore[arg-type]
            self.positions,
            lambda copied, left_out: None,
            skip_lost=skip_lost,
        )

    def copy(self) -> Copier:
        copier = self.copier()
        copier.copy()
        return copier

    # The producer.

    def begin_transaction(self) -> None:
        self._call()

    def send(self, topic: str, **more: Any) -> Sent:
        self._call()
        self._pending.append({"topic": topic.removeprefix("other."), **more})
        return Sent()

    def send_offsets_to_transaction(self, offsets: Mapping[Any, Any], group: str) -> None:
        self._call()
        assert group == "other.eddyline-repartition"
        self._offsets = dict(offsets)

    def commit_transaction(self) -> None:
        self._call()
        self.copied += self._pending
        self.transactions.append(len(self._pending))
        self.positions |= {(at.topic, at.partition): o.offset for at, o in self._offsets.items()}
        self.metadata |= {at.topic: o.metadata for at, o in self._offsets.items()}
        self._pending = []

    def _call(self) -> None:
        self.kill_in -= 1
        if self.kill_in < 0:
            raise Killed

    def _ends(self, settings: Any, name: str) -> dict[int, int]:
        return {p: len(log) for p, log in self.logs[name].items()}

    def _begins(self, settings: Any, name: str) -> dict[int, int]:
        return {p: self.begins[p] if name == CLICKS else 0 for p in self.logs[name]}

    def _log_ids(self, settings: Settings, names: Any, missing_ok: bool = False) -> Any:
        return {name: self.ids[settings.prefixed(name)] for name in names}

    def _committed(self, settings: Any, name: str, count: int, group: str) -> Any:
        return {p: (self.positions[name, p], self.metadata.get(name, "")) for p in range(count)}

    def _read(
        self, settings: Any, name: str, starts: Mapping[int, int], ends: Mapping[int, int]
    ) -> Iterator[Any]:
        for partition, first in starts.items():
            self.read_hook()
            first = max(first, self.begins[partition] if name == CLICKS else 0)
            yield from filter(None, self.logs[name][partition][first : ends[partition]])


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


def test_a_transaction_has_a_limit_of_bytes(kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repartition, "_BATCH", 1_000)
    own = partition_of("a", 2)
    for _ in range(9):
        title = Item(item_id="a", title="t", attributes={"x": "y" * 1_040_000})
        kafka.append(ITEMS, own, "a", events.encode(title))
    kafka.copy()
    assert kafka.transactions == [4, 4, 1]


@pytest.mark.parametrize(("bytes_max", "sizes"), [(-1, [1, 1, 1]), (0, [2, 1]), (1, [2, 1])])
def test_a_batch_has_at_most_so_many_bytes(bytes_max: int, sizes: list[int]) -> None:
    records = [Rec(ITEMS, 0, n, MS, b"key", b"v" * 500, (("h", b"x"),)) for n in range(3)]
    one = record_bytes(b"key", records[0].value, records[0].headers)
    found = [len(batch) for batch in batches(records, 10, 2 * one + bytes_max)]
    assert found == sizes


def test_a_record_above_the_limit_of_a_batch_is_alone() -> None:
    records = [
        Rec(ITEMS, 0, n, MS, b"k", b"v" * size, (("h", None),))  # type: ignore[arg-type]
        for n, size in enumerate((1, 9_000, 1, 1))
    ]
    assert [len(batch) for batch in batches(records, 10, 1_000)] == [1, 1, 2]


def test_a_copy_that_its_topic_refuses_by_size_is_named(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kafka refuses all records behind the large one too."""

    def refused(topic: str, **more: Any) -> Sent:
        return Sent(MessageSizeTooLargeError())

    monkeypatch.setattr(kafka, "send", refused)
    for size in (10, 30_000, 20):
        title = Item(item_id="a", title="t", attributes={"x": "y" * size})
        kafka.append(ITEMS, partition_of("a", 2), "a", events.encode(title))
    at = f"items/{partition_of('a', 2)}/1"
    with pytest.raises(
        Rejected,
        match=rf"copy into other\.items of {at}: 30,\d\d\d bytes: Kafka refuses .*: raise "
        "max.message.bytes of its topic, and start the command again: it goes on there",
    ):
        kafka.copy()
    assert kafka.copied == []


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


def test_clicks_that_retention_removes_during_a_copy_are_not_left_out_silently(
    kafka: Kafka, tmp_path: Path
) -> None:
    filled(kafka, 3)
    source = msgspec.structs.replace(SOURCE, archive_url=str(tmp_path))

    def remove() -> None:
        kafka.begins = dict.fromkeys(range(3), 9)

    kafka.read_hook = remove
    with pytest.raises(LogMismatch, match=r"lacks 27: clicks/0 offsets 0 to 8; .*--skip-lost"):
        kafka.copier(source).copy()
    assert kafka.copied == []
    assert kafka.copier(source, skip_lost=True).copy() == 120 - 27
    # All of a partition, from its last copied record to its end.
    kafka.append(CLICKS, 0, "u", b"{")
    kafka.read_hook = lambda: kafka.begins.update({0: len(kafka.logs[CLICKS][0])})
    with pytest.raises(LogMismatch, match="lacks 1: clicks/0"):
        kafka.copier(source).copy()


def test_gaps_that_retention_did_not_make_stop_no_copy(kafka: Kafka) -> None:
    want = filled(kafka, 4)
    for log in kafka.logs[CLICKS].values():
        log.append(None)
    kafka.append(CLICKS, partition_of("u1", 3), "u1", click("u1", "last", None))
    kafka.copy()
    want["u1"].append("last")
    assert items_by_user(kafka) == want


def test_an_archive_of_another_log_is_refused(kafka: Kafka, tmp_path: Path) -> None:
    log = LogId("cluster", "of before")
    at = click_rows(tmp_path, log)
    kafka.begins = dict.fromkeys(range(3), 1)
    filled(kafka, 2)
    source = msgspec.structs.replace(SOURCE, archive_url=str(at))
    for skip_lost in (False, True):
        with pytest.raises(LogMismatch, match="is not of this log"):
            kafka.copier(source, skip_lost=skip_lost).copy()
        assert kafka.copied == []


def click_rows(folder: Path, log: LogId) -> Path:
    """An archive with one click of each partition of that log."""
    archive = Archive(msgspec.structs.replace(SOURCE, archive_url=str(folder)))
    for partition in range(3):
        event = Click(user_id="u", item_id="i", at_ms=MS)
        rows = [row(Archived(partition, 0, MS, "u", event))]
        path = Path(archive.path(CLICKS, MS, partition, 0, 0))
        path.parent.mkdir(parents=True, exist_ok=True)
        arrow = schema(CLICKS).with_metadata(metadata_of(log, 0))
        columns = dict(zip(arrow.names, zip(*rows, strict=True), strict=True))
        with writer(path, arrow) as out:
            out.write_table(pa.table(columns, schema=arrow))
    return folder


@pytest.mark.parametrize("anew", [SOURCE.prefixed(CLICKS), TARGET.prefixed(CLICKS)])
def test_positions_hold_for_the_logs_that_they_were_committed_for(kafka: Kafka, anew: str) -> None:
    filled(kafka, 2)
    kafka.append(ITEMS, partition_of("a", 2), "a", events.encode(Item(item_id="a", title="t")))
    kafka.copy()
    ends = {(CLICKS, p): len(log) for p, log in kafka.logs[CLICKS].items()}
    positions = repartition_plan.positions_of(SOURCE, TARGET)
    assert ends.items() <= positions.items() and positions[ITEMS, partition_of("a", 2)] == 1
    kafka.ids[anew] = LogId("cluster", "made anew")
    positions = repartition_plan.positions_of(SOURCE, TARGET)
    assert dict.fromkeys(ends, 0).items() <= positions.items()
    assert positions[ITEMS, partition_of("a", 2)] == 1
