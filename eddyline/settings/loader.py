"""Every setting, in one place: its name, type, default, limits and what it does.

Sources, the later one wins: the default here → the TOML file (`EDDYLINE_CONFIG`, else `eddyline.toml` in
the working directory where it exists) → the environment (`EDDYLINE_<NAME>` in capitals). `KAFKA_BOOTSTRAP_SERVERS`
and `REDIS_URL` are read as well, below their `EDDYLINE_` forms. An unknown key or a bad value raises SettingsError, which names the key, the
value and the source. `docs/configuration.md` is generated from this file (`eddyline settings --markdown`).
"""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from eddyline.errors import SettingsError
from eddyline.kafka import security

PREFIX = "EDDYLINE_"
ALIASES = {"KAFKA_BOOTSTRAP_SERVERS": "kafka_bootstrap_servers", "REDIS_URL": "redis_url"}
# These start with the prefix, but steer the set-up or the reading of settings; they are no settings.
NOT_SETTINGS = {"EDDYLINE_CONFIG"}
SECRETS = {"redis_url", "kafka_sasl_password", "kafka_key_password"}
_PORT_MAX = 65_535
WEIGHED_KINDS = ("view", "click", "like", "cart", "purchase")
KafkaProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
KafkaMechanism = Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]
MainName = Literal["hnswlib", "faiss-flat", "faiss-ivf", "faiss-ivfpq", "faiss-hnsw", "annoy"]


def _about(text: str, **limits: Any) -> Meta:
    return Meta(description=text, **limits)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings, checked. Durations are in the unit that ends the name."""

    # Servers
    kafka_bootstrap_servers: Annotated[
        str,
        _about(
            "Kafka's addresses, `host:port,…`. Empty: the local Kafka that `eddyline up` or the demo started."
        ),
    ] = ""
    redis_url: Annotated[
        str,
        _about(
            "Redis' address, `redis://user:password@host:port/0`; `rediss://` is TLS. Empty: the local Valkey that `eddyline up` or the demo started."
        ),
    ] = ""
    redis_cluster: Annotated[
        bool,
        _about(
            "`redis_url` is a Redis Cluster; it may name several nodes then, `redis://host:port,host:port`."
        ),
    ] = False
    redis_ca_file: Annotated[
        str,
        _about(
            "PEM file of the only CA whose certificates Redis may show. Empty: those this machine trusts."
        ),
    ] = ""
    redis_cert_file: Annotated[
        str, _about("PEM file of our own certificate, where Redis asks for one.")
    ] = ""
    redis_key_file: Annotated[
        str,
        _about("PEM file of its key, without a pass phrase. Empty: it is in `redis_cert_file`."),
    ] = ""
    namespace: Annotated[
        str,
        _about(
            "Put before every topic, Redis key, consumer group and transactional id: several Eddylines on one Kafka and Redis.",
            pattern=r"^[a-z0-9-]*\Z",
            max_length=40,
        ),
    ] = ""
    data_dir: Annotated[
        str,
        _about("Where the local servers, the demo and the bundles keep their files.", min_length=1),
    ] = ".eddyline"
    bundle_dir: Annotated[
        str, _about("Folder of the generation bundles. Empty: `generations` in `data_dir`.")
    ] = ""
    kafka_timeout_ms: Annotated[
        int, _about("How long one call to Kafka may take.", ge=100, le=600_000)
    ] = 10_000
    redis_timeout_ms: Annotated[
        int,
        _about(
            "How long one call to Redis may take; in a query worker at most half of `query_timeout_ms`.",
            ge=10,
            le=60_000,
        ),
    ] = 2_000
    backoff_ms_max: Annotated[
        int,
        _about(
            "The longest wait between two tries to reach a server that is away.", ge=10, le=60_000
        ),
    ] = 2_000

    # Kafka's security: docs/security.md
    kafka_security_protocol: Annotated[
        KafkaProtocol,
        _about("How Kafka is spoken to: `SSL` is TLS, `SASL_…` logs in by name and password."),
    ] = "PLAINTEXT"
    kafka_sasl_mechanism: Annotated[
        KafkaMechanism, _about("How to log in; only with `SASL_…`.")
    ] = ""
    kafka_sasl_username: Annotated[
        str, _about("The user's name at Kafka.", pattern=r"^[^\x00-\x1f\x7f]*\Z", max_length=1_000)
    ] = ""
    kafka_sasl_password: Annotated[
        str,
        _about("The user's password at Kafka.", pattern=r"^[^\x00-\x1f\x7f]*\Z", max_length=1_000),
    ] = ""
    kafka_ca_file: Annotated[
        str,
        _about(
            "PEM file of the authorities that Kafka's certificate is checked by. Empty: those of the system."
        ),
    ] = ""
    kafka_cert_file: Annotated[
        str, _about("PEM file of our own certificate, where Kafka asks for one (mTLS).")
    ] = ""
    kafka_key_file: Annotated[
        str, _about("PEM file of its private key. Empty: the key is in `kafka_cert_file`.")
    ] = ""
    kafka_key_password: Annotated[
        str, _about("Password of the private key. Empty: it is not encrypted.", max_length=1_000)
    ] = ""

    # Topics (fixed when they are made)
    clicks_partitions: Annotated[
        int,
        _about(
            "Partitions of `clicks` and `users`: the most ingest processes that can share the clicks. Fixed when the topics are made.",
            ge=1,
            le=4_096,
        ),
    ] = 8
    items_partitions: Annotated[
        int,
        _about(
            "Partitions of `items` and of `item-vectors`. Fixed when the topics are made.",
            ge=1,
            le=1_024,
        ),
    ] = 4
    items_fence_s: Annotated[
        int,
        _about(
            "Item records are written in a transaction at the start of a partition and every so many seconds; between them a producer that lost its partition is refused by its epoch. 0: every chunk in a transaction of its own, slower.",
            ge=0,
            le=43_200,
        ),
    ] = 3_600
    item_slots: Annotated[
        int,
        _about(
            "Hash shards of the item state in Redis; above 1 only for Redis Cluster.",
            ge=1,
            le=1_024,
        ),
    ] = 1
    replication_factor: Annotated[
        int, _about("Copies of each topic that Eddyline makes.", ge=1, le=9)
    ] = 1
    clicks_retention_h: Annotated[int, _about("How long Kafka keeps clicks.", ge=1, le=87_600)] = (
        168
    )
    dead_letters_retention_h: Annotated[
        int, _about("How long Kafka keeps dead letters.", ge=1, le=87_600)
    ] = 720

    # Ingest
    chunk_records_max: Annotated[
        int,
        _about(
            "The most records that are applied together; of one partition, clicks go 48 at a time at most.",
            ge=1,
            le=5_000,
        ),
    ] = 256
    history_length_max: Annotated[
        int, _about("The most behaviours kept for a user.", ge=1, le=1_000)
    ] = 100
    history_cache_entries_max: Annotated[
        int,
        _about(
            "The most behaviours that an ingest process keeps in memory, so as not to ask Redis for them; about 150 bytes each.",
            ge=0,
            le=100_000_000,
        ),
    ] = 400_000
    history_age_s_max: Annotated[
        int,
        _about(
            "Behaviours this much older than a user's newest one leave his list (event time); 0 is no limit.",
            ge=0,
            le=3_153_600_000,
        ),
    ] = 0
    lateness_s_max: Annotated[
        int,
        _about(
            "An event this much older than the user's newest one is too late for his list (event time); 0 is no limit.",
            ge=0,
            le=3_153_600_000,
        ),
    ] = 604_800
    weight_view: Annotated[
        float, _about("How much a `view` counts for popularity.", ge=0, le=100)
    ] = 0.5
    weight_click: Annotated[float, _about("How much a `click` counts.", ge=0, le=100)] = 1.0
    weight_like: Annotated[float, _about("How much a `like` counts.", ge=0, le=100)] = 2.0
    weight_cart: Annotated[float, _about("How much a `cart` counts.", ge=0, le=100)] = 3.0
    weight_purchase: Annotated[float, _about("How much a `purchase` counts.", ge=0, le=100)] = 5.0
    dwell_ms_full: Annotated[
        int,
        _about(
            "A shorter `dwell_ms` in a click's context weighs it down in proportion; 0 leaves dwell time alone.",
            ge=0,
            le=86_400_000,
        ),
    ] = 0
    dedupe_window_events: Annotated[
        int,
        _about(
            "A re-sent `event_id` is dropped where at most so many offsets of its partition lie between.",
            ge=2,
            le=10_000_000,
        ),
    ] = 65_536
    far_future_ms_max: Annotated[
        int,
        _about(
            "How far `at_ms` may lie after the broker's time stamp before the record is refused.",
            ge=0,
            le=86_400_000,
        ),
    ] = 300_000
    item_vector_dimension: Annotated[
        int,
        _about(
            "Length of the dense features that an item may carry in `vector`; 0 refuses any.",
            ge=0,
            le=4_096,
        ),
    ] = 0
    popular_bucket_s: Annotated[
        int,
        _about("Width of one bucket of the popularity counts, in event time.", ge=1, le=31_536_000),
    ] = 86_400
    popular_buckets: Annotated[
        int,
        _about("Buckets of popularity counts kept; older clicks no longer count.", ge=1, le=1_000),
    ] = 28
    popular_items_max: Annotated[
        int,
        _about(
            "The most items counted in one popularity bucket; the least counted ones go first.",
            ge=1,
            le=100_000_000,
        ),
    ] = 1_000_000
    popular_half_life_s: Annotated[
        int,
        _about("After this time a click counts half for the popular list.", ge=1, le=315_360_000),
    ] = 604_800

    # Archive
    archive_url: Annotated[
        str,
        _about(
            "Folder or object store (fsspec URL) of the archive. Empty: `archive` in `data_dir`."
        ),
    ] = ""
    archive_file_offsets: Annotated[
        int,
        _about(
            "A file of the archive ends at the hour, or at a multiple of so many offsets.",
            ge=1,
            le=100_000_000,
        ),
    ] = 262_144

    # Trainer
    train_from: Annotated[
        Literal["kafka", "archive"],
        _about(
            "What a training reads: the topics, or the archive and then what the topics have beyond it."
        ),
    ] = "kafka"

    # Query worker
    worker_host: Annotated[str, _about("Address the query worker binds to.", min_length=1)] = (
        "127.0.0.1"
    )
    worker_port: Annotated[
        int, _about("Port of the query worker; 0 takes a free one and prints it.", ge=0, le=65_535)
    ] = 50_051
    worker_threads: Annotated[
        int, _about("Calls a query worker answers at a time; as many again may wait.", ge=1, le=256)
    ] = 8
    worker_processes: Annotated[
        int,
        _about(
            "Processes of a query worker, on one port: forked from one that has loaded the index, they share its vectors and its graph. Above 1 it needs Linux.",
            ge=1,
            le=64,
        ),
    ] = 1
    worker_renew_s: Annotated[
        int,
        _about(
            "After this time the processes of a query worker are replaced by ones that share a graph of the newest snapshot.",
            ge=10,
            le=604_800,
        ),
    ] = 3_600
    shards: Annotated[
        int,
        _about(
            "Into how many shards the items are cut; a query worker holds one of them. 1: each worker holds all items.",
            ge=1,
            le=256,
        ),
    ] = 1
    shard: Annotated[
        int,
        _about(
            "Which shard a query worker holds: 0 for the first; less than `shards`.", ge=0, le=255
        ),
    ] = 0
    coordinator_host: Annotated[
        str, _about("Address the coordinator of shards binds to.", min_length=1)
    ] = "127.0.0.1"
    coordinator_port: Annotated[
        int, _about("Port of the coordinator; 0 takes a free one and prints it.", ge=0, le=65_535)
    ] = 50_052
    shard_addresses: Annotated[
        str,
        _about(
            "Addresses of the workers that the coordinator asks, `host:port,…`, in the order of their shards, the first one's first."
        ),
    ] = ""
    shard_timeout_ms: Annotated[
        int,
        _about(
            "How long the coordinator waits for one call of a shard; never more than half of the time that the query has left.",
            ge=1,
            le=60_000,
        ),
    ] = 200
    query_timeout_ms: Annotated[
        int, _about("Deadline of a query that brings none.", ge=1, le=60_000)
    ] = 1_000
    k_max: Annotated[int, _about("The largest `k` of a query.", ge=1, le=100_000)] = 1_000
    wait_ms_max: Annotated[
        int,
        _about(
            "The longest a query may wait for a click that it names (`after`).", ge=0, le=60_000
        ),
    ] = 2_000
    popular_refresh_ms: Annotated[
        int, _about("How often a query worker reads the popular list again.", ge=10, le=600_000)
    ] = 500
    popular_limit: Annotated[
        int, _about("The most items on the popular list.", ge=1, le=100_000)
    ] = 2_000
    popularity_beta: Annotated[
        float,
        _about(
            "How much popular items are held back where a query does not say: score = inner product − beta · ln p(item).",
            ge=0,
            le=10,
        ),
    ] = 0.0
    snapshot_interval_s: Annotated[
        int,
        _about(
            "How often a query worker writes a snapshot of its index, and at its stop; 0 is never.",
            ge=0,
            le=86_400,
        ),
    ] = 300
    index_exact_below: Annotated[
        int,
        _about(
            "Up to so many vectors every query is an exact scan and no graph is built.",
            ge=0,
            le=1_000_000_000,
        ),
    ] = 12_000
    index_m: Annotated[int, _about("hnswlib's M: links of a node.", ge=2, le=128)] = 16
    index_ef_construction: Annotated[
        int,
        _about("hnswlib's ef_construction: breadth of the search while building.", ge=2, le=10_000),
    ] = 200
    index_ef: Annotated[
        int, _about("hnswlib's ef: breadth of the search while querying.", ge=1, le=10_000)
    ] = 200
    index_fresh_max: Annotated[
        int,
        _about(
            "So many fresh vectors beside the graph start a rebuild in the background.",
            ge=1,
            le=10_000_000,
        ),
    ] = 4_096
    index_tier_above: Annotated[
        int,
        _about(
            "While a rebuild is long, more fresh vectors than this get a graph of their own, a second tier; 0 is never.",
            ge=0,
            le=1_000_000_000,
        ),
    ] = 32_768
    index_main: Annotated[
        MainName,
        _about(
            "The main index; `faiss-…` and `annoy` need their extra. Which one when: docs/benchmarks.md."
        ),
    ] = "hnswlib"
    index_recall_share: Annotated[
        float,
        _about(
            "Share of the queries that the recall guard answers exactly as well; 0 is no guard.",
            ge=0,
            le=1,
        ),
    ] = 0.01
    index_recall_floor: Annotated[
        float,
        _about(
            "Below this recall the guard raises the work that is done for each query.", ge=0, le=1
        ),
    ] = 0.95
    index_recall_samples: Annotated[
        int, _about("The fewest compared queries that the guard judges by.", ge=2, le=100_000)
    ] = 200
    index_recall_cpu_percent_max: Annotated[
        float, _about("The most of one core that the recall guard takes.", ge=0.01, le=100)
    ] = 2.0
    index_ef_max: Annotated[
        int,
        _about("The most candidates that the recall guard has a search ask for.", ge=1, le=100_000),
    ] = 1_600

    # Metrics and logs
    metrics_host: Annotated[str, _about("Address that metrics are served at.", min_length=1)] = (
        "127.0.0.1"
    )
    ingest_metrics_port: Annotated[
        int,
        _about("Port of an ingest process's Prometheus metrics; 0 serves none.", ge=0, le=65_535),
    ] = 0
    worker_metrics_port: Annotated[
        int,
        _about(
            "Port of a query worker's or a coordinator's Prometheus metrics; 0 serves none. Each further "
            "process of a worker (`worker_processes`) has the next one.",
            ge=0,
            le=65_535,
        ),
    ] = 0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], _about("The least severe log line written.")
    ] = "info"
    log_format: Annotated[
        Literal["console", "json"], _about("Log lines for people or for machines.")
    ] = "console"

    def __repr__(self) -> str:
        """All settings, the secret ones hidden: logs and tracebacks may show it."""
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """(name, value) of every setting, the secret ones hidden."""
        values = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return [
            (name, "(hidden)" if value and name in SECRETS else value) for name, value in values
        ]

    @property
    def bundles(self) -> Path:
        """The folder of the generation bundles."""
        return Path(self.bundle_dir) if self.bundle_dir else Path(self.data_dir) / "generations"

    @property
    def kind_weights(self) -> dict[str, float]:
        """How much each kind of behaviour counts; a dislike counts nothing, it excludes."""
        weights = {kind: getattr(self, f"weight_{kind}") for kind in WEIGHED_KINDS}
        return weights | {"dislike": 0.0}

    @property
    def snapshots(self) -> Path:
        """Folder of the query workers' snapshots."""
        return Path(self.data_dir) / "snapshots"

    def prefixed(self, name: str) -> str:
        """A topic, group or transactional id inside the namespace."""
        return f"{self.namespace}.{name}" if self.namespace else name


def load(environ: Mapping[str, str] | None = None, *, folder: Path | None = None) -> Settings:
    """The settings of this process. Raises SettingsError, which names key, value and source.

    environ: by default the process's own; folder: where `eddyline.toml` is looked for, by default here
    """
    environ = os.environ if environ is None else environ
    values: dict[str, tuple[Any, str]] = {}
    for key, value, source in (*_from_file(environ, folder or Path()), *_from_environment(environ)):
        values[key] = (value, source)
    hints = get_type_hints(Settings, include_extras=True)
    checked: dict[str, Any] = {}
    for key, (value, source) in values.items():
        if key not in hints:
            raise SettingsError(
                f"{source}: there is no setting {key!r}; the settings are in docs/configuration.md"
            )
        try:
            checked[key] = msgspec.convert(
                value, hints[key], strict=not source.startswith("environment")
            )
        except msgspec.ValidationError as error:
            shown = "(hidden)" if key in SECRETS else repr(value)
            raise SettingsError(f"{source}: {key} = {shown}: {error}") from None
    made = Settings(**checked)
    if made.dedupe_window_events < 2 * made.chunk_records_max:
        raise SettingsError(
            f"dedupe_window_events = {made.dedupe_window_events}: must be at least twice chunk_records_max = "
            f"{made.chunk_records_max}, for a slot may be one chunk behind another"
        )
    if made.worker_metrics_port + made.worker_processes - 1 > _PORT_MAX:
        raise SettingsError(
            f"worker_metrics_port = {made.worker_metrics_port}: the {made.worker_processes} processes of "
            f"worker_processes need as many ports from there, the last one is {_PORT_MAX}"
        )
    security.check(made)
    return made


def data_folder(settings: Settings) -> Path:
    """The data folder, made where it is not there. Raises SettingsError where it cannot be written to."""
    folder = Path(settings.data_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SettingsError(
            f"data_dir = {settings.data_dir!r}: cannot be written to: {error.strerror}"
        ) from None
    return folder


def describe() -> Iterator[tuple[str, str, Any, str]]:
    """(name, type with its limits, default, what it does) of every setting, in the order of this file."""
    hints = get_type_hints(Settings, include_extras=True)
    for info in msgspec.structs.fields(Settings):
        base, *metas = get_args(hints[info.name])
        described = next(m for m in metas if isinstance(m, Meta) and m.description)
        kind = (
            " | ".join(value or "empty" for value in get_args(base))
            if get_args(base)
            else base.__name__
        )
        limits = [
            str(described.ge) if described.ge is not None else "",
            str(described.le) if described.le is not None else "",
        ]
        yield (
            info.name,
            kind + (f", {limits[0]} … {limits[1]}" if any(limits) else ""),
            info.default,
            described.description or "",
        )


def _from_file(environ: Mapping[str, str], folder: Path) -> Iterator[tuple[str, Any, str]]:
    named = environ.get("EDDYLINE_CONFIG")
    path = Path(named) if named else folder / "eddyline.toml"
    if not named and not path.exists():
        return
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"EDDYLINE_CONFIG = {named!r}: cannot be read: {error.strerror}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from None
    for key, value in table.items():
        yield key, value, str(path)


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for name, key in ALIASES.items():
        if environ.get(name):
            yield key, environ[name], f"environment variable {name}"
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in NOT_SETTINGS:
            yield name.removeprefix(PREFIX).lower(), environ[name], f"environment variable {name}"
