"""The blender's row: `evaluate` and the judge learn the same, to the bit, across restarts."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from embeddings.bundle.bundle import Bundle
from evaluation import offline
from evaluation.blend_learner import Guard
from evaluation.blend_row import BlendRow
from evaluation.engine import Engine
from evaluation.event_log import EventLog
from evaluation.judge.judge import Judge
from evaluation.judge.rates import Rates
from evaluation.product import Product
from evaluation.protocol import Outcome, run, scorable
from tests.unit.evaluation.live_log import (
    LOGS,
    append_log,
    counts_of,
    feed,
    judged,
    make_judge,
    timed,
)
from tests.unit.evaluation.small import make_items, make_log

SETTINGS = Settings(
    popular_limit=9,
    history_length_max=30,
    judge_sample=1.0,
    clicks_partitions=3,
    items_partitions=2,
    fusion="blend",
    path_candidates=5,
)
SPLIT = 0.4


def a_log(seed: int) -> EventLog:
    return make_log(seed, events=400, users=12, items=timed(make_items()))


def replay(
    log: EventLog,
    bundle: Bundle,
    settings: Settings = SETTINGS,
    *,
    keep: bool = False,
    every: int = 1,
) -> tuple[BlendRow, Outcome]:
    """The row after the events from the split on, and what it found."""
    first, product = log.split(SPLIT), Product(settings, bundle)
    row = BlendRow(product, "blend", len(scorable(log, first)), learns_every=every)
    return row, run(log, product, [row], first, keeps_repeats=keep)


@pytest.mark.parametrize("repeats", ["drop", "keep"])
def test_the_judge_learns_what_evaluate_learns(bundle: Bundle, repeats: str) -> None:
    settings = msgspec.structs.replace(SETTINGS, judge_repeats=repeats)
    log = a_log(1)
    row, outcome = replay(log, bundle, settings, keep=repeats == "keep")
    appender, since_ms = append_log(log, settings, log.split(SPLIT))
    judge = make_judge(settings, bundle, since_ms)
    feed(judge, appender.topics, 3)
    judge.settle()
    assert judged(judge)["blend"] == counts_of(outcome, ["blend"])["blend"]
    assert judge.learner is not None and judge.learner.blender.learned > 30
    assert judge.learner.blender.encode() == row.learner.blender.encode()


def test_its_ranks_are_those_of_the_answers_that_it_serves(bundle: Bundle) -> None:
    log = a_log(2)
    row, _ = replay(log, bundle)
    results, events = row.results["blend"], scorable(log, log.split(SPLIT))
    served = {number: ids for number, ids in results.lists.items() if len(ids) == 10}
    assert len(served) > 5
    for number, ids in served.items():
        item, rank = log.item_ids[log.items[events[number]]], results.ranks[number]
        assert (item in ids) == (rank <= 10), (number, rank)


def test_a_target_that_no_path_has_teaches_nothing_and_is_behind_all(bundle: Bundle) -> None:
    settings = msgspec.structs.replace(SETTINGS, path_candidates=1, recall_paths="newest")
    row, outcome = replay(a_log(3), bundle, settings)
    ranks = outcome.rows["blend"].ranks[outcome.kept]
    assert row.learner.blender.learned == np.count_nonzero(ranks == 1) < len(ranks)
    assert (ranks[ranks > 1] > 3).all()


@pytest.mark.parametrize("path", ["popular", "popular_fast", "co_visits", "next"])
def test_every_path_has_candidates(bundle: Bundle, path: str) -> None:
    settings = msgspec.structs.replace(SETTINGS, path_candidates=9, recall_paths=path)
    row, _ = replay(a_log(3), bundle, settings)
    assert row.learner.blender.learned > 10


@pytest.mark.parametrize("every", [1, 2, 10])
def test_one_of_n_targets_teaches(bundle: Bundle, every: int) -> None:
    log = a_log(1)
    row, _ = replay(log, bundle, keep=True, every=every)
    assert 0 < row.learner.blender.learned <= -(-len(log) // every)


@pytest.mark.parametrize("stop_after", [1, 37, 140])
def test_a_restart_goes_on_with_the_same_bits(bundle: Bundle, stop_after: int) -> None:
    log = a_log(4)
    appender, since_ms = append_log(log, SETTINGS, log.split(0.2))
    whole = make_judge(SETTINGS, bundle, since_ms)
    feed(whole, appender.topics)
    first = make_judge(SETTINGS, bundle, since_ms)
    positions = feed(first, appender.topics, 1, stop_after=stop_after)
    first.write()
    [track] = first.tracks.values()
    again = Judge(SETTINGS, Rates.load(first.rates.export()), since_ms=since_ms)
    assert first.learner is not None
    again.learned = first.learner.encode()
    store = MemoryStore.load(track.engine.store.export())
    engine = Engine(SETTINGS, bundle, LOGS, store=store, follows=again.follows)
    engine.fill_index()
    again.open(engine)
    feed(again, appender.topics, 2, positions=positions)
    for judge in (whole, again):
        judge.write()
    assert whole.learner is not None and again.learner is not None
    assert again.learner.encode() == whole.learner.encode()
    assert judged(again) == judged(whole)


def test_what_was_learned_for_other_paths_is_not_gone_on_with(bundle: Bundle) -> None:
    row, _ = replay(a_log(1), bundle)
    other = msgspec.structs.replace(SETTINGS, recall_paths="popular,newest")
    again = Judge(other, since_ms=0)
    again.learned = row.learner.encode()
    again.open(Engine(other, bundle, LOGS, follows=again.follows))
    assert again.learner is not None
    assert (again.learner.blender.learned, again.learner.guard) == (0, Guard())


def test_another_generation_goes_on_with_what_was_learned(bundle: Bundle) -> None:
    log = a_log(2)
    appender, since_ms = append_log(log, SETTINGS, 0)
    judge = make_judge(SETTINGS, bundle, since_ms)
    feed(judge, appender.topics)
    assert judge.learner is not None
    before = judge.learner.encode()
    judge.replace(Engine(SETTINGS, bundle, LOGS, follows=judge.follows))
    assert judge.learner.encode() == before and judge.learner.blender.learned > 30


def test_the_sample_limits_who_is_scored_and_not_whose_lists_are_kept(bundle: Bundle) -> None:
    settings = msgspec.structs.replace(SETTINGS, judge_sample=0.4)
    log = a_log(3)
    appender, since_ms = append_log(log, settings, 0)
    judge = make_judge(settings, bundle, since_ms)
    feed(judge, appender.topics)
    judge.write()
    listed = {user for _, user in judge.tracks["1"].engine.store.snapshot().histories}
    assert listed == set(log.user_ids)
    everyone = make_judge(SETTINGS, bundle, since_ms)
    feed(everyone, appender.topics)
    assert 0 < judge.scored < everyone.scored


def test_evaluate_takes_one_process_for_it(bundle: Bundle) -> None:
    reports = [
        offline.evaluate(
            SETTINGS,
            a_log(1),
            bundle,
            name="log",
            split=SPLIT,
            keeps_repeats=False,
            seed=0,
            rows=["blend"],
            wanted_processes=wanted,
        )[0]
        for wanted in (1, 2)
    ]
    assert msgspec.json.encode(reports[0]) == msgspec.json.encode(reports[1])
