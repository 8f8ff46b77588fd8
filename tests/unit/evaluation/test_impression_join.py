"""Clicks joined with the answers that led to them, and their rates by path and position."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from eddyline.schema.answers import AnsweredItem, RecordedAnswer
from eddyline.schema.events import Click, moved_context
from eddyline.statistics import wilson
from evaluation.judge import impressions
from evaluation.judge.click_rates import ARM, PATH, ClickRate
from evaluation.judge.impressions import KEPT_MS, WAIT_MS, ImpressionJoin, JoinCounts
from evaluation.judge.windows import ALL, OTHER, SCENE, TOTAL, VALUES_MAX, WINDOWS

MS = 472_222 * 3_600_000
PATHS = ("towers", "towers", "popular")


def answer(number: int = 0, *, items: int = 3, user_id: str = "ana", **more: str) -> RecordedAnswer:
    return RecordedAnswer(
        impression_id=f"p.{number}",
        user_id=user_id,
        at_ms=1,
        k=items,
        items=[AnsweredItem(f"i{n}", PATHS[n % 3], 1, 0.5) for n in range(items)],
        **{"generation": "g1"} | more,
    )


def click(number: int = 0, item: int = 0, user_id: str = "ana", **more: object) -> Click:
    fields = {"user_id": user_id, "item_id": f"i{item}", "impression_id": f"p.{number}"}
    return Click(**fields | more)  # type: ignore[arg-type]


def join() -> ImpressionJoin:
    return ImpressionJoin(lambda user: user in ("ana", "bob"))


def found(made: ImpressionJoin, group: str, value: str, position: int = 0) -> ClickRate | None:
    """The series over all time."""
    rates = [one for one in made.rates.rates() if one.window == TOTAL]
    chosen = [r for r in rates if (r.group, r.value, r.position) == (group, value, position)]
    assert len(chosen) <= 1
    return chosen[0] if chosen else None


def test_clicks_count_by_path_and_position() -> None:
    made = join()
    for number in range(4):
        made.add_answer(answer(number, scene="home", arm="b"), MS)
    for number, item in ((0, 0), (1, 0), (1, 2), (2, 1)):
        made.add_click(click(number, item), MS)
    assert made.counts == JoinCounts(answers=4, joined=4)
    expected = {
        (ALL, "", 0): (12, 4, (1 + 1 + 1 / 3 + 1 / 2) / 4),
        (ALL, "", 1): (4, 2, 1),
        (ALL, "", 2): (4, 1, 1 / 2),
        (ALL, "", 3): (4, 1, 1 / 3),
        (PATH, "towers", 0): (8, 3, (1 + 1 + 1 / 2) / 3),
        (PATH, "towers", 1): (4, 2, 1),
        (PATH, "towers", 2): (4, 1, 1 / 2),
        (PATH, "popular", 0): (4, 1, 1 / 3),
        (PATH, "popular", 3): (4, 1, 1 / 3),
        (SCENE, "home", 0): (12, 4, (1 + 1 + 1 / 3 + 1 / 2) / 4),
        (ARM, "b", 0): (12, 4, (1 + 1 + 1 / 3 + 1 / 2) / 4),
    }
    rates = made.rates.rates()
    for window in (*WINDOWS, TOTAL):
        of_window = [one for one in rates if one.window == window]
        assert {
            (r.group, r.value, r.position): (r.impressions, r.clicks, pytest.approx(r.reciprocal))
            for r in of_window
        } == expected
        for one in of_window:
            assert one.rate == one.clicks / one.impressions
            assert (one.low, one.high) == wilson(one.clicks, one.impressions)
            assert one.generation == "g1"


def test_a_click_counts_once_for_its_user_and_its_items() -> None:
    made = join()
    made.add_answer(answer(items=12), MS)
    made.add_click(click(item=9), MS)
    made.add_click(click(item=9, event_id="again"), MS)
    made.add_click(click(item=10), MS)
    made.add_click(click(item=99), MS)
    made.add_click(click(item=3, user_id="bob"), MS)
    made.add_click(click(item=3, kind="dislike"), MS)
    made.add_click(click(item=3, context=moved_context(0)), MS)
    made.add_click(Click(user_id="ana", item_id="i3"), MS)
    assert made.counts == JoinCounts(answers=1, joined=1, repeated=1, elsewhere=2, other_user=1)
    ten = found(made, ALL, "", 10)
    assert ten is not None and (ten.impressions, ten.clicks) == (1, 1)
    every = found(made, ALL, "")
    assert every is not None and every.impressions == 10, "items further down do not count"
    assert found(made, ALL, "", 11) is None


def test_an_answer_that_is_read_twice_counts_once() -> None:
    made = join()
    for _ in range(3):
        made.add_answer(answer(), MS)
    made.add_click(click(), MS)
    made.add_answer(answer(), MS)
    made.add_click(click(), MS)
    assert made.counts == JoinCounts(answers=1, joined=1, repeated=1)


@pytest.mark.parametrize(("late_ms", "joined"), [(WAIT_MS - 1, 1), (WAIT_MS, 0), (WAIT_MS + 1, 0)])
def test_an_answer_that_comes_after_its_click_is_joined_in_time(late_ms: int, joined: int) -> None:
    made = join()
    made.add_click(click(), MS)
    made.add_click(click(7, user_id="of-nobody-recorded"), MS)
    made.add_answer(answer(5, user_id="bob"), MS + late_ms)  # the time passes
    made.add_answer(answer(), MS + late_ms)
    assert made.counts == JoinCounts(answers=2, joined=joined, unmatched=1 - joined)


@pytest.mark.parametrize(("late_ms", "joined"), [(KEPT_MS - 1, 1), (KEPT_MS, 0), (KEPT_MS + 1, 0)])
def test_an_answer_is_kept_for_a_limited_time(late_ms: int, joined: int) -> None:
    made = join()
    made.add_answer(answer(), MS)
    made.add_answer(answer(5), MS + late_ms)
    made.add_click(click(), MS + late_ms)
    assert made.counts.joined == joined
    made.add_click(click(9), MS + late_ms + WAIT_MS)
    assert made.counts.unmatched == 1 - joined
    total = found(made, ALL, "")
    assert total is not None and total.impressions == 6, "what was shown stays counted"


def test_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impressions, "ANSWERS_MAX", 10)
    monkeypatch.setattr(impressions, "WAITING_MAX", 10)
    made = join()
    for number in range(30):
        made.add_answer(answer(number), MS)
    for number in range(30):
        made.add_click(click(number), MS)
    assert len(made._answers) == 10 and made._waiting_clicks == 10
    assert made.counts == JoinCounts(answers=30, joined=10, unmatched=10)
    made.add_answer(answer(19), MS)
    assert made.counts.joined == 11, "of those that wait the newest stay"
    for number in range(100, 150):
        made.add_click(click(number), MS)
    assert made._waiting_clicks == sum(len(one.clicks) for one in made._waiting.values()) == 10


def test_a_click_counts_in_the_window_of_its_answer() -> None:
    made = join()
    made.add_answer(answer(0), MS)
    made.add_answer(answer(1), MS + 30 * 60_000)
    made.add_click(click(0), MS + 30 * 60_000)
    made.add_click(click(0, 1), MS + 30 * 60_000)
    by_window = {
        one.window: (one.impressions, one.clicks)
        for one in made.rates.rates()
        if (one.group, one.position) == (ALL, 0)
    }
    assert by_window == {"15m": (3, 0), "1h": (6, 2), "24h": (6, 2), TOTAL: (6, 2)}
    made.add_answer(answer(2), MS + 25 * 3_600_000)
    made.add_click(click(2), MS + 25 * 3_600_000)
    buckets = [len(found) for found in made.rates._buckets.values()]
    assert max(buckets) <= 96, "old buckets are dropped"


def test_values_and_generations_are_bounded() -> None:
    made = join()
    for number in range(60):
        made.add_answer(answer(number, scene=f"s{number}", arm=f"a{number}"), MS)
    made.add_click(click(59), MS)
    rates = [one for one in made.rates.rates() if one.window == TOTAL]
    for group in (SCENE, ARM):
        of_group = {one.value: one for one in rates if one.group == group}
        assert len(of_group) == VALUES_MAX + 1
        assert (of_group[OTHER].impressions, of_group[OTHER].clicks) == (3 * 40, 1)
    for number, generation in ((70, "g2"), (71, "g3")):
        made.add_answer(answer(number, generation=generation), MS)
    assert {one.generation for one in made.rates.rates()} == {"g2", "g3"}
    made.add_click(click(58), MS)
    assert {one.generation for one in made.rates.rates()} == {"g2", "g3"}


def random_log(seed: int) -> list[RecordedAnswer | Click]:
    rng, log = random.Random(seed), list[RecordedAnswer | Click]()
    for number in range(300):
        user = rng.choice(["ana", "bob", "eve"])
        log.append(answer(number, items=rng.randrange(13), user_id=user, scene=f"s{number % 3}"))
        for _ in range(rng.randrange(3)):
            other = min(299, max(0, number + rng.randrange(-3, 3)))  # some before their answer
            log.append(click(other, rng.randrange(13), rng.choice(["ana", "bob", "eve"])))
    return log


def feed(made: ImpressionJoin, log: list[RecordedAnswer | Click], start: int = 0) -> ImpressionJoin:
    for at, one in enumerate(log, start):
        if isinstance(one, Click):
            made.add_click(one, MS + at * 1_000)
        else:
            made.add_answer(one, MS + at * 1_000)
    return made


@pytest.mark.parametrize("seed", range(3))
def test_a_restart_from_its_state_changes_nothing(seed: int) -> None:
    log = random_log(seed)
    whole = feed(ImpressionJoin(lambda user: True), log)
    assert min(whole.counts.joined, whole.counts.elsewhere, whole.counts.other_user) > 20
    for cut in (1, len(log) // 2, len(log) - 1):
        first = feed(ImpressionJoin(lambda user: True), log[:cut])
        again = ImpressionJoin.load(first.export(), lambda user: True)
        feed(again, log[cut:], cut)
        assert again.counts == whole.counts
        assert again.rates.rates() == whole.rates.rates()
        assert again.export() == whole.export()


@pytest.mark.parametrize("seed", range(3))
def test_the_rates_are_those_of_a_plain_count(seed: int) -> None:
    log = random_log(seed)
    made = feed(ImpressionJoin(lambda user: True), log)
    shown = {one.impression_id: one for one in log if isinstance(one, RecordedAnswer)}
    seen: Counter[tuple[str, int]] = Counter()
    clicked: Counter[tuple[str, int]] = Counter()
    for one in shown.values():
        seen.update((item.path, at) for at, item in enumerate(one.items[:10], 1))
    pairs = {(c.impression_id, c.item_id, c.user_id) for c in log if isinstance(c, Click)}
    for impression_id, item_id, user in pairs:
        one = shown[impression_id or ""]
        for at, item in enumerate(one.items[:10], 1):
            if item.item_id == item_id and one.user_id == user:
                clicked[item.path, at] += 1
    total = [r for r in made.rates.rates() if (r.window, r.group) == (TOTAL, PATH) and r.position]
    assert {(r.value, r.position): (r.impressions, r.clicks) for r in total} == {
        key: (n, clicked[key]) for key, n in seen.items()
    }
    for path, of_path in itertools.groupby(sorted(total, key=lambda r: r.value), lambda r: r.value):
        every = found(made, PATH, path)
        assert every is not None and every.clicks == sum(one.clicks for one in of_path)
