"""Prometheus metrics of the judge, from its newest report."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from eddyline.process import metrics
from eddyline.process.metrics import labelled
from eddyline.settings.loader import Settings
from embeddings.evaluation.metrics import CUTS
from evaluation.judge.click_rates import ClickRate
from evaluation.judge.process import JudgeProcess
from evaluation.judge.rates import Rate
from evaluation.judge.report import JudgeReport
from evaluation.judge.windows import ALL, TOTAL

_SERIES = ["generation", "row", "group", "value"]
_CLICK_SERIES = ["generation", "group", "value", "position"]


class JudgeCollector(Collector):
    """The metrics of one process. Thread rule: any thread; nothing before the first report."""

    def __init__(self, process: JudgeProcess) -> None:
        self._process = process

    @override
    def collect(self) -> Iterator[Metric]:
        report = self._process.report
        if report is None:
            return
        yield from _state(report)
        yield from _rates([one for one in report.rates if one.window != TOTAL])
        yield from _totals([one for one in report.rates if one.window == TOTAL])
        yield from _joined(report)
        yield from _click_rates([one for one in report.clicks if one.window != TOTAL])
        yield from _click_totals([one for one in report.clicks if one.window == TOTAL])


def serve(settings: Settings, process: JudgeProcess) -> Callable[[], None]:
    """Serve the metrics at `judge_metrics_port`, if it is set. Returns what ends that."""
    return metrics.serve(
        settings.metrics_host, settings.judge_metrics_port, JudgeCollector(process)
    )


def _state(report: JudgeReport) -> Iterator[Metric]:
    for name, what, value in (
        ("targets_scored", "Targets that were scored", report.scored),
        ("targets_skipped", "Targets left out while the judge was behind", report.skipped),
        ("records_applied", "Records read from the topics", report.applied),
        ("records_rejected", "Records that ingest refuses", report.rejected),
        ("blender_clicks", "Clicks that the blender has learned from", report.learned),
    ):
        yield CounterMetricFamily(f"eddyline_judge_{name}", what, value=value)
    for name, what, number in (
        ("share", "Share of the followed users whose events are scored now", report.share),
        ("lag_seconds", "How long the oldest record waits", report.lag_s),
        ("report_timestamp_seconds", "When the rates were renewed", report.at_ms / 1_000),
        ("blender_replaced", "Whether a fusion by rank answers", report.blender_replaced),
        ("event_timestamp_seconds", "Time of the newest scored event", report.event_ms / 1_000),
    ):
        yield GaugeMetricFamily(f"eddyline_judge_{name}", what, value=number)
    name, what = "eddyline_judge_behind_records", "Offsets that are not judged yet"
    yield labelled(GaugeMetricFamily, name, what, "topic", report.behind)
    name, what = "eddyline_judge_drifts", "Changes of the fused answer's hit rate"
    yield labelled(CounterMetricFamily, name, what, "generation", report.drifts)


def _rates(rates: list[Rate]) -> Iterator[Metric]:
    """Scenes and stages have HR@10 only, and no interval: their number of series stays small."""
    rate = GaugeMetricFamily(
        "eddyline_judge_hit_rate",
        "Share of targets among the first k items, in a window of event time",
        labels=["window", *_SERIES, "k"],
    )
    bounds = GaugeMetricFamily(
        "eddyline_judge_hit_rate_bound",
        "95 % interval of the hit rate",
        labels=["window", *_SERIES, "k", "bound"],
    )
    mrr = GaugeMetricFamily(
        "eddyline_judge_mrr", "Mean of 1 / rank, in a window", labels=["window", *_SERIES]
    )
    targets = GaugeMetricFamily(
        "eddyline_judge_targets", "Targets in a window", labels=["window", *_SERIES]
    )
    for one in rates:
        labels = [one.window, *_series(one)]
        targets.add_metric(labels, one.targets)
        for at, k in enumerate(CUTS):
            if one.group == ALL or k == CUTS[0]:
                rate.add_metric([*labels, str(k)], one.hr[at])
        if one.group == ALL:
            mrr.add_metric(labels, one.mrr)
            for at, k in enumerate(CUTS):
                bounds.add_metric([*labels, str(k), "low"], one.low[at])
                bounds.add_metric([*labels, str(k), "high"], one.high[at])
    yield from (rate, bounds, mrr, targets)


def _totals(rates: list[Rate]) -> Iterator[Metric]:
    targets = CounterMetricFamily(
        "eddyline_judge_all_targets", "Targets since the first start", labels=_SERIES
    )
    hits = CounterMetricFamily(
        "eddyline_judge_hits",
        "Targets among the first k items since the first start",
        labels=[*_SERIES, "k"],
    )
    for one in rates:
        targets.add_metric(_series(one), one.targets)
        for at, k in enumerate(CUTS):
            hits.add_metric([*_series(one), str(k)], round(one.hr[at] * one.targets))
    yield from (targets, hits)


def _joined(report: JudgeReport) -> Iterator[Metric]:
    outcomes = msgspec.structs.asdict(report.joined)
    name, what = "eddyline_judge_recorded_answers", "Recorded answers that were read"
    yield CounterMetricFamily(name, what, value=outcomes.pop("answers"))
    name, what = "eddyline_judge_impression_clicks", "Clicks that name a recorded answer"
    yield labelled(CounterMetricFamily, name, what, "outcome", outcomes)


def _click_rates(rates: list[ClickRate]) -> Iterator[Metric]:
    rate = GaugeMetricFamily(
        "eddyline_judge_click_through",
        "Share of the items of recorded answers that were clicked, in a window",
        labels=["window", *_CLICK_SERIES],
    )
    bounds = GaugeMetricFamily(
        "eddyline_judge_click_through_bound",
        "95 % interval of the click-through",
        labels=["window", *_CLICK_SERIES, "bound"],
    )
    reciprocal = GaugeMetricFamily(
        "eddyline_judge_click_reciprocal_position",
        "Mean of 1 / position over the clicks, in a window",
        labels=["window", *_CLICK_SERIES],
    )
    for one in rates:
        labels = [one.window, *_click_series(one)]
        rate.add_metric(labels, one.rate)
        bounds.add_metric([*labels, "low"], one.low)
        bounds.add_metric([*labels, "high"], one.high)
        if one.clicks and not one.position:
            reciprocal.add_metric(labels, one.reciprocal)
    yield from (rate, bounds, reciprocal)


def _click_totals(rates: list[ClickRate]) -> Iterator[Metric]:
    shown = CounterMetricFamily(
        "eddyline_judge_impressions",
        "Items of recorded answers since the first start",
        labels=_CLICK_SERIES,
    )
    clicks = CounterMetricFamily(
        "eddyline_judge_impressions_clicked",
        "Those of them that were clicked",
        labels=_CLICK_SERIES,
    )
    for one in rates:
        shown.add_metric(_click_series(one), one.impressions)
        clicks.add_metric(_click_series(one), one.clicks)
    yield from (shown, clicks)


def _series(one: Rate) -> list[str]:
    return [one.generation, one.row, one.group, one.value]


def _click_series(one: ClickRate) -> list[str]:
    return [one.generation, one.group, one.value, str(one.position or "all")]
