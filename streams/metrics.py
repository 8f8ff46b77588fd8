"""What an ingest process tells Prometheus: lag, pauses, what became of records, the cache.

Read when it is asked for, from what the lanes keep anyway; a record costs nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from eddyline.process import metrics
from eddyline.settings.loader import Settings
from streams.app import IngestApp
from streams.clicks.user_cache import UserCache


class IngestCollector(Collector):
    """The metrics of one process. Thread rule: any thread; the figures may be some records apart."""

    def __init__(self, app: IngestApp, cache: UserCache) -> None:
        self._app = app
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        """Every metric, by topic."""
        records = CounterMetricFamily(
            "eddyline_ingest_records", "Records by what became of them", labels=["topic", "outcome"]
        )
        lanes = {
            "chunks": CounterMetricFamily(
                "eddyline_ingest_chunks", "Chunks applied", labels=["topic"]
            ),
            "seconds": CounterMetricFamily(
                "eddyline_ingest_busy_seconds", "Time spent on applying", labels=["topic"]
            ),
            "rewinds": CounterMetricFamily(
                "eddyline_ingest_rewinds", "Partitions sent back to their fence", labels=["topic"]
            ),
            "waits": CounterMetricFamily(
                "eddyline_ingest_waits", "Waits for a server that was away", labels=["topic"]
            ),
        }
        queued = GaugeMetricFamily(
            "eddyline_ingest_queued_chunks", "Chunks read, not applied", labels=["topic"]
        )
        for lane in self._app.lanes:
            for outcome, count in lane.outcome.counts().items():
                records.add_metric([lane.topic, outcome], count)
            for name, family in lanes.items():
                family.add_metric([lane.topic], getattr(lane, name))
            queued.add_metric([lane.topic], lane.queued())
        yield records
        yield from lanes.values()
        yield queued
        yield from self._standing()
        yield CounterMetricFamily(
            "eddyline_ingest_users_asked", "Users needed", value=self._cache.asked
        )
        yield CounterMetricFamily(
            "eddyline_ingest_users_cached", "Of those, known", value=self._cache.found
        )
        entries = "Behaviours kept in memory"
        yield GaugeMetricFamily(
            "eddyline_ingest_cached_entries", entries, value=self._cache.entries
        )

    def _standing(self) -> Iterator[Metric]:
        paused = GaugeMetricFamily(
            "eddyline_ingest_paused_partitions",
            "Partitions that wait for a server",
            labels=["topic"],
        )
        for topic, partitions in self._app.paused().items():
            paused.add_metric([topic], partitions)
        yield paused
        lag = GaugeMetricFamily(
            "eddyline_ingest_lag_records", "Records not applied yet", labels=["topic", "partition"]
        )
        for at, behind in self._app.lag().items():
            lag.add_metric([at.topic, str(at.partition)], behind)
        yield lag


def serve(settings: Settings, app: IngestApp, cache: UserCache) -> Callable[[], None]:
    """Answer Prometheus at `ingest_metrics_port`, where it is set. Returns what ends that."""
    return metrics.serve(
        settings.metrics_host, settings.ingest_metrics_port, IngestCollector(app, cache)
    )
