"""The judge on a real Kafka: its counts are those of `evaluate`, after kill -9; new generations."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cli.commands import replay_file
from eddyline import generations
from eddyline.generations import Manifest
from eddyline.kafka import topics
from eddyline.kafka.producers import now_ms
from eddyline.schema.events import Click, shifted_to_now
from eddyline.settings.loader import Settings
from embeddings.bundle import bundle as bundles
from evaluation import offline, protocol
from evaluation.event_log import LogBuilder
from evaluation.judge import checkpoint as checkpoints
from evaluation.judge import reader
from evaluation.judge import report as reports
from evaluation.judge.merging import Decoder
from evaluation.judge.rates import Rates, Series
from evaluation.judge.reader import open_reader
from evaluation.judge.report import JudgeReport
from evaluation.judge.windows import ALL
from evaluation.product import Product
from sandbox.datasets.dataset import Dataset
from tests.unit.evaluation.live_log import counts_of
from tests.unit.evaluation.small import D, make_bundle

pytestmark = pytest.mark.timeout(200)
ROWS = ("towers", "popular", "newest", "cascade")
EVENTS = 1_000
NAMES = (
    "kafka_bootstrap_servers",
    "namespace",
    "data_dir",
    "bundle_dir",
    "clicks_partitions",
    "items_partitions",
    "judge_sample",
    "judge_checkpoint_s",
    "judge_report_s",
    "judge_wait_s",
    "popular_limit",
)


@contextmanager
def judging(settings: Settings, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A judge process; it needs no Redis, so none is named."""
    named = {f"EDDYLINE_{name.upper()}": str(getattr(settings, name)) for name in NAMES}
    out = Path(settings.data_dir) / "judge.log"
    with out.open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "cli", "judge", *arguments],
            env=os.environ | named,
            stderr=log,
            stdout=log,
        )
        try:
            yield child
        finally:
            child.kill()
            child.wait(20)


def wait_for(
    what: str, settings: Settings, check: Callable[[JudgeReport], Any], timeout_s: float = 60
) -> JudgeReport:
    deadline = time.monotonic() + timeout_s
    while True:
        report = reports.read(settings)
        if report is not None and check(report):
            return report
        text = (Path(settings.data_dir) / "judge.log").read_text(encoding="utf-8")
        assert time.monotonic() < deadline, f"{what}: {report}\n{text[-3_000:]}"
        time.sleep(0.05)


def prepared(
    settings: Settings, bundle: tuple[Path, Manifest], **more: Any
) -> tuple[Settings, Manifest]:
    folder, manifest = bundle
    fields = {"bundle_dir": str(folder), "judge_sample": 1.0, "judge_report_s": 1}
    made = msgspec.structs.replace(settings, judge_checkpoint_s=1, **fields | more)
    topics.ensure_topics(made)
    generations.publish(made, manifest)
    return made, manifest


def test_counts_are_those_of_evaluate_also_after_kill_9(
    fresh_settings: Settings, bundle: tuple[Path, Manifest], dataset: Dataset
) -> None:
    # Half of the items are not on the popular list, and some become live among the events.
    settings, manifest = prepared(fresh_settings, bundle, popular_limit=100)
    clicks = dataset.clicks[-EVENTS:]
    first_ms, span_ms = clicks[0].at_ms, clicks[-1].at_ms - clicks[0].at_ms
    builder = LogBuilder()
    for n, item in enumerate(dataset.items):
        at_ms = first_ms - 1_000 + n if n % 10 else first_ms + span_ms * n // len(dataset.items)
        builder.changes.append(msgspec.structs.replace(item, at_ms=at_ms))
    for n, profile in enumerate(dataset.profiles.values()):
        at_ms = first_ms + span_ms * n // len(dataset.profiles)
        builder.profiles.append(msgspec.structs.replace(profile, at_ms=at_ms))
    for click in clicks:
        builder.add(click)
    log = builder.build()
    events = [log.click(number) for number in range(len(log))]
    every = [*log.changes, *log.profiles, *events]
    # The rest follows after the kill, so that no machine is too fast for it.
    cut_ms = events[EVENTS // 2].at_ms
    replay_file.send(settings, [event for event in every if event.at_ms < cut_ms])

    with judging(settings, "--from-beginning") as child:
        path = checkpoints.path_of(settings)
        wait_for("some events", settings, lambda r: r.scored > EVENTS // 5 and path.exists())
        child.send_signal(signal.SIGKILL)
        child.wait(20)
        killed = reports.read(settings)
        assert killed is not None and killed.scored < len(protocol.scorable(log, 0))
    replay_file.send(settings, [event for event in every if event.at_ms >= cut_ms])
    with judging(settings) as child:
        total = sum(sum(topics.end_offsets(settings, name).values()) for name in topics.SOURCES)
        wait_for("the end", settings, lambda report: report.applied == total)
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0

    logs = dict(topics.log_ids(settings, topics.ARCHIVED))
    saved = checkpoints.read(settings, logs)
    assert saved is not None and saved.applied == total and saved.rejected == 0
    found = Rates.load(saved.rates).counts("total")
    product = Product(settings, bundles.load(settings.bundles / manifest.bundle))
    try:
        scored = len(protocol.scorable(log, 0))
        rows = [offline.ROWS[row](log, product, scored, 0) for row in ROWS]
        outcome = protocol.run(log, product, rows, 0, keeps_repeats=False)
    finally:
        product.close()
    wanted = counts_of(outcome, ROWS)
    assert saved.scored == scored and wanted["cascade"][0] > EVENTS // 3
    for row in ROWS:
        counts = found[Series(manifest.generation, row, ALL, "")]
        assert (counts.targets, counts.hits) == wanted[row][:2], row
        assert counts.reciprocal == pytest.approx(wanted[row][2], abs=1e-4)


def test_live_events_are_judged_and_a_new_generation_takes_over(
    fresh_settings: Settings, dataset: Dataset, tmp_path: Path
) -> None:
    """What was appended before the start only warms up."""
    folder = tmp_path / "generations"
    for seed, name in enumerate(("1", "2")):
        make_bundle(folder, dataset.items, name, seed=seed)
    first, second = (
        Manifest(generation=name, bundle=name, dimension=D, created_ms=now_ms())
        for name in ("1", "2")
    )
    settings, _ = prepared(fresh_settings, (folder, first))
    third = EVENTS // 3
    clicks = shifted_to_now(dataset.clicks[-EVENTS:], now_ms())
    parts = clicks[:third], clicks[third : 2 * third], clicks[2 * third :]
    _, some, more = (sum(one.kind != "dislike" for one in part) for part in parts)
    replay_file.send(settings, [*dataset.items, *parts[0]])
    before = sum(sum(topics.end_offsets(settings, name).values()) for name in topics.SOURCES)
    with judging(settings) as child:
        wait_for("the warm-up", settings, lambda report: report.applied == before)
        replay_file.send(settings, parts[1])
        total = before + len(parts[1])
        report = wait_for("live events", settings, lambda report: report.applied == total)
        assert report.scored == some and report.generation == "1" and report.share == 1.0
        assert not any(report.behind.values())
        generations.publish(settings, second)
        wait_for("the new generation", settings, lambda report: report.generation == "2")
        replay_file.send(settings, parts[2])
        wait_for("its events", settings, lambda report: report.scored == some + more)
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0
        final = reports.read(settings)
    assert final is not None
    targets = {
        one.generation: one.targets
        for one in final.rates
        if (one.window, one.row, one.group) == ("total", "cascade", ALL)
    }
    assert set(targets) == {"1", "2"} and targets["1"] <= some and targets["2"] <= more
    assert min(targets.values()) > third // 2


def test_partitions_that_were_paused_are_read_on(
    fresh_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others have to be read first; then not a record is missing, in any partition."""
    monkeypatch.setattr(reader, "BUFFER_MAX", 40)
    topics.ensure_topics(fresh_settings)
    start_ms = now_ms() - 10_000_000
    clicks = [
        Click(user_id=f"u{n % 97}", item_id="i1", at_ms=start_ms + n, event_id=f"e{n}")
        for n in range(6_000)
    ]
    replay_file.send(fresh_settings, clicks)
    decoder = Decoder(fresh_settings, lambda user: True, 0)
    found, deadline = [], time.monotonic() + 60
    with open_reader(fresh_settings, decoder, {}) as made:
        while len(found) < len(clicks) and time.monotonic() < deadline:
            made.read()
            while (group := made.next()) is not None:
                found += [one.events[0].event_id for one in group.records]
    assert len(found) == len(clicks) == len(set(found))
    assert sum(made.positions.values()) == len(clicks)
