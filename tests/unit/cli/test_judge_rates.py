"""What `eddyline stats` says of the judge."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from cli.commands import judge_rates
from eddyline.settings.loader import Settings
from evaluation.judge import report as reports
from evaluation.judge.drift import Drift
from evaluation.judge.impressions import ImpressionJoin
from evaluation.judge.rates import Rates
from evaluation.judge.report import JudgeReport
from tests.unit.evaluation.test_impression_join import answer, click

NOW_MS = 1_700_000_000_000


def shown(settings: Settings, now_ms: int) -> str:
    out = io.StringIO()
    judge_rates.show(settings, Console(file=out, width=160, highlight=False), now_ms)
    return out.getvalue()


def report(**more: Any) -> JudgeReport:
    rates = Rates()
    for n in range(40):
        rates.add("7", NOW_MS - n, "home", "5-19", {"towers": 1.0 if n % 4 == 0 else 70.0})
    join = ImpressionJoin(lambda user: True)
    for n in range(50):
        join.add_answer(answer(n), NOW_MS - n)
    for n in range(20):
        join.add_click(click(n, item=n % 2), NOW_MS)
    fields: dict[str, Any] = {
        "at_ms": NOW_MS,
        "event_ms": NOW_MS,
        "generation": "7",
        "share": 1.0,
        "scored": 40,
        "skipped": 0,
        "applied": 1_000,
        "rejected": 0,
        "lag_s": 0.0,
        "behind": {"clicks": 2, "items": 1},
        "rates": rates.rates(),
        "clicks": join.rates.rates(),
        "joined": join.counts,
        "drifts": {"7": 2},
        "last_drifts": [Drift(generation="7", at_ms=NOW_MS - 60_000, before=0.3, after=0.1)],
    }
    return JudgeReport(**fields | more)


def test_stats_show_rates_age_lag_and_drift(tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path))
    assert shown(settings, NOW_MS) == ""
    reports.write(settings, report())
    assert reports.read(settings) == report()
    text = shown(settings, NOW_MS + 9_000)
    assert "40 events scored, 3 records behind; rates of 9 s ago\n" in text
    assert "drift of generation 7: HR@10 0.300 → 0.100 (fall, 1 min ago, 2 so far)" in text
    assert "0.2500 │ 0.1419 … 0.4019 │ 0.2500 │ 1.0000" in text
    assert "scene home, generation 7" in text and "stage 5-19" in text
    assert (
        "recorded answers: 50; clicks joined 20, on other items 0, without their answer 0" in text
    )
    lines = [re.split(r" *│ *", line.strip()) for line in text.splitlines()]
    assert ["24h", "g1", "all", "2", "50", "10", "0.2000", "0.1124 … 0.3304", "0.500"] in lines
    assert ["1h", "g1", "towers", "all", "100", "20", "0.2000", "0.1334 … 0.2888", "0.750"] in lines


def test_stats_say_that_the_rates_are_old_and_that_the_judge_scores_fewer(tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path))
    reports.write(settings, report(share=0.25))
    text = shown(settings, NOW_MS + 31_000)
    assert "scores 25.0% of its users; rates of 31 s ago (is the judge running?)" in text


def test_a_report_of_another_format_is_left_out(tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path))
    reports.path_of(settings).parent.mkdir()
    reports.path_of(settings).write_text('{"at_ms": "x"}', encoding="utf-8")
    assert shown(settings, NOW_MS) == ""
