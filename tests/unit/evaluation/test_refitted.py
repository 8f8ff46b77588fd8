"""The references of implicit against the library on its own, and against plain cosines."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
from implicit.cpu.als import AlternatingLeastSquares
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from eddyline.errors import SettingsError
from eddyline.schema.events import Click, Item
from eddyline.settings.loader import Settings
from embeddings.bundle.bundle import Bundle
from evaluation import offline, refitted
from evaluation.event_log import DISLIKE, EventLog, LogBuilder
from evaluation.protocol import Outcome
from evaluation.ranks import Ranks
from tests.unit.evaluation.small import BASE_MS, ITEMS

DAY_MS = 86_400_000


def days(seed: int) -> EventLog:
    """Events of several days, with repeats, dislikes, and an item without any event."""
    rng = np.random.default_rng(seed)
    builder = LogBuilder(changes=[Item(item_id=f"i{n}") for n in range(ITEMS)])
    for n in range(120):
        at_ms = BASE_MS // DAY_MS * DAY_MS + n * DAY_MS // 20
        item = int((ITEMS - 1) * rng.random() ** 2)
        kind = "dislike" if rng.random() < 0.1 else "click"
        builder.add(
            Click(user_id=f"u{rng.integers(6)}", item_id=f"i{item}", at_ms=at_ms, kind=kind)
        )
    return builder.build()


def evaluate(log: EventLog, bundle: Bundle, row: str) -> Outcome:
    _, outcome = offline.evaluate(
        Settings(), log, bundle, name="s", split=0.5, keeps_repeats=True, seed=3, rows=(row,)
    )
    return outcome


def moments(
    log: EventLog, outcome: Outcome
) -> Iterator[tuple[int, int, int, np.ndarray, np.ndarray]]:
    """(number, user, target, users × items of before the day, the user's items) of each query."""
    shape = len(log.user_ids), len(log.item_ids)
    for number, event in enumerate(outcome.scored.events.tolist()):
        now_ms, user = log.at_ms[event], int(log.users[event])
        liked = log.kinds != DISLIKE
        before = np.zeros(shape, np.float32)
        at = liked & (log.at_ms < now_ms // DAY_MS * DAY_MS)
        before[log.users[at], log.items[at]] = 1
        mine = np.zeros(shape[1], np.float32)
        mine[log.items[liked & (log.at_ms < now_ms) & (log.users == user)]] = 1
        yield number, user, int(log.items[event]), before, mine


def rank(scores: np.ndarray, target: int) -> float:
    """Among the log's items and those without an event, which score 0."""
    all_scores = np.append(scores, np.zeros(ITEMS - len(scores)))
    own = all_scores[target]
    return float(1 + (all_scores > own).sum() + ((all_scores == own).sum() - 1) / 2)


def test_item_neighbours_are_those_of_plain_cosines(bundle: Bundle) -> None:
    log = days(1)
    outcome = evaluate(log, bundle, "item-knn-daily")
    found, wanted = outcome.rows["item-knn-daily"].ranks, []
    for _, _, target, before, mine in moments(log, outcome):
        norms = np.maximum(np.linalg.norm(before, axis=0), 1e-9)
        cosines = (before.T @ before) / np.outer(norms, norms)
        # Sums of equal cosines differ by rounding.
        wanted.append(rank(np.round(mine @ cosines, 4), target))
    assert len(wanted) > 40 and np.abs(found - wanted).max() <= 0.5
    assert np.mean(found == wanted) > 0.9, "the others are ties up to rounding"


@pytest.mark.parametrize("name", ["als-daily", "als-daily-live"])
def test_als_is_that_of_the_library_fitted_on_the_days_before(bundle: Bundle, name: str) -> None:
    log = days(2)
    outcome = evaluate(log, bundle, "als-daily")
    model, fitted, wanted = None, None, list[float]()
    for _, user, target, before, mine in moments(log, outcome):
        with threadpool_limits(1, "blas"):
            if model is None or not np.array_equal(before, fitted):
                model = AlternatingLeastSquares(64, num_threads=1, random_state=3)
                model.fit(csr_matrix(before), show_progress=False)
                fitted = before
        ids, scores = model.recommend(
            user,
            csr_matrix(mine),
            N=before.shape[1],
            filter_already_liked_items=False,
            recalculate_user=name.endswith("live"),
        )
        wanted.append(rank(scores[np.argsort(ids)], target))
    assert_close(outcome.rows[name].ranks, np.array(wanted))
    other = "als-daily" if name.endswith("live") else "als-daily-live"
    assert (outcome.rows[name].ranks != outcome.rows[other].ranks).any()


def assert_close(found: Ranks, wanted: Ranks) -> None:
    """Scores of items that always come together differ by rounding."""
    assert np.abs(found - wanted).max() <= 1 and np.mean(found == wanted) > 0.9


def test_without_the_library_its_rows_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "implicit", None)
    offline.check_rows(("random", "towers"))
    for row in ("als-daily", "item-knn-daily"):
        message = rf"rows {row} need implicit, .*: install eddyline\[evaluate\], .* with --rows$"
        with pytest.raises(SettingsError, match=message):
            offline.check_rows(("random", row))
    with pytest.raises(SettingsError, match=r"^the rows als-daily, item-knn-daily need implicit"):
        offline.check_rows(tuple(offline.ROWS))


def test_one_fit_a_day_is_enough(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = []
    fit = refitted.ItemNeighboursRow.fit
    monkeypatch.setattr(
        refitted.ItemNeighboursRow,
        "fit",
        lambda self, before: (fits.append(before.nnz), fit(self, before))[1],
    )
    log = days(1)
    evaluate(log, bundle, "item-knn-daily")
    assert len(fits) == 3 and fits == sorted(set(fits)), "the split is at the fourth of six days"
