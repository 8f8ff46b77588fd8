"""The judge joins recorded answers with clicks, in any order of reading and through a restart."""

from __future__ import annotations

import random

import msgspec
import pytest

from eddyline.kafka.topics import ANSWERS, CLICKS
from eddyline.schema import events
from eddyline.schema.events import Click, Forget
from eddyline.settings.loader import Settings
from evaluation.judge.impressions import ImpressionJoin, JoinCounts
from evaluation.judge.judge import Judge
from evaluation.judge.merging import Place
from tests.unit.evaluation.live_log import Appender, feed
from tests.unit.evaluation.test_impression_join import answer, click

SETTINGS = Settings(
    clicks_partitions=3, items_partitions=2, judge_sample=0.0, answers_sample=1.0, at_ms_min=0
)
USERS = ("ana", "bob", "eve")


def judge_of(since_ms: int = 0, settings: Settings = SETTINGS) -> Judge:
    """Without a generation: it joins only."""
    return Judge(settings, since_ms=since_ms)


def timed(found: Click, appender: Appender) -> Click:
    return msgspec.structs.replace(found, at_ms=appender.now_ms)


def random_log(seed: int) -> Appender:
    rng, appender = random.Random(seed), Appender(SETTINGS)
    for number in range(200):
        user = rng.choice(USERS)
        appender.answer(answer(number, items=rng.randrange(13), user_id=user))
        for _ in range(rng.randrange(3)):
            of = min(199, max(0, number + rng.randrange(-3, 3)))  # some before their answer
            appender.click(timed(click(of, rng.randrange(13), rng.choice(USERS)), appender))
        appender.now_ms += 50
    return appender


@pytest.mark.parametrize("seed", range(2))
def test_the_join_does_not_depend_on_the_pieces_that_are_read(seed: int) -> None:
    appender = random_log(seed)
    found = []
    for turn in range(4):
        judge = judge_of()
        feed(judge, appender.topics, turn)
        found.append((judge.impressions.counts, judge.impressions.rates.rates()))
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0][0].answers == 200 and found[0][0].joined > 20


def test_a_judge_that_is_killed_counts_nothing_twice() -> None:
    appender = random_log(7)
    whole = judge_of()
    feed(whole, appender.topics)
    judge, positions = judge_of(), dict[Place, int]()
    for turn in range(5):
        # Read on, and lose what came after the checkpoint.
        saved, at = judge.impressions.export(), dict(positions)
        lost = judge_of()
        lost.impressions = ImpressionJoin.load(saved, lost.is_recorded)
        feed(lost, appender.topics, turn, stop_after=80, positions=at or None)
        judge = judge_of()
        judge.impressions = ImpressionJoin.load(saved, judge.is_recorded)
        positions = feed(judge, appender.topics, turn, stop_after=50, positions=at or None)
    feed(judge, appender.topics, 9, positions=positions)
    assert judge.impressions.counts == whole.impressions.counts
    assert judge.impressions.rates.rates() == whole.impressions.rates.rates()


def test_a_forgotten_user_is_dropped_and_the_counts_stay() -> None:
    appender, judge = Appender(SETTINGS), judge_of()
    for number, user in enumerate(("ana", "bob")):
        appender.answer(answer(number, user_id=user))
        appender.click(timed(click(number, 1, user), appender))
        appender.click(timed(click(10 + number, 1, user), appender))  # waits
    forget = Forget(user_id="ana", forget_until_ms=appender.now_ms)
    appender.append(CLICKS, "ana", events.encode(forget))
    feed(judge, appender.topics)
    assert judge.impressions.counts == JoinCounts(answers=2, joined=2)
    exported = judge.impressions.export()
    assert b"ana" not in exported and b"bob" in exported
    assert judge.impressions._waiting_clicks == 1


def test_what_was_appended_before_the_judge_does_not_count() -> None:
    appender = Appender(SETTINGS)
    for number in range(4):
        appender.answer(answer(number))
    since_ms = appender.now_ms
    appender.answer(answer(8))
    appender.click(timed(click(8), appender))
    judge = judge_of(since_ms)
    feed(judge, appender.topics)
    assert judge.impressions.counts == JoinCounts(answers=1, joined=1)


def test_records_that_are_no_answers_are_counted_and_skipped() -> None:
    appender, judge = Appender(SETTINGS), judge_of()
    appender.append(ANSWERS, "ana", b"{")
    appender.append(ANSWERS, "ana", None)
    appender.answer(answer(1))
    with pytest.raises(AssertionError):  # `feed` expects none
        feed(judge, appender.topics)
    assert judge.impressions.counts.answers == 1


def test_clicks_of_users_who_are_not_recorded_do_not_wait() -> None:
    settings = Settings(
        clicks_partitions=3, items_partitions=2, judge_sample=0.0, answers_sample=0.0
    )
    appender, judge = Appender(settings), judge_of(settings=settings)
    appender.click(timed(click(3), appender))
    feed(judge, appender.topics)
    assert judge.impressions._waiting_clicks == 0
