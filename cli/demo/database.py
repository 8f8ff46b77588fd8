"""The demo's items in PostgreSQL: Debezium brings each change of a row to Kafka."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from cli.demo.steps import Steps
from eddyline.errors import LocalServerError, SettingsError
from eddyline.kafka import topics
from eddyline.schema.events import Item
from eddyline.settings.loader import Settings
from sandbox.datasets.dataset import Dataset
from sandbox.processes import Deployment
from sandbox.servers import free_ports, kafka_connect, kafka_jars, postgres
from sandbox.servers.postgres import Postgres, literal

TABLE = "items"
# Kafka Connect reads every row of a new table before it reads changes.
SNAPSHOT_S = 120.0


def with_database(settings: Settings) -> Settings:
    """The settings of a deployment that reads the items from PostgreSQL, in a namespace of its own.

    Raises SettingsError for a Kafka with a login or TLS.
    """
    if settings.kafka_security_protocol != "PLAINTEXT":
        raise SettingsError(
            f"kafka_security_protocol = {settings.kafka_security_protocol!r}: with CDC=1 the demo "
            "needs a Kafka without TLS and login"
        )
    namespace = f"{settings.namespace}-cdc"
    return msgspec.structs.replace(
        settings,
        namespace=namespace,
        items_topic=f"{namespace}.public.{TABLE}",
        items_map="debezium",
    )


def start(deployment: Deployment, dataset: Dataset, steps: Steps) -> Postgres:
    """Start PostgreSQL with a table of the items, and Kafka Connect, as children of the supervisor.

    Returns when every row is in Kafka. Raises LocalServerError.
    """
    settings = deployment.settings
    cluster = topics.log_ids(settings, [topics.GENERATIONS])[topics.GENERATIONS].cluster_id
    # How far Kafka Connect has read holds for one Kafka only.
    folder = Path(settings.data_dir) / "cdc" / f"{settings.namespace}-{cluster}"
    ports = free_ports.choose_ports(folder / "run", ("postgres", "connect"))
    with steps.step("PostgreSQL") as on_progress:
        jars = kafka_jars.fetch()
        jars += kafka_jars.fetch(
            lambda done, total: on_progress("fetching Kafka Connect's jars", done, total),
            kafka_jars.CONNECT_LOCK,
        )
        child, database = postgres.prepare(folder, ports["postgres"])
        deployment.supervisor.start(child)
        database.sql(postgres.table_of(dataset.items, TABLE))
        rows = int(database.sql(f"select count(*) from {TABLE}"))
    with steps.step("Kafka Connect"):
        connector = kafka_connect.debezium(
            "eddyline",
            database.port,
            TABLE,
            topic_prefix=settings.namespace,
            partitions=settings.items_partitions,
        )
        kafka = settings.kafka_bootstrap_servers
        deployment.supervisor.start(
            kafka_connect.prepare(folder, kafka, ports["connect"], jars, [connector])
        )
        _wait_for_snapshot(deployment, database, rows)
    steps.console.print(
        f"  {rows:,} rows of the table {TABLE} in PostgreSQL at 127.0.0.1:{database.port}"
    )
    return database


def changes(like: Item, item_id: str, title: str) -> list[tuple[str, str, bool]]:
    """(what is done, the statement, whether the item is in answers after it), in order."""
    one = f"where item_id = {literal(item_id)}"
    values = f"{literal(item_id)}, {literal(title)}, categories, tags"
    return [
        (
            "INSERT",
            f"insert into {TABLE} (item_id, title, categories, tags) select {values} "
            f"from {TABLE} where item_id = {literal(like.item_id)}",
            True,
        ),
        ("UPDATE … SET available = false", f"update {TABLE} set available = false {one}", False),
        ("UPDATE … SET available = true", f"update {TABLE} set available = true {one}", True),
        ("DELETE", f"delete from {TABLE} {one}", False),
    ]


def _wait_for_snapshot(deployment: Deployment, database: Postgres, rows: int) -> None:
    deadline = time.monotonic() + SNAPSHOT_S
    while True:
        deployment.supervisor.check()
        active = database.sql("select active from pg_replication_slots") == "t"
        if active and sum(topics.end_offsets(deployment.settings, topics.ITEMS).values()) >= rows:
            return
        if time.monotonic() > deadline:
            raise LocalServerError(
                f"the {rows:,} rows of {TABLE} are not in Kafka after {SNAPSHOT_S:.0f} s; see "
                f"{deployment.supervisor.log_file('connect')}"
            )
        time.sleep(0.1)
