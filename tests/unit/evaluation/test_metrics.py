"""Metrics against rectools' figures, plain definitions, and what an interval promises."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from embeddings.evaluation.metrics import of_ranks, quality
from evaluation import metrics
from evaluation.metrics import Bootstrap, Estimate, gini, of_lists

GOLDEN = Path(__file__).parents[2] / "golden" / "rectools-metrics.json"


def mean(values: np.ndarray) -> float:
    return float(values.mean())


def test_the_figures_are_those_of_rectools() -> None:
    """Made once by rectools 0.19.0, of 40 lists with one target each; see the file."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    ranks = np.array([math.inf if rank is None else rank for rank in golden["ranks"]], float)
    wanted, found = golden["metrics"], of_ranks(ranks)
    for cut in (10, 50, 100):
        assert mean(found[f"hr_{cut}"]) == pytest.approx(wanted[f"hr_{cut}"])
        assert wanted[f"hr_{cut}"] == pytest.approx(wanted[f"recall_{cut}"])
    assert mean(found["precision_10"]) == pytest.approx(wanted["precision_10"])
    assert mean(found["ndcg_10"]) == pytest.approx(wanted["ndcg_10"])
    assert mean(found["mrr"]) == pytest.approx(wanted["mrr_120"])
    trained = quality(ranks, np.ones(len(ranks), bool))
    assert trained.ndcg_10 == pytest.approx(wanted["ndcg_10"])
    assert trained.mrr == pytest.approx(wanted["mrr_120"])
    lists = [[str(item) for item in one] for one in golden["lists"]]
    vectors = {item: np.array([1, 0], np.float32) for one in lists for item in one}
    assert of_lists(lists, golden["items"], {}, vectors).coverage == pytest.approx(
        wanted["coverage_10"]
    )


def test_ranks_by_hand() -> None:
    found = of_ranks(np.array([1.0, 2.5, 10.0, 10.5, 100.0, math.inf]))
    assert found["hr_10"].tolist() == [1, 1, 1, 0, 0, 0]
    assert found["hr_50"].tolist() == [1, 1, 1, 1, 0, 0]
    assert found["hr_100"].tolist() == [1, 1, 1, 1, 1, 0]
    assert found["mrr"].tolist() == [1, 0.4, 0.1, 1 / 10.5, 0.01, 0]
    assert found["ndcg_10"][:3].tolist() == pytest.approx(
        [1, 1 / math.log2(3.5), 1 / math.log2(11)]
    )


def test_lists_by_hand() -> None:
    vectors = {
        name: np.array(vector, np.float32)
        for name, vector in {"a": [1, 0], "b": [0, 1], "c": [-1, 0], "d": [1, 0]}.items()
    }
    found = of_lists([["a", "b", "c"], ["a"], ["a", "d"]], 5, {"a": 3, "b": 0}, vectors)
    assert found.coverage == 4 / 5
    # Pairs (a, b), (b, c): 1 apart; (a, c): 2; (a, d): 0.
    assert found.diversity == pytest.approx(((1 + 1 + 2) / 3 + 0) / 2)
    # p(a) = 4 / 8, of others 1 / 8; a is shown three times.
    assert found.novelty == pytest.approx((3 * 1 + 3 * 3) / 6)
    assert found.gini == pytest.approx(gini([3, 1, 1, 1], 5))


def test_gini_is_the_mean_difference_over_twice_the_mean() -> None:
    rng = np.random.default_rng(3)
    for n in (1, 2, 9, 60):
        counts = rng.integers(0, 20, n)
        counts[0] += 1
        differences = np.abs(counts[:, None] - counts[None, :]).mean()
        assert gini(counts[counts > 0].tolist(), n) == pytest.approx(
            differences / (2 * counts.mean())
        )
    assert gini([], 5) == 0.0


def test_the_interval_of_independent_users_is_that_of_the_normal_distribution() -> None:
    rng = np.random.default_rng(1)
    hits = (rng.random(2_000) < 0.3).astype(float)
    [found] = Bootstrap(np.arange(2_000), seed=5).estimates([(hits, np.ones(2_000))])
    half = 1.96 * hits.std() / math.sqrt(2_000)
    assert found.value == hits.mean()
    assert found.high - found.value == pytest.approx(half, rel=0.15)
    assert found.value - found.low == pytest.approx(half, rel=0.15)


def test_users_are_drawn_and_not_events() -> None:
    """Ten users whose 100 events are all alike: no more is known than of ten events."""
    users = np.repeat(np.arange(10), 100)
    hits = np.repeat(np.arange(10) % 2, 100).astype(float)
    [found] = Bootstrap(users, seed=5).estimates([(hits, np.ones_like(hits))])
    assert (found.value, found.low, found.high) == (0.5, pytest.approx(0.2), pytest.approx(0.8))


def test_intervals_are_the_ratio_of_sums_over_drawn_users() -> None:
    rng = np.random.default_rng(4)
    users, values = rng.integers(0, 7, 50), rng.random((50, 2))
    weights = rng.random((50, 2)) * (rng.random((50, 2)) < 0.5)
    columns = list(zip(values.T, weights.T, strict=True))
    means, resampled = Bootstrap(users, seed=9, resamples=20).means(columns)
    assert means == pytest.approx((values * weights).sum(0) / weights.sum(0))
    drawing = np.random.default_rng(9)
    ids = np.unique(users)
    for resample in range(20):
        picks = ids[drawing.integers(0, len(ids), len(ids))]
        at = np.concatenate([np.flatnonzero(users == user) for user in picks])
        wanted = (values[at] * weights[at]).sum(0) / weights[at].sum(0)
        assert resampled[resample] == pytest.approx(wanted)


def test_many_users_are_resampled_in_steps_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    users, columns = np.arange(30) % 11, [(np.arange(30.0), np.ones(30))]
    whole = Bootstrap(users, seed=2, resamples=25).means(columns)
    monkeypatch.setattr(metrics, "_CELLS_MAX", 33)
    parts = Bootstrap(users, seed=2, resamples=25).means(columns)
    assert np.allclose(whole[1], parts[1], rtol=1e-12)


def test_a_group_without_events_has_no_figure() -> None:
    [found] = Bootstrap(np.arange(5), seed=1).estimates([(np.ones(5), np.zeros(5))])
    assert math.isnan(found.value) and math.isnan(found.low) and math.isnan(found.high)
    assert (str(found), found.number, found.interval) == ("–", "–", "–")


def test_an_interval_with_a_negative_end_is_readable() -> None:
    assert str(Estimate(0.25, 0.125, 0.5)) == "0.2500 (0.1250–0.5000)"
    assert str(Estimate(-0.25, -0.5, -0.125)) == "-0.2500 (-0.5000 to -0.1250)"
