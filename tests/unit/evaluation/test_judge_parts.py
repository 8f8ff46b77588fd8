"""The parts of the judge: the merged log, the windows of the rates, drift, the checkpoint."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from eddyline.kafka.topics import CLICKS, ITEMS, SOURCES, USERS
from eddyline.schema.events import Click, Item, UserProfile
from eddyline.settings.loader import Settings
from eddyline.statistics import wilson
from eddyline.stores.state_store import LogId
from evaluation.judge import checkpoint as checkpoints
from evaluation.judge import drift
from evaluation.judge.checkpoint import Checkpoint, SavedDrift
from evaluation.judge.drift import DriftWatch
from evaluation.judge.impressions import ImpressionJoin
from evaluation.judge.merging import Decoder, LogRecord, Merge, Place
from evaluation.judge.rates import Rates, Series
from evaluation.judge.windows import MINUTE_MS, OTHER, VALUES_MAX, WINDOWS
from tests.unit.evaluation.live_log import APPENDED_MS, Appender

A, B = ("clicks", 0), ("clicks", 1)
SETTINGS = Settings(clicks_partitions=2, items_partitions=1, judge_sample=1.0)


def record(place: Place, at_ms: int, offset: int = 0, read_s: float = 0.0) -> LogRecord:
    made: Any = SimpleNamespace(partition=place[1], offset=offset, timestamp=at_ms)
    return LogRecord(place[0], made, at_ms, (), False, read_s)


def times(merge: Merge, ended: set[Place], now_s: float = 99.0, now_ms: int = 10**9) -> list[Any]:
    """(time, partitions of its records) of each group."""
    found = []
    while group := merge.next(ended, now_s, now_ms):
        found.append((group.at_ms, [one.record.partition for one in group.records]))
    return found


def test_groups_leave_in_the_order_of_time() -> None:
    merge = Merge([A, B], wait_s=0)
    merge.add(A, [record(A, 1), record(A, 3), record(A, 3), record(A, 9)])
    merge.add(B, [record(B, 2), record(B, 3), record(B, 4)])
    # A may bring no more records of 4; B may.
    assert times(merge, set()) == [(1, [0]), (2, [1]), (3, [0, 0, 1])]
    assert times(merge, {B}) == [(4, [1])]
    assert times(merge, {B}) == [], "A may bring another record of 9"
    assert times(merge, {A, B}) == [(9, [0])]


def test_a_partition_that_was_not_read_holds_the_others_up() -> None:
    merge = Merge([A, B], wait_s=0)
    merge.add(A, [record(A, 5), record(A, 6)])
    assert times(merge, {A}) == []
    merge.add(B, [record(B, 5), record(B, 7)])
    assert times(merge, {A}) == [(5, [0, 1]), (6, [0])]


@pytest.mark.parametrize("now_s, now_ms, complete", [(11.9, 0, False), (12.0, 0, True)])
def test_a_partition_at_its_end_is_waited_for(now_s: float, now_ms: int, complete: bool) -> None:
    """By this machine's own clock: the broker's may differ."""
    merge = Merge([A, B], wait_s=2)
    merge.add(A, [record(A, 5, read_s=10.0), record(A, 6, read_s=10.0)])
    assert bool(times(merge, {A, B}, now_s, now_ms)) is complete


def test_records_of_long_ago_are_not_waited_for() -> None:
    merge = Merge([A, B], wait_s=2)
    merge.add(A, [record(A, 5, read_s=10.0)])
    assert times(merge, {A, B}, 10.1, 2_004) == []
    assert times(merge, {A, B}, 10.1, 2_005) == [(5, [0])]


def test_a_late_record_leaves_at_once_and_alone() -> None:
    merge = Merge([A, B], wait_s=0)
    merge.add(A, [record(A, 5), record(A, 8)])
    merge.add(B, [record(B, 7), record(B, 2), record(B, 9)])
    assert times(merge, set()) == [(5, [0]), (7, [1]), (2, [1])]
    merge.add(A, [record(A, 3)])
    assert times(merge, set()) == [(8, [0]), (3, [0])], "a partition keeps its order"


def test_any_merge_keeps_the_order_of_each_partition_and_loses_nothing() -> None:
    for seed in range(30):
        draw = random.Random(seed)
        places = [(CLICKS, 0), (CLICKS, 1), (ITEMS, 0)]
        logs = {p: [record(p, draw.randrange(12), n) for n in range(25)] for p in places}
        merge, read, out = Merge(places, wait_s=0), dict.fromkeys(places, 0), []
        while True:
            for place in places:
                some = logs[place][read[place] : read[place] + draw.randrange(4)]
                merge.add(place, some)
                read[place] += len(some)
            ended = {p for p in places if read[p] == 25}
            while group := merge.next(ended, 9.0, 10**9):
                assert {one.at_ms for one in group.records} == {group.at_ms}
                out += [
                    (one.topic, one.record.partition, one.record.offset) for one in group.records
                ]
            if len(ended) == 3:
                break
        for place in places:
            mine = [offset for *at, offset in out if tuple(at) == place]
            assert mine == list(range(25)), (seed, place)


def test_the_time_of_a_record() -> None:
    appender = Appender(SETTINGS)
    decoder = Decoder(SETTINGS, lambda user: user != "bob", APPENDED_MS + 4)

    def decode(topic: str, made: Any) -> LogRecord:
        return decoder.decode(topic, made, 0.0)

    early = decode(CLICKS, appender.click(Click(user_id="ana", item_id="i", at_ms=7 * 10**11)))
    assert early.at_ms == 7 * 10**11 and [e.user_id for e in early.events] == ["ana"]
    future = appender.click(Click(user_id="ana", item_id="i", at_ms=APPENDED_MS + 60_000))
    assert decode(CLICKS, future).at_ms == future.timestamp
    # Without a time: from the start where it was there before the judge, else as appended.
    before = appender.item(Item(item_id="i"))
    deleted = appender.append(ITEMS, "i", None)
    after = appender.item(Item(item_id="i"))
    assert [decode(ITEMS, one).at_ms for one in (before, deleted, after)] == [
        0,
        deleted.timestamp,
        after.timestamp,
    ]
    assert not decode(USERS, appender.profile(UserProfile(user_id="ana"))).ignored
    assert decode(USERS, appender.profile(UserProfile(user_id="bob"))).ignored
    assert not decode(USERS, appender.append(USERS, "ana", None)).ignored
    # A stray is forwarded by ingest, and counts where it lies then.
    stray = appender.append(CLICKS, "ana", early.record.value, partition=1 - early.record.partition)
    assert decode(CLICKS, stray).ignored and decoder.rejected == 0
    bad = decode(CLICKS, appender.append(CLICKS, "ana", b"{"))
    assert bad.ignored and bad.at_ms == bad.record.timestamp and decoder.rejected == 1


def add(rates: Rates, at_ms: int, rank: float, generation: str = "1", scene: str = "") -> None:
    rates.add(generation, at_ms, scene, "5-19", {"towers": rank})


def test_a_window_has_what_happened_in_it() -> None:
    rates, start = Rates(), 1_000 * 24 * 60 * MINUTE_MS
    for minute in range(24 * 60 + 30):
        add(rates, start + minute * MINUTE_MS, 1 if minute % 2 else 51)
    series = Series("1", "towers", "all", "")
    for window, targets, hits in (("15m", 15, 8), ("1h", 60, 30)):
        counts = rates.counts(window)[series]
        assert (counts.targets, counts.hits) == (targets, [hits, hits, targets])
    day = rates.counts("24h")[series]
    # Its buckets have 15 minutes: the newest one is full here.
    assert day.targets == 24 * 60 and day.hits == [720, 720, 1440]
    assert day.reciprocal == pytest.approx(720 + 720 / 51)
    total = rates.counts("total")[series]
    assert total.targets == 24 * 60 + 30
    # A late target counts in the windows that have its time.
    add(rates, start + 24 * 60 * MINUTE_MS, 1)
    assert rates.counts("15m")[series].targets == 15
    assert rates.counts("1h")[series].targets == 61
    # After a pause the windows are of the newest time.
    add(rates, start + 9 * 24 * 60 * MINUTE_MS, 7)
    assert {rates.counts(window)[series].targets for window in WINDOWS} == {1}


def test_buckets_scenes_and_generations_are_bounded() -> None:
    rates = Rates()
    for n in range(5_000):
        add(rates, n * MINUTE_MS, 1, scene=f"scene-{n}")
    buckets = [len(of_width) for of_width in rates._buckets.values()]
    assert buckets == [
        max(n for w, n in WINDOWS.values() if w == width) for width in rates._buckets
    ]
    scenes = {s.value for s in rates.counts("total") if s.group == "scene"}
    assert len(scenes) == VALUES_MAX + 1 and OTHER in scenes
    assert rates.counts("total")[Series("1", "towers", "scene", OTHER)].targets == 4_980
    for generation in ("2", "3"):
        add(rates, 5_000 * MINUTE_MS, 1, generation)
    for window in ("total", *WINDOWS):
        assert {s.generation for s in rates.counts(window)} == {"2", "3"}


def test_rates_are_the_same_after_a_restart() -> None:
    rates = Rates()
    for n in range(200):
        add(rates, n * 20_000, n % 60 + 1, scene="home" if n % 3 else "")
    loaded = Rates.load(rates.export())
    assert loaded.rates() == rates.rates() and len(rates.rates()) == 12
    for one in (rates, loaded):
        add(one, 200 * 20_000, 3, scene="basket")
    assert loaded.rates() == rates.rates()
    [rate] = [r for r in rates.rates() if r.window == "total" and r.group == "all"]
    assert (rate.low[0], rate.high[0]) == wilson(round(rate.hr[0] * 201), 201)
    assert rate.low[0] < rate.hr[0] < rate.high[0]


def test_wilsons_interval_holds_the_rate_as_often_as_it_says() -> None:
    draw, inside = random.Random(3), 0
    for _ in range(2_000):
        low, high = wilson(sum(draw.random() < 0.1 for _ in range(150)), 150)
        inside += low <= 0.1 <= high
    assert 0.93 < inside / 2_000 < 0.97


def test_a_fall_of_the_hit_rate_is_named_and_a_steady_one_is_not() -> None:
    draw = random.Random(5)
    watch = DriftWatch("1")
    for n in range(4_000):
        watch.add(n, draw.random() < 0.3)
    assert watch.found == 0 and watch.last is None
    for n in range(4_000, 8_000):
        watch.add(n, draw.random() < 0.1)
    assert watch.found >= 1 and watch.last is not None
    assert watch.last.what == "fall" and watch.last.before > watch.last.after
    found, last = watch.found, watch.last
    restarted = DriftWatch("1", watch.hits, found, last)
    for n in range(8_000, 10_000):
        hit = draw.random() < 0.1
        watch.add(n, hit)
        restarted.add(n, hit)
    assert restarted.found == watch.found == found, "a restart is no drift"


def test_without_river_nothing_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "make_adwin", lambda: None)
    watch = DriftWatch("1")
    for n, hit in enumerate(itertools.chain([True] * 2_000, [False] * 2_000)):
        watch.add(n, hit)
    assert watch.found == 0


LOGS = {topic: LogId("cluster", topic) for topic in SOURCES}


def saved(settings: Settings, **more: Any) -> Checkpoint:
    fields: dict[str, Any] = {
        "layout": checkpoints.layout_of(settings),
        "logs": LOGS,
        "positions": {A: 7, B: 0},
        "since_ms": 1,
        "started_ms": 2,
        "scored": 3,
        "skipped": 4,
        "applied": 5,
        "rejected": 6,
        "store": b"store",
        "rates": Rates().export(),
        "impressions": ImpressionJoin(lambda user: True).export(),
        "drifts": {"1": SavedDrift(hits=b"\x01\x00", found=1, last=None)},
    }
    return Checkpoint(**fields | more)


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, data_dir=str(tmp_path))
    assert checkpoints.read(settings, LOGS) is None
    checkpoints.write(settings, saved(settings))
    assert checkpoints.read(settings, LOGS) == saved(settings)


@pytest.mark.parametrize("why", ["damaged", "format", "version", "written with", "made anew"])
def test_a_checkpoint_that_does_not_fit_is_not_used(
    tmp_path: Path, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = msgspec.structs.replace(SETTINGS, data_dir=str(tmp_path))
    logs = dict(LOGS)
    checkpoints.write(settings, saved(settings, version=0) if why == "version" else saved(settings))
    path = checkpoints.path_of(settings)
    if why == "damaged":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif why == "format":
        checkpoints.write(settings, msgspec.Raw(b"\x01"))  # type: ignore[arg-type]
    elif why == "written with":
        settings = msgspec.structs.replace(settings, judge_sample=0.5)
    elif why == "made anew":
        logs[CLICKS] = LogId("cluster", "another")
    assert checkpoints.read(settings, logs) is None
    assert why in caplog.text or any(why in str(r.__dict__.get("reason")) for r in caplog.records)
