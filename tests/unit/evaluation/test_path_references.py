"""Each path of co-visits and repeats against the same method in a few lines over dicts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest

from eddyline.schema.events import Click, Item
from eddyline.schema.item_key import item_key
from eddyline.settings.loader import Settings
from embeddings.bundle.bundle import Bundle
from evaluation import offline
from evaluation.event_log import DISLIKE, EventLog, LogBuilder
from tests.unit.evaluation.small import BASE_MS, ITEMS

SETTINGS = Settings(
    popular_limit=ITEMS, history_length_max=12, co_visit_items=4, popular_slow_half_life_events=100
)
SPLIT = 0.4
PATHS = ("co_visits", "co_visits_both", "next", "again")
Row = dict[str, dict[str, list[float]]]


class Reference:
    """What is known of the events so far."""

    def __init__(self) -> None:
        # Newest first: (item, whether it is a dislike).
        self.lists: dict[str, list[tuple[str, bool]]] = defaultdict(list)
        self.minutes: dict[str, list[int]] = defaultdict(list)
        # User -> item -> minute of the last positive event on it that left the list.
        self.beyond: dict[str, dict[str, int]] = defaultdict(dict)
        # What the user had, in the list or not.
        self.seen: dict[str, set[str]] = defaultdict(set)
        # Item -> other item -> [visits, next visits].
        self.after: Row = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
        self.before: Row = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
        self.events: list[str] = []

    def add(self, user: str, item: str, dislike: bool, at_ms: int) -> None:
        mine = self.lists[user]
        older = [other for other, bad in mine if not bad][: SETTINGS.co_visit_items]
        for distance, other in enumerate([] if dislike else older, 1):
            if other != item:
                for row in (self.after[other][item], self.before[item][other]):
                    row[0] += round(1_000 / distance) / 1_000
                    row[1] += distance == 1
        mine.insert(0, (item, dislike))
        self.seen[user].add(item)
        self.minutes[user].insert(0, at_ms // 60_000)
        for left, minute in zip(mine[12:], self.minutes[user][12:], strict=True):
            if not left[1]:
                self.beyond[user][left[0]] = minute
        del mine[12:], self.minutes[user][12:]
        if not dislike:
            self.events.append(item)

    def positive(self, user: str) -> list[str]:
        bad: set[str] = set()
        found = []
        for item, dislike in self.lists[user]:
            if dislike:
                bad.add(item)
            elif item not in bad:
                found.append(item)
        return found

    def co_visits(self, user: str) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for n, item in enumerate(dict.fromkeys(self.positive(user))):
            row = self.after[item]
            total = sum(visits for visits, _ in row.values())
            for other, (visits, _) in row.items():
                found[other] += 0.9**n * visits / (total + 10) ** 0.5
        return found

    def co_visits_both(self, user: str) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for n, item in enumerate(dict.fromkeys(self.positive(user))):
            rows = self.after[item], self.before[item]
            total = sum(visits for row in rows for visits, _ in row.values())
            for row in rows:
                for other, (visits, _) in row.items():
                    found[other] += 0.9**n * visits / (total + 5) ** 0.5
        return {i: score * (self.clicks(i) + 10) ** -0.3 for i, score in found.items()}

    def clicks(self, item: str) -> float:
        half = SETTINGS.popular_slow_half_life_events
        ages = [age for age, other in enumerate(reversed(self.events)) if other == item]
        return sum(0.5 ** (age / half) for age in ages)

    def next(self, user: str) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for n, item in enumerate([*dict.fromkeys(self.positive(user))][:5]):
            row = self.after[item]
            total = sum(right_after for _, right_after in row.values())
            for other, (_, right_after) in row.items():
                if right_after:
                    found[other] += 0.7**n * right_after / (total + 5)
        return found

    def again(self, user: str) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for age, item in enumerate(self.positive(user)):
            found[item] += (age + 20) ** -0.25
        beyond = self.beyond[user]
        newest = sorted(beyond, key=lambda i: (-beyond[i], item_key(i)))
        for age, item in enumerate(newest, len(self.lists[user])):
            found[item] += (age + 20) ** -0.25
        return found


def ranks(scores: dict[str, float], target: str, live: set[str], seen: set[str]) -> Iterator[float]:
    """The lowest and the highest rank of the target, where scores that are close may tie or not."""
    if target not in scores or target in seen:
        yield from (np.inf, np.inf)
        return
    others = [s for i, s in scores.items() if i in live and i not in seen and i != target]
    close = 1e-6 * abs(scores[target])
    yield 1.0 + sum(score > scores[target] + close for score in others)
    yield 1.0 + sum(score > scores[target] - close for score in others)


def make_log(seed: int, users: int = 6, events: int = 260) -> EventLog:
    """Random walks with repeats, dislikes and baskets; some items come late."""
    rng = np.random.default_rng(seed)
    builder = LogBuilder(
        changes=[
            Item(item_id=f"i{n}", title=f"t{n}", at_ms=BASE_MS + (n > 20) * 1_000 * n)
            for n in range(ITEMS)
        ]
    )
    at_ms, place = BASE_MS + 1, [0] * users
    for _ in range(events):
        at_ms += int(rng.integers(0, 3)) * 700
        user = int(rng.integers(users))
        place[user] = (place[user] + int(rng.integers(0, 4))) % ITEMS
        kind = "dislike" if rng.random() < 0.1 else "click"
        click = Click(user_id=f"u{user}", item_id=f"i{place[user]}", at_ms=at_ms, kind=kind)
        builder.add(click)
    return builder.build()


@pytest.mark.parametrize("keeps_repeats", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
def test_each_path_ranks_as_its_reference(bundle: Bundle, seed: int, keeps_repeats: bool) -> None:
    log = make_log(seed)
    settings = msgspec.structs.replace(SETTINGS, seen_items="keep" if keeps_repeats else "hide")
    _, outcome = offline.evaluate(
        settings,
        log,
        bundle,
        name="random",
        split=SPLIT,
        keeps_repeats=keeps_repeats,
        seed=0,
        rows=PATHS,
        wanted_processes=1,
    )
    reference, applied, checked = Reference(), 0, dict.fromkeys(PATHS, 0)
    for number, event in enumerate(outcome.scored.events.tolist()):
        now_ms = int(log.at_ms[event])
        while log.at_ms[applied] < now_ms:
            user, item = log.user_ids[log.users[applied]], log.item_ids[log.items[applied]]
            dislike = bool(log.kinds[applied] == DISLIKE)
            reference.add(user, item, dislike, int(log.at_ms[applied]))
            applied += 1
        if not outcome.kept[number]:
            continue
        user, target = log.user_ids[log.users[event]], log.item_ids[log.items[event]]
        live = {item.item_id for item in log.changes if item.at_ms < now_ms}
        listed = reference.seen[user]
        for path in PATHS:
            score: Callable[[str], dict[str, float]] = getattr(reference, path)
            wanted = [*ranks(score(user), target, live, set() if keeps_repeats else listed)]
            if target not in live:
                wanted = [np.inf, np.inf]
            rank = outcome.rows[path].ranks[number]
            assert wanted[0] <= rank <= wanted[1], (path, number, target)
            checked[path] += rank < np.inf
    assert all(n > 20 for path, n in checked.items() if path != "again" or keeps_repeats), checked
