"""Start a running system: servers, data set, generation, processes, replayed history."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.console import Console

from cli.commands import replay_file
from cli.demo import database as demo_database
from cli.demo.steps import Steps
from eddyline import generations
from eddyline.errors import BundleError, KafkaUnavailable, SettingsError
from eddyline.generations import Manifest
from eddyline.kafka import topics
from eddyline.schema.events import shifted_to_now
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from sandbox import processes
from sandbox.datasets import catalogue
from sandbox.datasets.dataset import Dataset, DatasetUnavailable
from sandbox.processes import Deployment
from sandbox.servers import status
from sandbox.servers.postgres import Postgres
from sandbox.servers.status import ServerStatus
from serving.rpc.client import is_ready

# The towers learn from the first 80% by time; the rest is new to them, as in production.
TRAIN_SHARE = 0.8
# Nothing applied for this long: ingest is broken, not slow.
STALLED_S = 60.0


@dataclass
class RunningDemo:
    """A running system with a data set.

    took_s:   seconds of each step, in order
    database: has the items, None where they were sent to Kafka
    """

    deployment: Deployment
    dataset: Dataset
    address: str
    servers: list[ServerStatus]
    took_s: dict[str, float] = field(default_factory=dict)
    database: Postgres | None = None


@contextlib.contextmanager
def bring_up(
    settings: Settings, data: str, console: Console, *, cdc: bool = False
) -> Iterator[RunningDemo]:
    """A running system with the data set `data`; all that is started here ends with the block.

    cdc: the items are rows of a table in PostgreSQL
    """
    if data not in catalogue.NAMES:
        raise SettingsError(f"DATA={data}: expected one of {', '.join(catalogue.NAMES)}")
    steps = Steps(console)
    dataset = _load_dataset(settings, data, steps)
    console.print(
        f"[bold]{dataset.name}[/]: {len(dataset.items):,} items, {len(dataset.profiles):,} users, "
        f"{len(dataset.clicks):,} events"
    )
    if dataset.licence:
        console.print(f"[dim]{' '.join(dataset.licence.split())}[/]")
    settings = processes.with_namespace(settings, dataset)
    if cdc:
        settings = demo_database.with_database(settings)
    with contextlib.ExitStack() as stack:
        with steps.step("Kafka and Redis") as on_progress:
            deployment = stack.enter_context(
                processes.running_servers(settings, lambda what: on_progress(what, 0, 0))
            )
        servers = status.server_status(settings)
        for server in servers:
            console.print(f"  {server.version} at {server.address} ({server.why})")
            if "does not answer" in server.version:
                raise KafkaUnavailable(f"{server.version} at {server.address}; {server.why}")
        _check_store(deployment.settings)
        manifest = _generation(deployment.settings, dataset, steps)
        database = demo_database.start(deployment, dataset, steps) if cdc else None
        with steps.step("topics and generation"):
            deployment.prepare(manifest)
        worker, address = deployment.worker_child(is_ready, k_max="10000")
        with steps.step("ingest and worker"):
            deployment.supervisor.start(deployment.ingest_child(), worker)
        _replay_history(deployment, dataset, steps, with_items=not cdc)
        yield RunningDemo(deployment, dataset, address, servers, steps.took_s, database)


def _load_dataset(settings: Settings, data: str, steps: Steps) -> Dataset:
    with steps.step("data set") as on_progress:
        try:
            return catalogue.load(data, Path(settings.data_dir), on_progress)
        except DatasetUnavailable as error:
            steps.console.print(f"[yellow]{error}\nUsing the generated data set instead.[/]")
            return catalogue.load("generated", Path(settings.data_dir), on_progress)


def _generation(settings: Settings, dataset: Dataset, steps: Steps) -> Manifest:
    """The active generation if its bundle is here, else a new one, trained now."""
    from embeddings.bundle import bundle

    topics.ensure_topics(settings, [topics.GENERATIONS])
    folder = settings.bundles / dataset.name
    known = generations.active(settings)
    ids = [int(f.name) for f in folder.glob("*") if f.name.isdigit()]
    for generation in [known.generation] if known else [str(i) for i in sorted(ids, reverse=True)]:
        try:
            found = bundle.load(folder / generation)
        except BundleError as error:
            steps.console.print(f"[yellow]generation {generation} cannot be used: {error}[/]")
            continue
        steps.console.print(
            f"  generation {generation}: {len(found.item_ids):,} items, trained before"
        )
        return _manifest(dataset, found.generation, found.dimension, found.created_ms)
    generation = str(max([*ids, int(known.generation) if known else 0]) + 1)
    return _train(folder / generation, generation, dataset, steps)


def _train(folder: Path, generation: str, dataset: Dataset, steps: Steps) -> Manifest:
    with steps.step("training") as on_progress:
        on_progress("loading torch", 0, 0)
        from embeddings.bundle import bundle
        from embeddings.data.examples import TrainingData, split
        from embeddings.evaluation.next_item import evaluate
        from embeddings.training.trainer import train

        profiles = {user: dict(profile.attributes) for user, profile in dataset.profiles.items()}
        before, held_out = split(dataset.clicks, TRAIN_SHARE)
        data = TrainingData(items=dataset.items, profiles=profiles, clicks=before)
        report = train(
            data,
            folder,
            generation,
            on_progress=lambda at: on_progress(f"training, loss {at.loss:.2f}", at.step, at.steps),
        )
        found = bundle.load(folder)
        evaluation = evaluate(
            found,
            profiles,
            before,
            held_out,
            events_max=4_000,
            on_progress=lambda done, total: on_progress("evaluating on the last 20%", done, total),
        )
    steps.console.print(
        f"  generation {generation}: trained on {report.events:,} events in {report.wall_s:.0f} s; "
        "on the later 20% the clicked item is among the first ten in "
        f"{evaluation.towers.hit_rate_10:.1%} (popularity: {evaluation.popularity.hit_rate_10:.1%})"
    )
    return _manifest(dataset, generation, found.dimension, found.created_ms)


def _manifest(dataset: Dataset, generation: str, dimension: int, created_ms: int) -> Manifest:
    bundle = f"{dataset.name}/{generation}"
    return Manifest(
        generation=generation, bundle=bundle, dimension=dimension, created_ms=created_ms
    )


class _ReplayedEvents(msgspec.Struct, frozen=True, rename={"dataset": "world"}):
    """Which history is already in which log: a second start does not send it again."""

    cluster_id: str
    topic_id: str
    dataset: str
    clicks: int


def _check_store(settings: Settings) -> None:
    """Raise StoreRefused for a Redis that must not be used, before anything is trained."""
    store = RedisStore(settings)
    try:
        store.check()
    finally:
        store.close()


def _replay_history(
    deployment: Deployment, dataset: Dataset, steps: Steps, *, with_items: bool
) -> None:
    settings = deployment.settings
    log = topics.log_ids(settings, [topics.CLICKS])[topics.CLICKS]
    this = _ReplayedEvents(log.cluster_id, log.topic_id, dataset.name, len(dataset.clicks))
    note = Path(settings.data_dir) / "run" / f"replayed-{settings.namespace}.json"
    if not (note.exists() and note.read_bytes() == msgspec.json.encode(this)):
        clicks = shifted_to_now(dataset.clicks, time.time_ns() // 1_000_000)
        with steps.step("replay") as on_progress:
            for what, events in (
                ("items", dataset.items if with_items else []),
                ("profiles", list(dataset.profiles.values())),
                ("events", clicks),
            ):
                show = functools.partial(on_progress, f"sending {what}", total=len(events))
                replay_file.send(settings, events, on_sent=show)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_bytes(msgspec.json.encode(this))
    else:
        steps.console.print(
            f"  the history is in Kafka and Redis already ({len(dataset.clicks):,} events)"
        )
    with steps.step("ingest") as on_progress:
        processes.wait_until_applied(
            settings,
            timeout_s=STALLED_S,
            on_progress=lambda done, total: on_progress("applying to Redis", done, total),
            check=deployment.supervisor.check,
        )
