"""One self-contained HTML page of a report: bars with intervals, curves, tables; no network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape

from evaluation.report import Report, RowReport

_WIDTH, _BAR, _LABELS = 860, 22, 210
_COLOURS = ("#0b6e99", "#c4501b", "#2f7d32", "#7b3fa0", "#a67c00", "#c2185b", "#455a64", "#00897b")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 960px; padding: 0 1rem;
       color: #1c2226; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #dde3e6 }
th:first-child, td:first-child { text-align: left } td { white-space: nowrap }
svg { max-width: 100%; height: auto } svg text { font: 13px system-ui, sans-serif; fill: #1c2226 }
.wide { overflow-x: auto }
"""
# Heading of each metric in the table.
METRICS = {
    "hr_10": "HR@10",
    "hr_50": "HR@50",
    "hr_100": "HR@100",
    "precision_10": "Precision@10",
    "mrr": "MRR",
    "ndcg_10": "NDCG@10",
    "hr_10_debiased": "debiased",
}


def page(report: Report, others: Sequence[Report] = ()) -> str:
    """The page. others: of further configurations, each with its own table"""
    title = f"Evaluation of {report.name}"
    parts = [_one(one) for one in (report, *others)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _one(report: Report) -> str:
    numbers = ", ".join(f"{name} {count:,}" for name, count in report.events.items())
    return "\n".join(
        (
            f"<h1>{escape(report.name)}</h1>",
            f"<p>Events: {escape(numbers)}. {report.users:,} users, {report.items:,} items at the "
            f"end. Repeats: {report.repeats}. Every live item is ranked; events of one time are "
            "scored before any of them is applied. Intervals: 95 %, bootstrap over users.</p>",
            "<h2>HR@10</h2>",
            _bars(report.rows),
            "<h2>HR@10 over time</h2>",
            _curves(report),
            "<h2>Metrics</h2>",
            _table(["row", *METRICS.values()], (_metrics(row) for row in report.rows)),
            "<h2>HR@10 by group</h2>",
            _table(
                ["row", *(f"{name} ({count:,})" for name, count in report.groups.items())],
                (
                    [row.name, *(of_group["hr_10"].number for of_group in row.groups.values())]
                    for row in report.rows
                ),
            ),
            f"<h2>The first ten items, of {report.lists_of:,} events</h2>",
            _table(
                ["row", "coverage", "Gini", "novelty, bits", "diversity"],
                (_lists(row) for row in report.rows if row.lists is not None),
            ),
            "<h2>Paired differences of HR@10</h2>",
            _table(
                ["rows", "events", "difference"],
                (
                    [f"{one.left} − {one.right}", one.group or "all", str(one.hr_10)]
                    for one in report.differences
                ),
            ),
        )
    )


def _bars(rows: Sequence[RowReport]) -> str:
    estimates = [row.metrics["hr_10"] for row in rows]
    top = max([0.01, *(one.high for one in estimates if math.isfinite(one.high))])
    scale = (_WIDTH - _LABELS - 130) / top
    height = _BAR * len(rows) + 10
    shapes = []
    for number, (row, one) in enumerate(zip(rows, estimates, strict=True)):
        y = 5 + number * _BAR
        middle, text = y + _BAR / 2, f'y="{y + _BAR / 2 + 4:.1f}"'
        end, low, high = (_LABELS + scale * x for x in (one.value, one.low, one.high))
        shapes.append(
            f'<text x="{_LABELS - 8}" {text} text-anchor="end">{escape(row.name)}</text>'
            f'<rect x="{_LABELS}" y="{y + 3}" width="{end - _LABELS:.1f}" height="{_BAR - 6}" '
            f'fill="{_COLOURS[0]}" opacity=".55"/>'
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} '
            f'{middle - 4}v8" stroke="#1c2226" fill="none"/>'
            f'<text x="{high + 8:.1f}" {text}>{one.number}</text>'
        )
    return _svg(height, "HR@10 of every row, with 95 % intervals", shapes)


def _curves(report: Report) -> str:
    height, left, bottom = 320, 50, 290
    chosen = sorted(report.rows, key=lambda row: -row.metrics["hr_10"].value)[: len(_COLOURS)]
    top = max([0.01, *(value for row in chosen for value in row.curve)])
    width = _WIDTH - left - _LABELS
    last = max(1, len(report.curve_at_ms) - 1)
    shapes = [
        f'<path d="M{left} 10V{bottom}H{left + width}" stroke="#8a969c" fill="none"/>',
        f'<text x="{left - 6}" y="18" text-anchor="end">{top:.2f}</text>',
        f'<text x="{left - 6}" y="{bottom}" text-anchor="end">0</text>',
    ]
    for at, anchor in ((0, "start"), (-1, "end")):
        day = datetime.fromtimestamp(report.curve_at_ms[at] / 1000, UTC).date()
        x = left if at == 0 else left + width
        shapes.append(f'<text x="{x}" y="{bottom + 20}" text-anchor="{anchor}">{day}</text>')
    for number, row in enumerate(chosen):
        colour = _COLOURS[number]
        points = " ".join(
            f"{left + width * at / last:.1f},{bottom - (bottom - 10) * value / top:.1f}"
            for at, value in enumerate(row.curve)
        )
        y = 18 + 20 * number
        shapes.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<text x="{left + width + 14}" y="{y}" style="fill:{colour}">{escape(row.name)}</text>'
        )
    return _svg(height, "HR@10 of the best rows over the scored events", shapes)


def _svg(height: int, label: str, shapes: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(shapes)}</svg>'
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{cells}</tr>{body}</table></div>'


def _metrics(row: RowReport) -> list[str]:
    return [row.name, *(str(row.metrics[name]) for name in METRICS)]


def _lists(row: RowReport) -> list[str]:
    lists = row.lists
    assert lists is not None
    measures = (lists.coverage, lists.gini, lists.novelty, lists.diversity)
    return [row.name, *(f"{one:.3f}" for one in measures)]
