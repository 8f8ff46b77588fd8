"""The figures of a report: by row, group and metric, from one drawing of the users."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from eddyline.schema.events import Click
from eddyline.settings.loader import Settings
from embeddings.bundle.bundle import Bundle
from evaluation import metrics, offline
from evaluation.event_log import LogBuilder
from evaluation.metrics import Bootstrap
from evaluation.protocol import Outcome
from evaluation.report import Report
from tests.unit.evaluation.small import BASE_MS, make_items, make_log

ROWS = ("random", "popular-all", "towers")


def evaluate(bundle: Bundle) -> tuple[Report, Outcome]:
    return offline.evaluate(
        Settings(),
        make_log(4, events=240),
        bundle,
        name="s",
        split=0.5,
        keeps_repeats=True,
        seed=3,
        rows=ROWS,
    )


def by_hand(outcome: Outcome, row: str, mask: np.ndarray) -> dict[str, float]:
    """The metrics over some of the events that count."""
    ranks = outcome.rows[row].ranks[outcome.kept][mask]
    weights = 1 / (1 + outcome.scored.item_before[outcome.kept][mask])
    hits = ranks <= 10
    return {
        "hr_10": hits.mean(),
        "hr_50": (ranks <= 50).mean(),
        "hr_100": (ranks <= 100).mean(),
        "precision_10": hits.mean() / 10,
        "mrr": (1 / ranks).mean(),
        "ndcg_10": np.where(hits, 1 / np.log2(ranks + 1), 0).mean(),
        "hr_10_debiased": (hits * weights).sum() / weights.sum(),
    }


def test_every_metric_is_given_for_every_group(bundle: Bundle) -> None:
    report, outcome = evaluate(bundle)
    user, item = (
        of_all[outcome.kept] for of_all in (outcome.scored.user_before, outcome.scored.item_before)
    )
    groups = {
        "users seen": outcome.scored.seen_user[outcome.kept],
        "users unseen": ~outcome.scored.seen_user[outcome.kept],
        "user events 0": user == 0,
        "user events 1–4": (1 <= user) & (user < 5),
        "user events 5–19": (5 <= user) & (user < 20),
        "user events 10+": user > 9,
        "user events 20+": user > 19,
        "item clicks 0": item == 0,
        "item clicks 1–5": (1 <= item) & (item < 6),
        "item clicks 6–50": (6 <= item) & (item < 51),
        "item clicks 51+": item > 50,
    }
    filled = 0
    for row in report.rows:
        if row.name not in ROWS:
            continue
        assert row.groups.keys() == groups.keys()
        for group, mask in {"": np.ones(len(user), bool), **groups}.items():
            found = row.groups[group] if group else row.metrics
            if not mask.any():
                assert all(math.isnan(one.value) for one in found.values())
                continue
            wanted = by_hand(outcome, row.name, mask)
            assert found.keys() == wanted.keys()
            assert {name: one.value for name, one in found.items()} == pytest.approx(wanted)
            assert all(one.low <= one.value <= one.high for one in found.values())
            filled += 1
    assert filled > 15


def test_the_users_are_drawn_once_for_a_report(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws, draw = [], Bootstrap._draw

    def counted(self: Bootstrap) -> Iterator[np.ndarray]:
        draws.append(1)
        return draw(self)

    monkeypatch.setattr(Bootstrap, "_draw", counted)
    once, _ = evaluate(bundle)
    assert len(draws) == 1
    monkeypatch.setattr(metrics, "_KEPT_MAX", 0)
    again, _ = evaluate(bundle)
    assert len(draws) > 2, "too many users to keep: drawn again for each row"
    assert msgspec.json.encode(once) == msgspec.json.encode(again)


def test_the_order_of_the_files_changes_no_figure(bundle: Bundle) -> None:
    clicks = [
        Click(user_id=f"u{n % 7}", item_id=f"i{n % 20}", at_ms=BASE_MS + n, event_id=f"e{n}")
        for n in range(80)
    ]
    reports = []
    for some in (clicks, clicks[::-1]):
        builder = LogBuilder(changes=make_items())
        for click in some:
            builder.add(click)
        report, _ = offline.evaluate(
            Settings(),
            builder.build(),
            bundle,
            name="s",
            split=0.5,
            keeps_repeats=True,
            seed=3,
            rows=("popular-all", "towers"),
        )
        reports.append(msgspec.json.encode(report))
    assert reports[0] == reports[1]
