"""Prometheus metrics of the judge, from its newest report."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from eddyline.process import metrics
from eddyline.process.metrics import labelled
from eddyline.settings.loader import Settings
from embeddings.evaluation.metrics import CUTS
from evaluation.judge.process import JudgeProcess
from evaluation.judge.rates import ALL, TOTAL, Rate
from evaluation.judge.report import JudgeReport

_SERIES = ["generation", "row", "group", "value"]


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
    ):
        yield CounterMetricFamily(f"eddyline_judge_{name}", what, value=value)
    for name, what, number in (
        ("share", "Share of the followed users whose events are scored now", report.share),
        ("lag_seconds", "How long the oldest record waits", report.lag_s),
        ("report_timestamp_seconds", "When the rates were renewed", report.at_ms / 1_000),
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


def _series(one: Rate) -> list[str]:
    return [one.generation, one.row, one.group, one.value]
