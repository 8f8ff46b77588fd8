"""`make cdc`: a row changed in PostgreSQL changes answers, by Debezium, Kafka and Eddyline.

make cdc                                            all forms of records
make cdc ARGS="--forms plain,unwrapped --rounds 50"

For each form of Debezium's records: the snapshot, then inserts, updates and deletes with the time
from the commit in PostgreSQL to the first answer that shows it, then changes around a `kill -9` of
Kafka Connect. Everything runs on free ports of the loopback interface and ends with the command.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from eddyline.errors import EddylineError
from eddyline.generations import Manifest
from eddyline.kafka import topics
from eddyline.kafka.producers import now_ms
from eddyline.schema.events import Item
from eddyline.settings.loader import Settings
from sandbox import processes
from sandbox.datasets import synthetic
from sandbox.datasets.dataset import Dataset
from sandbox.processes import Deployment
from sandbox.servers import free_ports, kafka_connect, kafka_jars, postgres
from sandbox.servers.local_servers import local_servers, log_dir
from sandbox.servers.postgres import Postgres, literal
from sandbox.servers.supervisor import Supervisor
from serving.proto import retrieval_pb2 as pb
from serving.rpc.client import Client, is_ready

FORMS: Mapping[str, Mapping[str, str]] = {
    "plain": {},
    "schemas": kafka_connect.WITH_SCHEMAS,
    "unwrapped": kafka_connect.UNWRAPPED,
}
ROUNDS, KILLS = 20, 2
# Changes at each kill, of each kind, before it and after it.
CHANGES = 10
# Every row of the data set costs more than this.
CHEAP = 10.0
SEEN_S = 30.0
BACK_S = 120.0
USER = "somebody"


@dataclass
class Checks:
    """The checks of one run. times: milliseconds by (form, kind of change)."""

    good: bool = True
    times: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def check(self, what: str, call: Callable[[], str]) -> None:
        """Run one check: it returns what it found, or raises."""
        begun = time.monotonic()
        try:
            found, mark = call(), "ok  "
        except (AssertionError, EddylineError, TimeoutError) as error:
            found, mark, self.good = f"{type(error).__name__}: {error}", "FAIL", False
        _say(f"{mark} {time.monotonic() - begun:6.1f} s  {what}: {found}")


@dataclass(frozen=True, slots=True)
class System:
    """Eddyline, reading one table, which has the name of the form. rows: at the start."""

    form: str
    settings: Settings
    supervisor: Supervisor
    database: Postgres
    client: Client
    rows: int

    def shows(self, item_id: str, price_max: float | None = None) -> bool:
        """Whether an answer has the item; with price_max only one that does not cost more."""
        filters = pb.Filters(allow=[item_id])
        if price_max is not None:
            filters.ranges.append(pb.Range(attribute="price", max=price_max))
        return [i.item_id for i in self.client.retrieve(USER, 5, filters=filters).items] == [
            item_id
        ]

    def all_shown(self) -> set[str]:
        """The items of an answer without a filter."""
        return {i.item_id for i in self.client.retrieve(USER, self.rows + 1_000).items}

    def costs(self, item_id: str, price: float) -> bool:
        """Whether the item passes a filter for exactly this price."""
        filters = pb.Filters(allow=[item_id])
        filters.ranges.append(pb.Range(attribute="price", min=price, max=price))
        return bool(self.client.retrieve(USER, 5, filters=filters).items)

    def table(self) -> dict[str, float]:
        """item id → price of every row in PostgreSQL."""
        text = self.database.sql(f"select item_id, price from {self.form} where available")
        pairs = (line.rsplit("|", 1) for line in text.splitlines())
        return {item_id: float(price) for item_id, price in pairs}


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Run the command line; returns 0 if every check passed."""
    parser = argparse.ArgumentParser(prog="make cdc", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--keep", action="store_true", help="keep the folder with the logs")
    arguments = parser.parse_args()
    forms = arguments.forms.split(",")
    if unknown := [form for form in forms if form not in FORMS]:
        parser.error(f"--forms {unknown[0]!r}: expected some of {', '.join(FORMS)}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    checks = Checks()
    folder = Path(tempfile.mkdtemp(prefix="eddyline-cdc-"))
    folder.chmod(0o755)  # PostgreSQL may run as another user
    try:
        with _servers(folder) as (settings, database, dataset, manifest):
            for form in forms:
                _check_form(form, settings, database, dataset, manifest, checks, arguments)
    except KeyboardInterrupt:
        _say("stopped")
        return 130
    except EddylineError as error:
        _say(f"FAIL {error}")
        checks.good = False
    finally:
        if arguments.keep or not checks.good:
            _say(f"logs: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    for line in _markdown(checks):
        _say(line)
    _say("every check passed" if checks.good else "a check failed")
    return 0 if checks.good else 1


@contextlib.contextmanager
def _servers(folder: Path) -> Iterator[tuple[Settings, Postgres, Dataset, Manifest]]:
    """Kafka, Valkey, and PostgreSQL with a table of items; a generation that knows these items."""
    settings = Settings(
        data_dir=str(folder),
        bundle_dir=str(folder / "bundles"),
        kafka_bootstrap_servers=os.environ.get("KAFKA_BOOTSTRAP_SERVERS", ""),
        redis_url=os.environ.get("REDIS_URL", ""),
    )
    made = synthetic.generate(items=300, users=120, clicks=6_000, seed=7)
    items = [_priced(number, item) for number, item in enumerate(made.items)]
    dataset = Dataset(made.name, made.licence, items, made.profiles, made.clicks)
    with (
        Supervisor(log_dir(settings)) as supervisor,
        local_servers(settings, supervisor, owner="make cdc", on_step=_say) as live,
    ):
        port = free_ports.choose_ports(folder / "run", ("postgres",))["postgres"]
        child, database = postgres.prepare(folder, port)
        _say("starting PostgreSQL")
        supervisor.start(child)
        _say(database.sql("select version()"))
        _say("training a generation")
        yield live, database, dataset, _train(folder / "bundles", dataset)


def _priced(number: int, item: Item) -> Item:
    attributes = dict(item.attributes) | {"price": 20.5 + number}
    return msgspec.structs.replace(item, attributes=attributes)


def _train(folder: Path, dataset: Dataset) -> Manifest:
    from embeddings.data.examples import TrainingData
    from embeddings.models.base import Recipe
    from embeddings.training.trainer import train

    profiles = {user: dict(profile.attributes) for user, profile in dataset.profiles.items()}
    data = TrainingData(items=dataset.items, profiles=profiles, clicks=dataset.clicks)
    train(data, folder / "1", "1", recipe=Recipe(epochs=2, seed=1))
    return Manifest(generation="1", bundle="1", dimension=64, created_ms=now_ms())


def _check_form(
    form: str,
    settings: Settings,
    database: Postgres,
    dataset: Dataset,
    manifest: Manifest,
    checks: Checks,
    arguments: argparse.Namespace,
) -> None:
    _say(f"\n{form}")
    with _system(form, settings, database, dataset, manifest) as system:
        checks.check("snapshot", lambda: _snapshot(system))
        checks.check("insert, update, delete", lambda: _changes(system, checks, arguments.rounds))
        for number in range(arguments.kills):
            checks.check(
                f"kill -9 of Kafka Connect, {number + 1}", lambda n=number: _killed(system, n)
            )
        checks.check("dead letters", lambda: _no_dead_letters(system))


@contextlib.contextmanager
def _system(
    form: str, settings: Settings, database: Postgres, dataset: Dataset, manifest: Manifest
) -> Iterator[System]:
    """A table, Kafka Connect with one connector, ingest and a worker; all end with the block."""
    rows = len(dataset.items)
    database.sql(postgres.table_of(dataset.items, form))
    folder = Path(settings.data_dir) / form
    settings = msgspec.structs.replace(
        settings,
        namespace=form,
        data_dir=str(folder),
        items_topic=f"{form}.public.{form}",
        items_map="debezium",
    )
    connector = kafka_connect.debezium(
        form, database.port, form, topic_prefix=form, partitions=settings.items_partitions
    )
    port = free_ports.choose_ports(folder / "run", ("connect",))["connect"]
    with Supervisor(log_dir(settings)) as supervisor, contextlib.ExitStack() as stack:
        supervisor.start(
            kafka_connect.prepare(
                folder,
                settings.kafka_bootstrap_servers,
                port,
                [*kafka_jars.fetch(), *kafka_jars.fetch(lock=kafka_jars.CONNECT_LOCK)],
                [connector | FORMS[form]],
            )
        )
        active = f"select active from pg_replication_slots where slot_name = {literal(form)}"
        _wait("the replication slot", lambda: database.sql(active) == "t", BACK_S)
        deployment = Deployment(settings, supervisor)
        deployment.prepare(manifest)
        _wait(
            "the snapshot in Kafka",
            lambda: sum(topics.end_offsets(settings, topics.ITEMS).values()) >= rows,
            BACK_S,
        )
        worker, address = deployment.worker_child(is_ready, k_max="10000")
        supervisor.start(deployment.ingest_child(), worker)
        processes.wait_until_applied(settings, timeout_s=BACK_S, check=supervisor.check)
        client = stack.enter_context(Client(address))
        try:
            yield System(form, settings, supervisor, database, client, rows)
        finally:
            supervisor.stop()
            # An unused slot keeps the log of all changes.
            database.sql(f"select pg_drop_replication_slot({literal(form)})")


def _snapshot(system: System) -> str:
    expected = set(system.table())
    _wait("every row in an answer", lambda: system.all_shown() == expected, SEEN_S)
    return f"all {len(expected)} rows are in an answer"


def _changes(system: System, checks: Checks, rounds: int) -> str:
    """Insert a row, make it cheap, delete it: each until an answer shows it."""
    table, (like, price) = system.form, next(iter(system.table().items()))
    for number in range(rounds):
        item = f"{system.form}-{number}"
        copied = (
            f"insert into {table} (item_id, title, categories, tags, year, price) "
            f"select {literal(item)}, title, categories, tags, year, price from {table} "
            f"where item_id = {literal(like)}"
        )
        one = f"where item_id = {literal(item)}"
        cheap = f"update {table} set price = {CHEAP - 1} {one}"
        gone = f"delete from {table} {one}"
        for kind, sql, holds in (
            ("INSERT", copied, lambda: system.shows(item, price + 1)),
            ("UPDATE", cheap, lambda: system.shows(item, CHEAP)),
            ("DELETE", gone, lambda: not system.shows(item)),
        ):
            assert not holds(), f"{kind} of {item}: the answer shows it already"
            commit_ms = system.database.commit_ms(sql)
            _wait(f"{kind} of {item} in an answer", holds, SEEN_S)
            took_ms = time.time_ns() / 1e6 - commit_ms
            checks.times.setdefault((system.form, kind), []).append(took_ms)
    return ", ".join(
        f"{kind} p50 {statistics.median(times):.0f} ms, max {max(times):.0f} ms"
        for (form, kind), times in checks.times.items()
        if form == system.form
    )


def _killed(system: System, number: int) -> str:
    """Change rows, kill Kafka Connect in the midst of it, and compare all answers with the table.

    Some changes are committed while it is dead.
    """
    begun, table = time.monotonic(), system.form
    restarts = system.supervisor.states()["connect"][1]
    old = list(system.table())

    def change(part: int) -> None:
        new = [f"{system.form}-killed-{number}-{part}-{n}" for n in range(CHANGES)]
        cheaper, deleted = old[:CHANGES], old[CHANGES : 2 * CHANGES]
        del old[: 2 * CHANGES]
        for item_id, cheap, gone in zip(new, cheaper, deleted, strict=True):
            system.database.sql(
                f"insert into {table} (item_id, title, price) "
                f"values ({literal(item_id)}, 'New', {len(old) + 30});\n"
                f"update {table} set price = price + 0.25 where item_id = {literal(cheap)};\n"
                f"delete from {table} where item_id = {literal(gone)};\n"
            )

    change(0)
    os.kill(system.supervisor.pids()["connect"], signal.SIGKILL)
    change(1)
    expected = system.table()
    _wait("every row in an answer", lambda: system.all_shown() == set(expected), BACK_S)
    back_s = time.monotonic() - begun
    _wait(
        "every price in an answer",
        lambda: all(system.costs(item_id, price) for item_id, price in expected.items()),
        BACK_S,
    )
    assert system.supervisor.states()["connect"][1] == restarts + 1, "it was restarted once"
    return f"all {len(expected)} rows and prices are in answers, {back_s:.1f} s after the kill"


def _no_dead_letters(system: System) -> str:
    found = sum(topics.end_offsets(system.settings, topics.DEAD_LETTERS).values())
    assert not found, f"{found} records were refused"
    return "none"


def _wait(what: str, holds: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.002)


def _markdown(checks: Checks) -> list[str]:
    """The times as a table for the documentation."""
    lines = ["", "| records | change | p50 ms | max ms |", "|---|---|---|---|"]
    for (form, kind), times in checks.times.items():
        shown = f"{statistics.median(times):.0f} | {max(times):.0f}"
        lines.append(f"| {form} | {kind} | {shown} |")
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
