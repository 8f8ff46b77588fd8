"""Settings of the query worker, its shards and their coordinator."""

from __future__ import annotations

from typing import Annotated

import msgspec

from eddyline.errors import SettingsError
from eddyline.settings.field import about

_PORT_MAX = 65_535


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Serving: ports, processes, shards, queries."""

    worker_host: Annotated[str, about("Address the query worker binds to.", min_length=1)] = (
        "127.0.0.1"
    )
    worker_port: Annotated[
        int, about("Port of the query worker; 0 takes a free one and prints it.", 0, 65_535)
    ] = 50_051
    worker_threads: Annotated[
        int,
        about("The most queries that a worker answers at a time; as many again may wait.", 1, 256),
    ] = 8
    worker_processes: Annotated[
        int,
        about(
            "Processes of a query worker, on one port: forked from one that has loaded the "
            "index, they share its vectors and its graph. Above 1 it needs Linux.",
            1,
            64,
        ),
    ] = 1
    worker_renew_s: Annotated[
        int,
        about(
            "After this time the processes of a query worker are replaced by ones that share a "
            "graph of the newest snapshot.",
            10,
            604_800,
        ),
    ] = 3_600
    worker_metrics_port: Annotated[
        int,
        about(
            "Port of a query worker's or a coordinator's Prometheus metrics; 0 serves none. "
            "Each further process of a worker (`worker_processes`) has the next one.",
            0,
            65_535,
        ),
    ] = 0
    snapshot_interval_s: Annotated[
        int,
        about(
            "How often a query worker writes a snapshot of its index; it also writes one when "
            "it stops. 0 is never.",
            0,
            86_400,
        ),
    ] = 300

    # Shards and their coordinator
    shards: Annotated[
        int,
        about(
            "The number of shards that the items are divided into; a query worker holds one. 1:"
            " each worker holds all items.",
            1,
            256,
        ),
    ] = 1
    shard: Annotated[
        int, about("The shard of a query worker: 0 for the first; less than `shards`.", 0, 255)
    ] = 0
    coordinator_host: Annotated[
        str, about("Address the coordinator of shards binds to.", min_length=1)
    ] = "127.0.0.1"
    coordinator_port: Annotated[
        int, about("Port of the coordinator; 0 takes a free one and prints it.", 0, 65_535)
    ] = 50_052
    shard_addresses: Annotated[
        str,
        about(
            "Addresses of the coordinator's workers, `host:port,…`, in the order of their shards."
        ),
    ] = ""
    shard_timeout_ms: Annotated[
        int,
        about(
            "How long the coordinator waits for one call of a shard; never more than half of "
            "the query's remaining time.",
            1,
            60_000,
        ),
    ] = 200

    # Queries
    query_timeout_ms: Annotated[int, about("Deadline of a query that sets none.", 1, 60_000)] = (
        1_000
    )
    k_max: Annotated[int, about("The largest `k` of a query.", 1, 100_000)] = 1_000
    wait_ms_max: Annotated[
        int, about("The longest a query may wait for a click that it names (`after`).", 0, 60_000)
    ] = 2_000
    popular_refresh_ms: Annotated[
        int, about("How often a query worker reads the popular items again.", 10, 600_000)
    ] = 500
    popular_limit: Annotated[int, about("The most popular items kept for queries.", 1, 100_000)] = (
        2_000
    )
    popularity_beta: Annotated[
        float,
        about(
            "Popularity penalty of a query that sets none: score = inner product − beta · ln "
            "p(item).",
            0,
            10,
        ),
    ] = 0.0


def check(settings: WorkerSettings) -> None:
    """Raise SettingsError if the processes of a worker need more ports than there are."""
    if settings.worker_metrics_port + settings.worker_processes - 1 > _PORT_MAX:
        raise SettingsError(
            f"worker_metrics_port = {settings.worker_metrics_port}: the "
            f"{settings.worker_processes} processes of worker_processes need as many ports from "
            f"there; the last one is {_PORT_MAX}"
        )
