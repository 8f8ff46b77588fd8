"""The judge's rates for `eddyline stats`, of the judge that runs on this data folder."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from eddyline.settings.loader import Settings

if TYPE_CHECKING:
    from evaluation.judge.report import JudgeReport

# A report that is older than so many of its intervals is said to be old.
_OLD = 3


def show(settings: Settings, console: Console, now_ms: int | None = None) -> None:
    """Print the newest report; nothing without one. now_ms: default: now"""
    try:
        from evaluation.judge import report as reports
    except ImportError:  # an image without the judge
        return
    report = reports.read(settings)
    if report is None:
        return
    now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    age_s = max(0, now_ms - report.at_ms) / 1000
    old = " (is the judge running?)" if age_s > _OLD * settings.judge_report_s else ""
    share = "" if report.share == 1 else f", behind: scores {report.share:.1%} of its users"
    console.print(
        f"judge: {report.scored:,} events scored, {sum(report.behind.values()):,} records behind"
        f"{share}; rates of {age_s:.0f} s ago{old}",
        soft_wrap=True,
    )
    for drift in report.last_drifts:
        count = report.drifts.get(drift.generation, 1)
        console.print(
            f"drift of generation {drift.generation}: HR@10 {drift.before:.3f} → {drift.after:.3f} "
            f"({drift.what}, {max(0, now_ms - drift.at_ms) / 60_000:.0f} min ago, {count} so far)",
            soft_wrap=True,
        )
    table = Table(
        *("window", "generation", "row", "events", "HR@10", "95 %", "HR@50", "HR@100", "MRR"),
        show_edge=False,
        pad_edge=False,
    )
    for one in report.rates:
        if one.group == "all":
            table.add_row(
                one.window,
                one.generation,
                one.row,
                f"{one.targets:,}",
                f"{one.hr[0]:.4f}",
                f"{one.low[0]:.4f} … {one.high[0]:.4f}",
                *(f"{rate:.4f}" for rate in (*one.hr[1:], one.mrr)),
            )
    if table.row_count:
        console.print(table)
    groups = [one for one in report.rates if one.group != "all" and one.window == "24h"]
    if groups:
        console.print("HR@10 of 24 h by scene and by the events in the user's list")
        of_group = Table("group", "row", "events", "HR@10", "95 %", show_edge=False, pad_edge=False)
        for one in groups:
            interval = f"{one.low[0]:.4f} … {one.high[0]:.4f}"
            name = f"{one.group} {one.value}, generation {one.generation}"
            of_group.add_row(name, one.row, f"{one.targets:,}", f"{one.hr[0]:.4f}", interval)
        console.print(of_group)
    _show_clicks(report, console)


def _show_clicks(report: JudgeReport, console: Console) -> None:
    """Click-through of the recorded answers: by path in each window, and by position."""
    joined = report.joined
    if not joined.answers:
        return
    console.print(
        f"recorded answers: {joined.answers:,}; clicks joined {joined.joined:,}, on other items "
        f"{joined.elsewhere:,}, without their answer {joined.unmatched:,}",
        soft_wrap=True,
    )
    columns = ("window", "generation", "path", "position", "shown", "clicks")
    table = Table(
        *columns, "click-through", "95 %", "mean 1/position", show_edge=False, pad_edge=False
    )
    for one in report.clicks:
        if one.group == "path" or (one.group == "all" and one.window == "24h"):
            if one.group == "path" and one.position:
                continue
            table.add_row(
                one.window,
                one.generation,
                one.value or "all",
                str(one.position or "all"),
                f"{one.impressions:,}",
                f"{one.clicks:,}",
                f"{one.rate:.4f}",
                f"{one.low:.4f} … {one.high:.4f}",
                f"{one.reciprocal:.3f}" if one.clicks else "",
            )
    console.print(table)
