"""The judge's process without servers: its metrics, its lock, its step ranges."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from eddyline.errors import SettingsError
from eddyline.generations import Generations, Manifest
from eddyline.process.locks import try_lock
from eddyline.schema.events import Click
from eddyline.schema.step_ranges import FOREVER, StepRanges
from eddyline.settings.loader import Settings
from evaluation.judge import __main__ as main
from evaluation.judge import checkpoint, report
from evaluation.judge import process as judge_process
from evaluation.judge.metrics import JudgeCollector
from evaluation.judge.process import JudgeProcess
from evaluation.judge.step_ranges import FollowedStepRanges
from streams.clicks.step_ranges import OpenedSlot
from tests.unit.cli.test_judge_rates import report as make_report
from tests.unit.evaluation.live_log import APPENDED_MS, LOGS, Appender, feed, make_judge
from tests.unit.evaluation.small import BASE_MS, make_bundle, make_items


def metrics_of(found: Any) -> str:
    class Process:
        report = found

    registry = CollectorRegistry()
    process: Any = Process()
    registry.register(JudgeCollector(process))
    return generate_latest(registry).decode()


def test_the_metrics_are_those_of_the_newest_report() -> None:
    assert metrics_of(None) == ""
    text = metrics_of(make_report(share=0.5, skipped=7))
    series = 'generation="7",group="all",row="towers",value="",window="1h"'
    shown = 'generation="g1",group="path",position="all",value="towers",window="1h"'
    second = 'generation="g1",group="all",position="2",value=""'
    at_10 = series.replace(",row", ',k="10",row')
    for line in (
        "eddyline_judge_share 0.5",
        "eddyline_judge_targets_scored_total 40.0",
        "eddyline_judge_targets_skipped_total 7.0",
        'eddyline_judge_behind_records{topic="clicks"} 2.0',
        'eddyline_judge_drifts_total{generation="7"} 2.0',
        f"eddyline_judge_targets{{{series}}} 40.0",
        f"eddyline_judge_hit_rate{{{at_10}}} 0.25",
        "eddyline_judge_recorded_answers_total 50.0",
        'eddyline_judge_impression_clicks_total{outcome="joined"} 20.0',
        f"eddyline_judge_click_through{{{shown}}} 0.2",
        f"eddyline_judge_click_reciprocal_position{{{shown}}} 0.75",
        'eddyline_judge_impressions_total{generation="g1",group="all",position="3",value=""} 50.0',
        f"eddyline_judge_impressions_clicked_total{{{second}}} 10.0",
        'eddyline_judge_hits_total{generation="7",group="stage",k="10",row="towers",value="5-19"}'
        " 10.0",
    ):
        assert line in text, line
    assert 'bound="low",generation="7",group="all",k="100"' in text
    # A scene has one rate in a window.
    assert 'group="scene",k="10"' in text
    assert not any("hit_rate{" in line and 'group="scene",k="50"' in line for line in text.split())


def test_a_second_judge_on_one_folder_is_refused(tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path))
    lock = try_lock(tmp_path / "judge" / "lock")
    assert lock is not None
    with pytest.raises(SettingsError, match="another judge runs there"):
        main._run(settings, threading.Event())
    lock.release()


def test_a_judge_that_never_began_writes_nothing(tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path), kafka_bootstrap_servers="127.0.0.1:1")
    process = JudgeProcess(settings, threading.Event())
    assert process.report is None
    assert not checkpoint.path_of(settings).exists() and not report.path_of(settings).exists()


def test_steps_are_taken_where_ingest_takes_them() -> None:
    known = StepRanges("log", ((3, FOREVER),))
    rule = FollowedStepRanges({("1", 0): known})
    new, old = OpenedSlot(0, "log", 9, {}), OpenedSlot(1, "log", 9, {})
    restored = OpenedSlot(1, "log", 9, {"1": StepRanges("log", ((5, FOREVER),))})
    other_log = OpenedSlot(0, "other", 9, {})
    found = rule.open([new, old, restored, other_log], ["1"])
    from_now = ((9, FOREVER),)
    assert found[0] == {"1": known}
    assert found[1] == {"1": StepRanges("log", from_now)}
    assert found[2] == {"1": StepRanges("log", ((5, FOREVER),))}
    assert found[3] == {"1": StepRanges("other", from_now)}


def test_idle_users_leave_the_state(tmp_path: Path) -> None:
    settings = Settings(
        data_dir=str(tmp_path),
        clicks_partitions=1,
        items_partitions=1,
        judge_sample=1.0,
        user_idle_s_max=60,
    )
    appender = Appender(settings)
    for user, at_ms in (("idle", 0), ("ana", 50_000), ("ana", 80_000)):
        appender.now_ms = APPENDED_MS + at_ms
        appender.click(Click(user_id=user, item_id="i1", at_ms=BASE_MS + at_ms))
    process = JudgeProcess(settings, threading.Event())
    process._judge = judge = make_judge(settings, make_bundle(tmp_path, make_items()), 0)
    feed(judge, appender.topics)
    judge.write()
    [track] = judge.tracks.values()
    assert {user for _, user in track.engine.store.snapshot().histories} == {"idle", "ana"}
    process._remove_idle_users()
    state = track.engine.store.snapshot()
    assert {user for _, user in state.histories} == {"ana"}
    assert {user for *_, user in state.embeddings} == {"ana"}


class Reader:
    """What `_adapt` asks of a reader."""

    def __init__(self) -> None:
        self.lag, self.past = 0.0, False

    def lag_s(self) -> float:
        return self.lag

    def is_past(self, started_ms: int) -> bool:
        return self.past


def test_the_share_follows_the_lag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000.0]
    monkeypatch.setattr(judge_process.time, "monotonic", lambda: now[0])
    settings = Settings(data_dir=str(tmp_path), judge_lag_s_max=60)
    process, reader = JudgeProcess(settings, threading.Event()), Reader()

    def share_after(lag_s: float, seconds: float = judge_process.SHARE_S) -> float:
        reader.lag = lag_s
        now[0] += seconds
        process._adapt(reader)  # type: ignore[arg-type]
        return process._judge.share

    assert share_after(60.0) == 1.0
    assert share_after(60.1) == 0.5
    assert share_after(60.1, 0.5) == 0.5, "a change takes a while to show"
    assert share_after(90.0) == 0.25
    assert share_after(45.0) == 0.25, "it is less behind, but not yet near"
    reader.past = True
    assert share_after(10_000.0) == 0.25, "what was there before the start is no lag"
    reader.past = False
    assert [share_after(29.0) for _ in range(3)] == [0.5, 1.0, 1.0]


def test_a_generation_whose_bundle_is_missing_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(
        data_dir=str(tmp_path), clicks_partitions=1, items_partitions=1, judge_sample=1.0
    )
    folder = tmp_path / "generations"
    first = make_bundle(folder, make_items())
    process = JudgeProcess(settings, threading.Event())
    process._judge = judge = make_judge(settings, first, 0)
    process._logs = dict(LOGS)
    manifest = Manifest(generation="2", bundle="2", dimension=first.dimension, created_ms=1)
    found = Generations(active="2", manifests={"2": manifest})
    process._follow(found)
    assert list(judge.tracks) == ["1"] and "cannot be judged yet" in caplog.text
    make_bundle(folder, make_items(), "2", seed=9)
    process._follow(found)
    assert list(judge.tracks) == ["2"]
    process._follow(found)
    assert list(judge.tracks) == ["2"]
