"""The Prometheus metrics of a query worker or a coordinator: queries, paths, index, recall, lag.

Collected from the service's counters and its `Stats` at each scrape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from eddyline.process import metrics
from eddyline.process.metrics import labelled
from eddyline.settings.loader import Settings
from serving.answer.impressions import Impressions
from serving.proto import retrieval_pb2 as pb
from serving.rpc.retrieval_service import BUCKETS_S, QueryCounts, RetrievalService
from serving.rpc.shard_service import ShardService


class WorkerCollector(Collector):
    """The metrics of one process. Thread rule: any thread; figures may be some queries apart."""

    def __init__(
        self,
        service: RetrievalService,
        own_index: bool = True,
        shard: ShardService | None = None,
        impressions: Impressions | None = None,
    ) -> None:
        """own_index: False for a coordinator, whose counters would jump as shards come and go.

        shard: None without calls of coordinators; impressions: None where none are recorded
        """
        self._service = service
        self._own_index = own_index
        self._shard = shard
        self._impressions = impressions

    def collect(self) -> Iterator[Metric]:
        """Every metric; before the process is ready only those of queries."""
        stats, counts = self._service.stats(), self._service.counts()
        yield GaugeMetricFamily(
            "eddyline_worker_ready", "Whether queries are answered", value=stats.ready
        )
        queries = {"failed": counts.failed, "answered": counts.queries - counts.failed}
        yield labelled(
            CounterMetricFamily, "eddyline_worker_queries", "Queries", "outcome", queries
        )
        yield _times(counts)
        yield from _paths(counts)
        yield labelled(
            CounterMetricFamily,
            "eddyline_worker_rule_items",
            "Items of answers that a rule placed or moved",
            "rule",
            dict(stats.rule_items),
        )
        if self._shard is not None:
            calls, what = self._shard.counts(), "Calls of coordinators"
            name = "eddyline_worker_shard_calls"
            yield labelled(CounterMetricFamily, name, what, "outcome", calls)
        if self._impressions is not None:
            answers = self._impressions.counts()._asdict()
            name, what = "eddyline_worker_recorded_answers", "Answers to sampled users"
            yield labelled(CounterMetricFamily, name, what, "outcome", answers)
        yield GaugeMetricFamily(
            "eddyline_worker_waiting_calls", "Calls that wait for a click", value=counts.waiting
        )
        yield GaugeMetricFamily(
            "eddyline_worker_missing", "Missing servers and shards", value=len(stats.missing)
        )
        if stats.ready:
            yield _sizes(stats.index)
        if stats.ready and self._own_index:
            yield from _index(stats.index)
            if stats.index.HasField("recall"):
                yield from _recall(stats.index.recall)
            yield from _tail(stats.tail)


def serve(
    settings: Settings,
    service: RetrievalService,
    place: int = 0,
    own_index: bool = True,
    shard: ShardService | None = None,
    impressions: Impressions | None = None,
) -> Callable[[], None]:
    """Serve the metrics at `worker_metrics_port`, if it is set. Returns what ends that.

    place:     number of this process in its worker; its port is `worker_metrics_port` + place
    own_index, shard, impressions: see `WorkerCollector`
    """
    port = settings.worker_metrics_port
    return metrics.serve(
        settings.metrics_host,
        port and port + place,
        WorkerCollector(service, own_index, shard, impressions),
    )


def _times(counts: QueryCounts) -> Metric:
    bounds = (*map(str, BUCKETS_S), "+Inf")
    buckets = list(zip(bounds, accumulate(counts.times), strict=True))
    name = "eddyline_worker_query_seconds"
    return HistogramMetricFamily(name, "Queries", buckets, counts.total_s)


def _paths(counts: QueryCounts) -> Iterator[Metric]:
    for field, what in (
        ("queries", "Queries that called a recall path"),
        ("items", "Items of answers that a recall path returned"),
        ("candidates", "Items that a recall path returned"),
        ("marginal", "Items of answers that no other recall path returned"),
        ("seconds", "Time in a recall path"),
    ):
        found = {path: getattr(of_path, field) for path, of_path in counts.paths.items()}
        yield labelled(CounterMetricFamily, f"eddyline_worker_path_{field}", what, "path", found)


def _sizes(index: pb.IndexSizes) -> Metric:
    parts = ("live", "tombstones", "main", "fresh", "stale", "rows")
    sizes = {part: getattr(index, part) for part in parts}
    return labelled(
        GaugeMetricFamily,
        "eddyline_worker_index_items",
        "Items of the index by part",
        "part",
        sizes,
    )


def _index(index: pb.IndexSizes) -> Iterator[Metric]:
    records = {what: getattr(index, what) for what in ("applied", "ignored", "rejected")}
    yield labelled(
        CounterMetricFamily,
        "eddyline_worker_index_records",
        "Item records by outcome",
        "outcome",
        records,
    )
    rebuilds = {"done": index.rebuilds, "failed": index.rebuilds_failed}
    yield labelled(
        CounterMetricFamily, "eddyline_worker_index_rebuilds", "Graphs built", "outcome", rebuilds
    )
    yield GaugeMetricFamily(
        "eddyline_worker_index_rebuilding", "Whether a rebuild runs", value=index.rebuilding
    )
    seconds = "eddyline_worker_index_rebuild_seconds"
    yield GaugeMetricFamily(seconds, "Duration of the last rebuild", value=index.rebuild_s)
    exact = "eddyline_worker_index_exact"
    yield CounterMetricFamily(exact, "Searches answered by a scan instead", value=index.refused)
    yield GaugeMetricFamily(
        "eddyline_worker_index_breadth", "Candidates of a search", value=index.breadth
    )


def _recall(recall: pb.RecallStatus) -> Iterator[Metric]:
    if recall.samples:
        bounds = {"estimate": recall.estimate, "low": recall.low, "high": recall.high}
        yield labelled(
            GaugeMetricFamily,
            "eddyline_worker_recall",
            "Share of the exact answer that was found",
            "bound",
            bounds,
        )
    yield GaugeMetricFamily(
        "eddyline_worker_recall_samples", "Queries behind the estimate", value=recall.samples
    )
    steps = {step: float(step == recall.step) for step in ("normal", "wider", "rebuild", "exact")}
    yield labelled(
        GaugeMetricFamily, "eddyline_worker_recall_step", "Step of the recall guard", "step", steps
    )
    shadowed = {"compared": recall.shadowed, "skipped": recall.skipped}
    yield labelled(
        CounterMetricFamily,
        "eddyline_worker_recall_shadowed",
        "Sampled queries",
        "outcome",
        shadowed,
    )


def _tail(tail: pb.TailStatus) -> Iterator[Metric]:
    lag = "eddyline_worker_tail_lag_records"
    yield GaugeMetricFamily(lag, "Item records not applied yet", value=tail.lag_records)
    yield GaugeMetricFamily(
        "eddyline_worker_tail_caught_up",
        "Whether the index has reached the topic's end",
        value=tail.caught_up,
    )
    yield CounterMetricFamily(
        "eddyline_worker_tail_records", "Item records read", value=tail.records
    )
    bad = {"undecodable": tail.undecodable, "rejected": tail.rejected}
    yield labelled(
        CounterMetricFamily, "eddyline_worker_tail_skipped", "Item records skipped", "reason", bad
    )
    away_s = max(0.0, time.time() - tail.away_since_ms / 1000) if tail.away_since_ms else 0.0
    yield GaugeMetricFamily(
        "eddyline_worker_kafka_away_seconds", "How long Kafka has been unavailable", value=away_s
    )
