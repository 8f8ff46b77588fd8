"""Logs that are sorted block by block are those that are sorted at once, in bounded memory."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from eddyline.schema.events import KINDS, Click, Item
from evaluation import event_files, event_log
from evaluation.event_log import EventLog, LogBuilder
from tests.unit.evaluation.small import BASE_MS


def clicks(seed: int, n: int) -> list[Click]:
    """In no order, many at one time, some resent, some with ids that end in a number."""
    rng = np.random.default_rng(seed)
    found = []
    for at in range(n):
        number = rng.integers(n // 10)
        found.append(
            Click(
                user_id=f"u{rng.integers(20)}",
                item_id=f"i{rng.integers(30)}",
                at_ms=BASE_MS + int(rng.integers(n // 3)),
                kind=KINDS[rng.integers(len(KINDS))],
                weight=float(rng.random()),
                event_id=f"a/{at}" if at % 3 else f"b/{number}" if at % 2 else f"c{number}",
            )
        )
    return found


def build(events: list[Click]) -> EventLog:
    builder = LogBuilder(descriptions={"i3": Item(item_id="i3", title="Three")})
    for click in events:
        builder.add(click)
    return builder.build()


@pytest.mark.parametrize("block", [1, 7, 100, 10_000])
def test_sorted_block_by_block(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    events = clicks(1, 300)
    monkeypatch.setattr(event_files, "BLOCK_EVENTS", block)
    monkeypatch.setattr(event_files, "CHUNK_EVENTS", 64)
    monkeypatch.setattr(event_log, "PART_EVENTS", 50)
    log = build(events)
    first = {}
    for click in events:
        first.setdefault(click.event_id, click)
    wanted = sorted(first.values(), key=lambda click: (click.at_ms, click.user_id))  # stable
    assert [log.click(n) for n in range(len(log))] == wanted
    assert log.resent == len(events) - len(wanted) > 20
    began = {}
    for click in wanted:
        began.setdefault(click.item_id, click.at_ms)
    assert {item.item_id: item.at_ms for item in log.changes} == began
    assert {item.item_id: item.title for item in log.changes}["i3"] == "Three"
    for end in (0, 49, 50, 51, len(log)):
        wanted_counts = np.bincount(log.items[:end], minlength=len(log.item_ids))
        assert log.counts(log.items, len(log.item_ids), end).tolist() == wanted_counts.tolist()


def test_a_log_needs_no_memory_for_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """37 bytes an event are in files; in memory is one block at a time."""
    monkeypatch.setattr(event_files, "BLOCK_EVENTS", 5_000)
    monkeypatch.setattr(event_files, "CHUNK_EVENTS", 1_000)
    monkeypatch.setattr(event_files, "_SAMPLE", 1_000)
    monkeypatch.setattr(event_log, "PART_EVENTS", 5_000)
    n, builder = 100_000, LogBuilder()
    tracemalloc.start()
    try:
        for at in range(n):
            builder.add(
                Click(
                    user_id=f"u{at % 9}",
                    item_id=f"i{at % 9}",
                    at_ms=BASE_MS + 7_919 * at % n,
                    event_id=f"import/8472089762ac248ba6a34e6b777b3a8d/{at}",
                )
            )
        log = builder.build()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(log) == n and (np.diff(log.at_ms) >= 0).all()
    assert peak < 10 * n and held < n, "the events alone are 37 bytes each"
    in_files = sum(path.stat().st_size for path in log.folder.iterdir())
    assert in_files == 37 * n, "nothing of the sorting is left"


def test_the_files_are_removed_with_the_log_or_its_builder() -> None:
    log = build(clicks(2, 50))
    folder = log.folder
    assert [*folder.iterdir()]
    copy = pickle.loads(pickle.dumps(log))
    assert [copy.click(n) for n in range(len(copy))] == [log.click(n) for n in range(len(log))]
    assert len(pickle.dumps(log)) < 20_000
    del copy
    assert folder.exists(), "another process's log removes nothing"
    del log
    assert not folder.exists()
    builder = LogBuilder()
    builder.add(Click(user_id="u", item_id="i", at_ms=BASE_MS))
    folder = Path(builder._folder)
    assert folder.exists()
    del builder
    assert not folder.exists()


def test_an_empty_log_has_no_events() -> None:
    log = LogBuilder().build()
    assert len(log) == 0 and log.changes == [] and log.split(0.5) == 0
