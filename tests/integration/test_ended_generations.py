"""Old generations end: embeddings, item vectors, bundles and records of all but the newest go."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cli.commands import generations as commands
from cli.commands import replay_file
from eddyline import generations
from eddyline.errors import BundleError, EddylineError, GenerationEnded, KafkaUnavailable
from eddyline.generations import Manifest
from eddyline.kafka import producers, topics
from eddyline.kafka.producers import now_ms
from eddyline.kafka.topics import CLICKS
from eddyline.schema import events
from eddyline.schema.events import Click, shifted_to_now
from eddyline.schema.partitioning import partition_of, user_slot
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Source
from embeddings.bundle import bundle as bundles
from embeddings.bundle import removal
from embeddings.bundle.bundle import NewBundle
from sandbox.datasets.dataset import Dataset
from streams.ended_generations import EndedGenerations
from streams.generation import Generation
from streams.handlers import Handlers, Outputs
from tests.applying import ingest
from tests.integration.conftest import living
from tests.simulation.test_ingest_faults import Rec

pytestmark = pytest.mark.timeout(180)
USERS = [f"user-{n}" for n in range(12)]


def publish(settings: Settings, source: Path, name: str) -> Manifest:
    """Publish a generation of this name with the trained bundle's arrays."""
    trained = bundles.load(source)
    attributes = [dict(trained.item_attributes[n]) for n in range(len(trained.item_ids))]
    new = NewBundle(
        generation=name,
        created_ms=now_ms(),
        model=trained.model,
        item_ids=trained.item_ids,
        item_vectors=trained.item_vectors,
        item_partitions=trained.item_partitions,
        item_offsets=trained.item_offsets,
        item_attributes=attributes,
        cut=trained.cut,
        measured={},
    )
    bundles.write(settings.bundles / name, new)
    manifest = Manifest(generation=name, bundle=name, dimension=64, created_ms=new.created_ms)
    generations.publish(settings, manifest)
    return manifest


class Ingest:
    """Ingest's handlers in this process, with the active generation, on real servers."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = RedisStore(settings)
        self.producer = producers.make_producer(settings)
        towers = bundles.recorded(settings, generations.active_generation(settings))
        self.generation = Generation(towers)
        self.items = towers.item_ids
        self.handlers = Handlers(
            settings,
            self.store,
            topics.log_ids(settings, topics.SOURCES),
            [self.generation],
            Outputs.to_kafka(settings, self.producer),
            generations.known(settings),
        )
        ends = {p: (0, 2**40) for p in range(settings.clicks_partitions)}
        self.next = self.handlers.clicks.fences.open(ends)
        for partition in ends:
            self.handlers.clicks.open(partition)
        self.handlers.clicks.prepare(ends)
        self.ended = EndedGenerations(
            settings,
            self.store,
            self.handlers.clicks.cache,
            threading.Lock(),
            [self.generation.name],
            pytest.fail,
        )

    def click_all(self, first: int) -> None:
        """Seven clicks of every user: micro-steps begin with the sixth."""
        for user in USERS:
            partition = partition_of(user, self.settings.clicks_partitions)
            records = []
            for n in range(7):
                click = Click(
                    user_id=user,
                    item_id=self.items[(first + n) % len(self.items)],
                    at_ms=now_ms(),
                    event_id=f"{user}-{first}-{n}",
                )
                offset, value = self.next[partition], events.encode(click)
                self.next[partition] += 1
                records.append(Rec(CLICKS, partition, offset, now_ms(), user.encode(), value))
            ingest(self.handlers.clicks, partition, records)
        self.handlers.clicks.flush()

    def close(self) -> None:
        self.producer.close(timeout=5)
        self.store.close()


@pytest.fixture
def settings(
    fresh_settings: Settings, bundle: tuple[Path, Manifest], tmp_path: Path
) -> Iterator[Settings]:
    made = msgspec.structs.replace(
        fresh_settings, bundle_dir=str(tmp_path / "bundles"), generation_grace_s=0
    )
    topics.ensure_topics(made)
    yield made


@pytest.fixture
def trained(bundle: tuple[Path, Manifest]) -> Path:
    return bundle[0] / "1"


def owned(settings: Settings) -> dict[str, set[str]]:
    """What there is of each generation: "embeddings", "fences", "ranges", "topic", "bundle"."""
    found: dict[str, set[str]] = {}
    store = RedisStore(settings)
    try:
        for key in map(bytes.decode, store._redis.scan_iter(match=f"{settings.key_prefix}*")):
            rest = key.removeprefix(settings.key_prefix)
            if "}:e:" in rest:
                found.setdefault(rest.split(":")[2], set()).add("embeddings")
        for p in range(settings.clicks_partitions):
            slot = store._redis.get(f"{settings.key_prefix}{{u{p}}}:generations")
            for name in msgspec.msgpack.decode(slot) if slot else ():
                found.setdefault(name, set()).add("names")
    finally:
        store.close()
    with topics.open_admin(settings) as admin:
        prefix = settings.prefixed("item-vectors.")
        for topic in admin.list_topics():
            if topic.startswith(prefix):
                found.setdefault(topic.removeprefix(prefix), set()).add("topic")
    for folder in settings.bundles.glob("*"):
        found.setdefault(folder.name, set()).add("bundle")
    said = generations.read(settings)
    for name in said.manifests:
        found.setdefault(name, set()).add("manifest")
    for name, _ in said.ranges:
        found.setdefault(name, set()).add("ranges")
    return found


ALL = {"embeddings", "names", "topic", "bundle", "manifest", "ranges"}


def test_of_five_generations_the_newest_three_stay(
    settings: Settings, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generations, "REMOVE_AFTER_MS", 60_000)
    for number in range(1, 6):
        publish(settings, trained, str(number))
        process = Ingest(settings)
        process.click_all(10 * number)
        process.close()
    assert owned(settings) == dict.fromkeys("12345", ALL)
    found = generations.read(settings)
    assert list(found.ended) == ["1", "2"] and found.active == "5"
    later = now_ms() + 61_000

    # Nothing goes before the time; then it does, whatever fails in between.
    process = Ingest(settings)
    process.ended.check()
    assert removal.remove_ended(settings) == []
    assert owned(settings) == dict.fromkeys("12345", ALL)
    process.ended.check(later)
    assert process.ended.removed == 2 * len(USERS)
    with monkeypatch.context() as broken:
        broken.setattr(shutil, "rmtree", _fails)
        with pytest.raises(BundleError, match="bundle of an ended generation cannot be removed"):
            removal.remove_ended(settings, later)
    assert {"manifest", "ranges"} <= owned(settings)["1"] and "topic" not in owned(settings)["1"]
    with monkeypatch.context() as broken:
        broken.setattr(generations, "_append", _fails)
        with pytest.raises(KafkaUnavailable):
            removal.remove_ended(settings, later)
    assert removal.remove_ended(settings, later) == ["1", "2"]
    assert removal.remove_ended(settings, later) == []

    # Answers of the others go on, and so do their embeddings; the names go with the next writes.
    process.click_all(100)
    for partition in range(settings.clicks_partitions):
        source = Source(CLICKS, partition)
        assert process.store.read_slot(user_slot(partition), source).accepted
    process.close()
    assert owned(settings) == dict.fromkeys("345", ALL)
    assert not list(settings.bundles.glob(".*"))
    found = generations.read(settings)
    assert (list(found.manifests), list(found.ended)) == (["3", "4", "5"], ["1", "2"])

    # A rollback to a generation that is kept; none to one that is gone, nor under its name.
    with pytest.raises(BundleError, match="generation 2 has ended"):
        generations.activate(settings, "2")
    with pytest.raises(BundleError, match="generation 2 has ended"):
        generations.publish(settings, msgspec.structs.replace(found.manifests["3"], generation="2"))
    generations.activate(settings, "3")
    back = Ingest(settings)
    assert back.generation.name == "3"
    back.click_all(200)
    back.close()
    publish(settings, trained, "6")
    assert list(generations.read(settings).ended) == ["1", "2", "3"]


def test_an_end_is_void_while_the_generation_is_active_again(
    settings: Settings, trained: Path
) -> None:
    slow = msgspec.structs.replace(settings, generation_grace_s=3_600)
    for number in range(1, 5):
        publish(slow, trained, str(number))
    before = generations.read(slow)
    assert list(before.ended) == ["1"]
    generations.activate(slow, "1")
    assert not generations.read(slow).ended and generations.end_outdated(slow) == []
    # A race: somebody else decided it at the same moment, and died before looking again.
    end = msgspec.json.encode(before.ended["1"])
    generations._append(slow, [(b"end/1", end)])
    assert not generations.read(slow).ended
    Ingest(slow).close()
    publish(slow, trained, "5")
    ended = generations.read(slow).ended
    assert set(ended) == {"1", "2"}
    assert ended["1"].ended_ms > before.ended["1"].ended_ms, "a new end has its whole grace"


def test_the_commands_show_what_is_kept_and_what_ends(
    settings: Settings, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = msgspec.structs.replace(settings, generation_grace_s=3_600)
    for number in range(1, 5):
        publish(slow, trained, str(number))
    commands.show_list(slow)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    words = {"active", "kept", "ended"}
    states = {row[0]: next(w for w in row if w in words) for row in rows if words & set(row)}
    assert states == {"4": "active", "3": "kept", "2": "kept", "1": "ended"}
    commands.activate(slow, "2")
    commands.end(slow)
    said = capsys.readouterr().out
    assert "generation 2 is active; restart ingest and workers" in said
    assert "1 ended generations wait for their removal" in said


@pytest.mark.long
@pytest.mark.timeout(400)
def test_running_processes_leave_an_ended_generation_and_answers_go_on(
    servers: Settings,
    dataset: Dataset,
    bundle: tuple[Path, Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generations, "REMOVE_AFTER_MS", 1_000)
    shutil.copytree(bundle[0] / "1", tmp_path / "bundles" / "1")
    settings = msgspec.structs.replace(
        servers, namespace=f"t-{uuid.uuid4().hex[:12]}", data_dir=str(tmp_path / "data")
    )
    with living(settings, dataset, (tmp_path / "bundles", bundle[1])) as system:
        replay_file.send(system.settings, shifted_to_now(dataset.clicks[-2_000:], now_ms()))
        system.applied()
        assert "embeddings" in owned(system.settings)["1"]
        now = msgspec.structs.replace(system.settings, generation_grace_s=0)
        for number in range(2, 5):
            publish(now, bundle[0] / "1", str(number))

        def answers_from() -> str:
            try:
                found: str = system.client().stats().generation
            except EddylineError:
                return ""
            return found

        system.wait_for("the active generation", lambda: answers_from() == "4", 120)
        for name in ("ingest", "worker"):
            log = system.supervisor.log_file(name).read_text(encoding="utf-8")
            assert "generation 1 has ended" in log and "Traceback" not in log, name
        assert removal.remove_ended(now) == ["1"]

        def gone() -> bool:
            return "embeddings" not in owned(now).get("1", set())

        system.wait_for("the removal of embeddings", gone, 120)
        system.click("ana", dataset.items[0].item_id)
        system.applied()
        assert answers_from() == "4"


def test_a_process_with_an_ended_generation_opens_nothing(
    settings: Settings, trained: Path
) -> None:
    publish(settings, trained, "1")
    process = Ingest(settings)
    process.click_all(1)
    for number in range(2, 5):
        publish(settings, trained, str(number))
    with pytest.raises(GenerationEnded, match=r"generation 1 has ended .* active generation is 4"):
        process.ended.check()
    process.handlers.clicks.open(0)
    process.handlers.clicks.fences.open({0: (0, 2**40)})
    with pytest.raises(GenerationEnded, match="generation 1 has ended"):
        process.handlers.clicks.prepare([0])
    process.close()


def _fails(first: Any, *_: Any, **__: Any) -> None:
    raise KafkaUnavailable("away") if isinstance(first, Settings) else OSError("no right")
