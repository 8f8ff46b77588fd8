"""The judge on logs in memory: its counts are those of `evaluate`."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from eddyline.kafka.topics import CLICKS
from eddyline.schema import events
from eddyline.schema.event_decay import decays
from eddyline.schema.events import Click, Forget
from eddyline.schema.step_ranges import FOREVER, StepRanges
from eddyline.schema.user_sample import is_sampled
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from embeddings.bundle.bundle import Bundle
from evaluation import offline
from evaluation.engine import Engine
from evaluation.judge.judge import SHARE_MIN, Judge
from evaluation.judge.rates import Rates, Series
from evaluation.judge.step_ranges import FollowedStepRanges
from evaluation.judge.track import Ranked
from evaluation.judge.windows import ALL
from tests.co_visit_totals import totals
from tests.decayed_events import NO_DECAY, stored_counts
from tests.unit.evaluation.live_log import (
    LOGS,
    Appender,
    append_log,
    counts_of,
    feed,
    judged,
    make_judge,
    timed,
)
from tests.unit.evaluation.small import BASE_MS, make_bundle, make_items, make_log

SETTINGS = Settings(
    popular_limit=9,
    history_length_max=30,
    judge_sample=1.0,
    clicks_partitions=3,
    items_partitions=2,
    item_slots=1,
    path_state="all",
    popular_fast_half_life_events=NO_DECAY,
)
SPLIT = 0.4
ROWS = ("towers", "popular", "newest", "cascade")


@pytest.mark.parametrize("repeats", ["drop", "keep"])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_count_is_that_of_evaluate(bundle: Bundle, repeats: str, seed: int) -> None:
    settings = msgspec.structs.replace(SETTINGS, judge_repeats=repeats)
    log = make_log(seed, events=400, users=12, items=timed(make_items()))
    _, outcome = offline.evaluate(
        settings,
        log,
        bundle,
        name="log",
        split=SPLIT,
        keeps_repeats=repeats == "keep",
        seed=0,
        rows=ROWS,
    )
    appender, since_ms = append_log(log, settings, log.split(SPLIT))
    judge = make_judge(settings, bundle, since_ms)
    feed(judge, appender.topics, seed)
    judge.settle()
    wanted = counts_of(outcome, ROWS)
    assert judged(judge) == wanted
    assert wanted["cascade"][0] > 50 and wanted["cascade"][1][0] > 10
    assert wanted["towers"] != wanted["popular"] != wanted["newest"]
    # And by stage of the user: the list is long enough to hold every event.
    before = outcome.scored.user_before[outcome.kept]
    for stage, low, high in (("0", 0, 0), ("1-4", 1, 4), ("5-19", 5, 19), ("20+", 20, 10**9)):
        mine = (before >= low) & (before <= high)
        found = judged(judge, "stage", stage).get("cascade", (0, [0, 0, 0], 0.0))
        ranks = outcome.rows["cascade"].ranks[outcome.kept][mine]
        assert found[0] == mine.sum() and found[1][0] == (ranks <= 10).sum(), stage


def test_nothing_depends_on_the_pieces_in_which_partitions_are_read(bundle: Bundle) -> None:
    log = make_log(5, events=200, items=timed(make_items()))
    appender, since_ms = append_log(log, SETTINGS, log.split(SPLIT))
    found = []
    for seed in (1, 2, 3):
        judge = make_judge(SETTINGS, bundle, since_ms)
        feed(judge, appender.topics, seed)
        judge.write()
        tracks = judge.tracks["1"]
        found.append((judged(judge), tracks.engine.store.snapshot().embeddings))
    assert found[0] == found[1] == found[2]


def ranks_of(judge: Judge) -> list[tuple[str, str, int, dict[str, float]]]:
    """(user, item, time, ranks) of each target of a judge that is read from now on."""
    found: list[tuple[str, str, int, dict[str, float]]] = []
    count = judge._count

    def note(generation: str, target: Ranked) -> None:
        click = target.click
        found.append((click.user_id, click.item_id, click.at_ms, dict(target.ranks)))
        count(generation, target)

    for track in judge.tracks.values():
        track._on_ranked = note
    return found


@pytest.mark.parametrize("paths", ["towers,popular,newest", "next,co_visits_both,towers"])
def test_a_sample_has_the_ranks_that_its_users_have_among_all(bundle: Bundle, paths: str) -> None:
    log = make_log(3, events=500, users=20, items=timed(make_items()))
    found = []
    for sample in (1.0, 0.4):
        settings = msgspec.structs.replace(SETTINGS, judge_sample=sample, recall_paths=paths)
        appender, since_ms = append_log(log, settings, log.split(SPLIT))
        judge = make_judge(settings, bundle, since_ms)
        ranks = ranks_of(judge)
        feed(judge, appender.topics)
        judge.write()
        found.append(ranks)
        store = judge.tracks["1"].engine.store.snapshot()
        assert {user for _, user in store.histories} == {
            u for u in log.user_ids if judge.follows(u)
        }
    everyone, some = found
    assert 0 < len(some) < len(everyone)
    assert some == [one for one in everyone if is_sampled(one[0], 0.4)]
    of_path = [ranks[paths.split(",")[0]] for *_, ranks in some]
    assert sum(rank < float("inf") for rank in of_path) > 10


def restarted(judge: Judge) -> Judge:
    """A new judge from what a checkpoint of this one holds."""
    judge.write()
    [track] = judge.tracks.values()
    store = MemoryStore.load(track.engine.store.export())
    again = Judge(judge.settings, Rates.load(judge.rates.export()), since_ms=judge.since_ms)
    engine = Engine(judge.settings, track.engine.bundle, LOGS, store=store, follows=again.follows)
    engine.fill_index()
    again.open(engine)
    return again


@pytest.mark.parametrize("stop_after", [1, 37, 90, 140])
def test_a_restart_counts_nothing_twice_and_leaves_nothing_out(
    bundle: Bundle, stop_after: int
) -> None:
    log = make_log(4, events=400, users=12, items=timed(make_items()))
    appender, since_ms = append_log(log, SETTINGS, log.split(0.2))
    judge = make_judge(SETTINGS, bundle, since_ms)
    feed(judge, appender.topics)
    judge.write()
    first = make_judge(SETTINGS, bundle, since_ms)
    positions = feed(first, appender.topics, 1, stop_after=stop_after)
    again = restarted(first)
    # What was read beyond the checkpoint by the process that died makes no difference.
    feed(first, appender.topics, 2, stop_after=20, positions=positions)
    feed(again, appender.topics, 3, positions=positions)
    again.write()
    assert again.rates.rates() == pytest.approx(judge.rates.rates())
    assert judged(again) == judged(judge) and judged(judge)["cascade"][0] > 50
    stores = [one.tracks["1"].engine.store for one in (again, judge)]
    states = [store.snapshot() for store in stores]
    clicked = [stored_counts(store, "i0", decays(SETTINGS)) for store in stores]
    assert clicked[0] == clicked[1] and clicked[0]["events"] > 300
    for state in states:
        state.trends = {}
        state.histories = {user: history for user, (history, _) in state.histories.items()}
        # Which partition's visits are appended first differs.
        state.rows = {key: totals(row) for key, row in state.rows.items()}
    assert states[0] == states[1] and states[0].rows


def test_resent_forgotten_and_moved_events_are_no_targets(bundle: Bundle) -> None:
    appender = Appender(SETTINGS)
    for item in timed(make_items()):
        appender.item(item)

    def click(user: str, item: str, at_ms: int, **more: Any) -> None:
        appender.click(Click(user_id=user, item_id=item, at_ms=BASE_MS + at_ms, **more))

    click("ana", "i1", 1, event_id="e1")
    click("ana", "i2", 2, event_id="e2")
    click("ana", "i9", 3, event_id="e1")  # sent again: the first one counts
    click("ana", "i3", 4, event_id="e3")
    click("ana", "i4", 4, event_id="e3")  # in the same group
    click("ana", "i5", 5, kind="dislike")
    click("ana", "i6", 6, context=events.moved_context(0))
    forget = Forget(user_id="ana", forget_until_ms=BASE_MS + 10, users_offset=0)
    appender.append(CLICKS, "ana", events.encode(forget))
    click("ana", "i7", 9)  # happened before the request
    click("ana", "i8", 11)
    judge = make_judge(SETTINGS, bundle, 0)
    ranks = ranks_of(judge)
    feed(judge, appender.topics)
    judge.write()
    assert [item for _, item, *_ in ranks] == ["i1", "i2", "i3", "i8"]
    # After the Forget the user is new: the towers return nothing.
    assert ranks[2][3]["towers"] < float("inf") == ranks[3][3]["towers"]
    listed = judge.tracks["1"].engine.user("ana").history.entries
    assert [entry.item_id for entry in listed] == ["i8"]


def test_a_checkpoint_holds_no_trace_of_a_forgotten_user(bundle: Bundle) -> None:
    """Neither the state nor clicks that wait for their answers."""
    settings = msgspec.structs.replace(SETTINGS, answers_sample=1.0)
    users = ["somebody-who-goes", "somebody-who-stays"]
    appender = Appender(settings)
    for item in timed(make_items()):
        appender.item(item)
    for user in users:
        for n in range(1, 8):
            click = Click(user_id=user, item_id=f"i{n}", at_ms=BASE_MS + n, impression_id=f"a{n}")
            appender.click(click)
    forget = Forget(user_id=users[0], forget_until_ms=BASE_MS + 10, users_offset=0)
    appender.append(CLICKS, users[0], events.encode(forget))
    judge = make_judge(settings, bundle, 0)
    seen: list[set[str]] = []

    def note(judge: Judge) -> None:
        judge.write()
        [track] = judge.tracks.values()
        parts = track.engine.store.export(), judge.impressions.export(), judge.rates.export()
        seen.append({user for user in users if user.encode() in b"".join(parts)})

    feed(judge, appender.topics, on_group=note)
    assert set(users) in seen, "what is searched for can be found"
    assert seen[-1] == {users[1]}


def test_a_judge_that_is_behind_scores_fewer_and_applies_all(bundle: Bundle) -> None:
    log = make_log(6, events=600, users=60, items=timed(make_items()))
    appender, since_ms = append_log(log, SETTINGS, 0)
    everyone, fewer = (make_judge(SETTINGS, bundle, since_ms) for _ in range(2))
    fewer.fall_behind(True)
    fewer.fall_behind(True)
    assert fewer.share == 0.25
    for judge in (everyone, fewer):
        feed(judge, appender.topics)
        judge.write()
    assert 0 < fewer.scored < everyone.scored / 2
    assert fewer.scored + fewer.skipped == everyone.scored
    states = [one.tracks["1"].engine.store.snapshot() for one in (everyone, fewer)]
    assert states[0].embeddings == states[1].embeddings
    assert states[0].buckets == states[1].buckets
    for _ in range(20):
        fewer.fall_behind(True)
    assert fewer.share == SHARE_MIN
    for _ in range(20):
        fewer.fall_behind(False)
    assert fewer.share == 1.0


def test_another_generation_goes_on_from_what_is_known(
    bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = make_bundle(tmp_path_factory.mktemp("second"), timed(make_items()), "2", seed=8)
    log = make_log(7, events=400, users=10, items=timed(make_items()))
    appender, since_ms = append_log(log, SETTINGS, 0)
    # From the beginning, with micro-steps from the offsets on at which the other one switches.
    judge = make_judge(SETTINGS, bundle, since_ms)
    positions = feed(judge, appender.topics, 1, stop_after=90)
    judge.write()
    before = judged(judge)
    old = judge.tracks["1"].engine
    store = MemoryStore.load(old.store.export())
    for _ in store.remove_embeddings("1", [f"u{p}" for p in range(3)]):
        pass
    recorded = {
        ("2", p): StepRanges(str(LOGS[CLICKS]), ((positions[CLICKS, p], FOREVER),))
        for p in range(3)
    }
    engine = Engine(
        SETTINGS, other, LOGS, store=store, follows=judge.follows, steps=FollowedStepRanges({})
    )
    engine.fill_index()
    judge.replace(engine)
    switched = ranks_of(judge)
    feed(judge, appender.topics, 2, positions=positions)
    judge.write()
    wanted = Judge(SETTINGS, since_ms=since_ms)
    whole = Engine(
        SETTINGS, other, LOGS, follows=wanted.follows, steps=FollowedStepRanges(recorded)
    )
    wanted.open(whole)
    ranks = ranks_of(wanted)
    feed(wanted, appender.topics, 3)
    wanted.write()
    assert len(switched) > 50 and switched == ranks[-len(switched) :]
    total = judge.rates.counts("total")
    for row in ROWS:
        assert total[Series("1", row, ALL, "")].targets == before[row][0]
        assert total[Series("2", row, ALL, "")].targets == len(switched)


def test_a_wrong_clock_and_many_scenes_move_no_window(bundle: Bundle) -> None:
    appender = Appender(SETTINGS)
    for item in timed(make_items()):
        appender.item(item)
    for n in range(40):
        ahead_ms = 200_000 if n == 7 else 0
        context: dict[str, Any] = {"scene": f"page-{n}"} if n % 2 else {"other": 1}
        click = Click(
            user_id=f"u{n}", item_id="i3", at_ms=appender.now_ms + ahead_ms, context=context
        )
        appender.click(click)
    judge = make_judge(SETTINGS, bundle, 0)
    feed(judge, appender.topics)
    judge.settle()
    assert judge.rates.newest_ms <= appender.now_ms
    assert judge.rates.counts("15m")[Series("1", "cascade", ALL, "")].targets == 40
    scenes = {s.value for s in judge.rates.counts("15m") if s.group == "scene"}
    assert scenes == {f"page-{n}" for n in range(1, 40, 2)}
