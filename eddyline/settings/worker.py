"""Settings of the query worker, its shards and their coordinator."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from eddyline.errors import SettingsError
from eddyline.schema.events import KINDS
from eddyline.settings.field import within

_PORT_MAX = 65_535
# What `recall_paths` may name: those of `serving.recall.registry`.
RECALL_PATHS = (
    "towers",
    "interests",
    "co_visits",
    "co_visits_both",
    "next",
    "again",
    "popular",
    "popular_fast",
    "popular_slow",
    "newest",
)
# Those that need a state which ingest keeps for them.
OF_CO_VISITS = frozenset({"co_visits", "co_visits_both", "next"})
OF_EVENT_SUMS = frozenset({"popular_fast", "popular_slow", "co_visits_both"})
WEIGHT_MAX = 1_000.0
_TIME = re.compile(r"(\d{1,12})([smhd])")
_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_ALWAYS = {"never": math.inf, "0": 0.0}
_SEEN_S_MAX = 3_153_600_000


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Serving: ports, processes, shards, queries."""

    worker_host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    """Address the query worker binds to: a name, an IPv4 or an IPv6 address (`::` for all)."""
    worker_port: Annotated[int, within(0, 65_535)] = 50_051
    """Port of the query worker; 0 takes a free one and prints it."""
    worker_threads: Annotated[int, within(1, 256)] = 8
    """The most queries that a worker answers at a time; as many again may wait."""
    worker_first_threads: Annotated[int, within(1, 256)] = 2
    """Of those, so many start without a wait: one computes while another one waits for Redis. The
    others start once all of these wait for long. More only cost CPU, unless Redis is far away:
    where an answer of it takes longer than a query's own CPU, one more for each time as long."""
    worker_processes: Annotated[int, within(1, 64)] = 1
    """Processes of a query worker, on one port: forked from one that has loaded the index, they
    share its vectors and its graph. Above 1 it needs Linux."""
    worker_renew_s: Annotated[int, within(10, 604_800)] = 3_600
    """After this time the processes of a query worker are replaced by ones that share a graph of
    the newest snapshot."""
    worker_metrics_port: Annotated[int, within(0, 65_535)] = 0
    """Port of a query worker's or a coordinator's Prometheus metrics; 0 serves none. Each further
    process of a worker (`worker_processes`) has the next one."""
    snapshot_interval_s: Annotated[int, within(0, 86_400)] = 300
    """How often a query worker writes a snapshot of its index; it also writes one when it stops. 0
    is never."""

    # Shards and their coordinator
    shards: Annotated[int, within(1, 256)] = 1
    """The number of shards that the items are divided into; a query worker holds one. 1: each
    worker holds all items."""
    shard: Annotated[int, within(0, 255)] = 0
    """The shard of a query worker: 0 for the first; less than `shards`."""
    shard_service: bool = False
    """Whether a worker that holds all items also answers a coordinator; one that holds a shard
    always does."""
    coordinator_host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    """Address the coordinator of shards binds to."""
    coordinator_port: Annotated[int, within(0, 65_535)] = 50_052
    """Port of the coordinator; 0 takes a free one and prints it."""
    shard_addresses: str = ""
    """Addresses of the coordinator's workers, `host:port,…`, in the order of their shards;
    an IPv6 address in brackets: `[::1]:50051`."""
    shard_timeout_ms: Annotated[int, within(1, 60_000)] = 200
    """How long the coordinator waits for one call of a shard; never more than half of the query's
    remaining time."""

    # Queries
    query_timeout_ms: Annotated[int, within(1, 60_000)] = 1_000
    """Deadline of a query that sets none."""
    k_max: Annotated[int, within(1, 100_000)] = 1_000
    """The largest `k` of a query."""
    wait_ms_max: Annotated[int, within(0, 60_000)] = 2_000
    """The longest a query may wait for a click that it names (`after`)."""
    waiting_calls_max: Annotated[int, within(1, 100_000)] = 256
    """The most queries of a worker process that wait for a click at a time; further ones are
    refused unless their click is known to be applied."""
    popular_refresh_ms: Annotated[int, within(10, 600_000)] = 500
    """How often a query worker reads the popular items again."""
    popular_limit: Annotated[int, within(1, 100_000)] = 2_000
    """The most popular items kept for queries."""
    filter_texts: Annotated[str, Meta(max_length=4_096)] = ""
    """Names of attributes, separated by commas, whose texts requests may filter on, such as
    `brand,color`: the same for workers and coordinator. A text of an item takes 8 to 16 bytes, and
    each different text about 200 more."""
    popularity_beta: Annotated[float, within(0, 10)] = 0.0
    """Popularity penalty of a query that sets none: score = inner product − beta · ln p(item)."""

    # Recall paths and their fusion: docs/operations.md
    recall_paths: Annotated[str, Meta(max_length=1_000)] = "towers,popular,newest"
    """The recall paths that an answer is made of, separated by commas. What they leave open is
    filled by `popular`, then by `newest`, named here or not."""
    fusion: Literal["cascade", "rrf", "blend"] = "cascade"
    """How the paths become one answer. `cascade`: path after path, in the order of
    `recall_paths`, each for what those before it left open. `rrf`: an item's score is the sum of
    weight / (60 + rank) over the paths that return it (reciprocal rank fusion). `blend`: an item's
    score is learned from the clicks by a judge with the same settings."""
    fusion_weights: Annotated[str, Meta(max_length=1_000)] = ""
    """Weights of paths for `rrf`, `name=weight,…`, above 0 and at most 1,000; a path without one
    has 1."""
    path_candidates: Annotated[int, within(1, 1_000)] = 100
    """How many candidates `rrf` and `blend` take of each path."""
    path_budget_ms: Annotated[int, within(1, 60_000)] = 500
    """After so long in the recall paths of a query, or half of its remaining time, those that were
    not called yet are left out, except for what fills the answer; the answer says so."""

    seen_items: Literal["hide", "keep"] = "hide"
    """Whether items that the user had come back: those of the list, and those beyond it
    (`seen_items_max`). `hide`: no answer has them. `keep`: only disliked items are left out, as
    where people buy the same again; the path `again` needs it."""
    seen_policy: Annotated[str, Meta(max_length=1_000)] = ""
    """Kinds of events for which `seen_items` does not hold, `kind=time,…`: how long an item stays
    hidden after such an event, as in `view=30d,purchase=never` (`s`, `m`, `h`, `d`; `never`: it
    never comes back; `0`: it is not hidden). Of several events the longest time counts."""

    # Impressions: docs/operations.md
    answers_sample: Annotated[float, within(0, 1)] = 0.01
    """The share of the users whose answers are recorded in the topic `answers`, by a hash of their
    ids: always the same users. 0 records none."""


def names_of(listed: str) -> list[str]:
    """The names of a list that is separated by commas.

    >>> names_of("towers, newest")
    ['towers', 'newest']
    """
    return [name.strip() for name in listed.split(",")]


def weights_of(listed: str) -> dict[str, float]:
    """Path -> weight of `fusion_weights`. Raises SettingsError for what is not `name=weight`.

    >>> weights_of("towers=2, newest=0.5"), weights_of("")
    ({'towers': 2.0, 'newest': 0.5}, {})
    """
    found: dict[str, float] = {}
    for part in names_of(listed) if listed.strip() else ():
        name, equals, number = part.partition("=")
        name = name.strip()
        try:
            weight = float(number) if equals else math.nan
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight <= WEIGHT_MAX:
            raise SettingsError(
                f"fusion_weights = {listed!r}: {part!r} is not name=weight with a weight above 0 "
                f"and at most {WEIGHT_MAX:,.0f}"
            )
        if name in found:
            raise SettingsError(f"fusion_weights = {listed!r}: {name!r} is named twice")
        found[name] = weight
    return found


def seen_kinds_of(listed: str) -> dict[str, float]:
    """Kind -> seconds of `seen_policy`, infinite for `never`. Raises SettingsError.

    >>> seen_kinds_of("view=30d, purchase=never"), seen_kinds_of("")
    ({'view': 2592000.0, 'purchase': inf}, {})
    """
    found: dict[str, float] = {}
    for part in names_of(listed) if listed.strip() else ():
        kind, _, text = (one.strip() for one in part.partition("="))
        time = _TIME.fullmatch(text)
        if kind not in KINDS:
            wrong = f"{part!r} has no kind of event, which are {', '.join(KINDS)}"
        elif kind in found:
            wrong = f"{kind!r} is named twice"
        elif text in _ALWAYS:
            found[kind] = _ALWAYS[text]
            continue
        elif time is None or not 0 < int(time[1]) * _UNITS_S[time[2]] <= _SEEN_S_MAX:
            wrong = f"{part!r} has no time as 30d, 12h, 45m or 90s of at most 100 years, never or 0"
        else:
            found[kind] = float(int(time[1]) * _UNITS_S[time[2]])
            continue
        raise SettingsError(f"seen_policy = {listed!r}: {wrong}")
    return found


def check(settings: WorkerSettings) -> None:
    """Raise SettingsError for paths that cannot be used, and for more ports than there are."""
    _check_paths(settings)
    seen_kinds_of(settings.seen_policy)
    if settings.worker_metrics_port + settings.worker_processes - 1 > _PORT_MAX:
        raise SettingsError(
            f"worker_metrics_port = {settings.worker_metrics_port}: the "
            f"{settings.worker_processes} processes of worker_processes need as many ports from "
            f"there; the last one is {_PORT_MAX}"
        )


def _check_paths(settings: WorkerSettings) -> None:
    names = names_of(settings.recall_paths)
    for number, name in enumerate(names):
        wrong = ""
        if name not in RECALL_PATHS:
            wrong = f"there is no path {name!r}, the paths are {', '.join(RECALL_PATHS)}"
        elif name in names[:number]:
            wrong = f"{name!r} is named twice"
        if wrong:
            raise SettingsError(f"recall_paths = {settings.recall_paths!r}: {wrong}")
    for name in weights_of(settings.fusion_weights):
        if name not in names:
            raise SettingsError(
                f"fusion_weights = {settings.fusion_weights!r}: {name!r} is not in recall_paths = "
                f"{settings.recall_paths!r}"
            )
