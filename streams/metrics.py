"""Prometheus metrics of an ingest process: lag, pauses, outcomes of records, the user cache.

Collected at a scrape from the pipelines' counters; a record costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from eddyline.errors import EddylineError
from eddyline.process import metrics
from eddyline.process.metrics import labelled
from eddyline.schema.partitioning import item_slots
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import StateStore
from streams.app import IngestApp
from streams.clicks.co_visits import CoVisitWriter
from streams.clicks.user_cache import UserCache
from streams.deleted_items import DeletedItems
from streams.ended_generations import EndedGenerations
from streams.idle_users import IdleUsers


class IngestCollector(Collector):
    """The metrics of one process. Thread rule: any thread; figures may differ by some records.

    refused_items: reads from the store how many items have a newer refused record
    """

    def __init__(
        self,
        app: IngestApp,
        cache: UserCache,
        ended: EndedGenerations,
        idle: IdleUsers,
        deleted: DeletedItems,
        co_visits: CoVisitWriter,
        refused_items: Callable[[], int],
    ) -> None:
        self._app = app
        self._cache = cache
        self._ended = ended
        self._idle = idle
        self._deleted = deleted
        self._co_visits = co_visits
        self._refused_items = refused_items

    @override
    def collect(self) -> Iterator[Metric]:
        pipelines = self._app.pipelines
        records = CounterMetricFamily(
            "eddyline_ingest_records", "Records by outcome", labels=["topic", "outcome"]
        )
        for pipeline in pipelines:
            for outcome, count in pipeline.outcome.counts().items():
                records.add_metric([pipeline.topic, outcome], count)
        yield records
        omitted = CounterMetricFamily(
            "eddyline_ingest_omitted_parts",
            "Bad optional parts that were left out of accepted records",
            labels=["topic", "part", "reason"],
        )
        for pipeline in pipelines:
            for (part, reason), count in list(pipeline.handler.omitted.items()):
                omitted.add_metric([pipeline.topic, part, reason], count)
        yield omitted
        for name, what, counter in (
            ("chunks", "Batches applied", "batches"),
            ("busy_seconds", "Time spent applying batches", "seconds"),
            ("rewinds", "Partitions sent back to their fence", "rewinds"),
            ("waits", "Waits for an unavailable server", "waits"),
        ):
            counts = {pipeline.topic: getattr(pipeline, counter) for pipeline in pipelines}
            yield labelled(CounterMetricFamily, f"eddyline_ingest_{name}", what, "topic", counts)
        yield labelled(
            GaugeMetricFamily,
            "eddyline_ingest_queued_chunks",
            "Batches fetched, not applied",
            "topic",
            self._app.queued(),
        )
        yield from self._partitions()
        yield CounterMetricFamily(
            "eddyline_ingest_users_asked", "Users looked up", value=self._cache.requested
        )
        yield CounterMetricFamily(
            "eddyline_ingest_users_cached", "Users found in the cache", value=self._cache.found
        )
        entries = "History entries in the cache"
        yield GaugeMetricFamily(
            "eddyline_ingest_cached_entries", entries, value=self._cache.entries
        )

        yield from self._gone()
        with suppress(EddylineError):  # the store is away: there is no sample
            yield GaugeMetricFamily(
                "eddyline_ingest_items_refused",
                "Items with a refused record that is newer than their state, in the whole store",
                value=self._refused_items(),
            )

    def _gone(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "eddyline_ingest_ended_embeddings_removed",
            "User-ID embeddings of ended generations removed from the store",
            value=self._ended.removed,
        )
        yield CounterMetricFamily(
            "eddyline_ingest_idle_users_removed",
            "Idle users whose histories and embeddings were removed from the store",
            value=self._idle.removed,
        )
        yield CounterMetricFamily(
            "eddyline_ingest_deleted_items_removed",
            "Deleted items whose metadata was removed from the store",
            value=self._deleted.removed,
        )
        yield CounterMetricFamily(
            "eddyline_ingest_co_visits_lost_offsets",
            "Offsets of clicks whose co-visits an item slot lost",
            value=self._co_visits.lost,
        )

    def _partitions(self) -> Iterator[Metric]:
        yield labelled(
            GaugeMetricFamily,
            "eddyline_ingest_paused_partitions",
            "Partitions that wait for a server or their position",
            "topic",
            self._app.paused(),
        )
        stopped = GaugeMetricFamily(
            "eddyline_ingest_partition_stopped",
            "1 for a partition that stands in front of a batch that cannot be read",
            labels=["topic", "partition", "reason"],
        )
        for batch in self._app.stopped():
            stopped.add_metric([batch.topic, str(batch.partition), batch.reason], 1)
        yield stopped
        lag = GaugeMetricFamily(
            "eddyline_ingest_lag_records", "Records not applied yet", labels=["topic", "partition"]
        )
        for at, behind in self._app.lag().items():
            lag.add_metric([at.topic, str(at.partition)], behind)
        yield lag


def serve(
    settings: Settings,
    app: IngestApp,
    cache: UserCache,
    ended: EndedGenerations,
    idle: IdleUsers,
    deleted: DeletedItems,
    co_visits: CoVisitWriter,
    store: StateStore,
) -> Callable[[], None]:
    """Serve Prometheus at `ingest_metrics_port`, if set. Returns the function that stops it."""
    slots = item_slots(settings.item_slots)
    collector = IngestCollector(
        app, cache, ended, idle, deleted, co_visits, lambda: store.count_refused_items(slots)
    )
    return metrics.serve(settings.metrics_host, settings.ingest_metrics_port, collector)
