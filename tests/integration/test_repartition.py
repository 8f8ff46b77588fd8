"""`eddyline repartition` on real servers: under load, killed, from the archive; nothing doubles."""

from __future__ import annotations

import itertools
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from eddyline import generations
from eddyline.errors import LogMismatch, SettingsError
from eddyline.kafka import producers, reading, topics
from eddyline.kafka.producers import now_ms
from eddyline.kafka.topics import CLICKS, ITEMS
from eddyline.schema import events
from eddyline.schema.events import Click, Item, Merge, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Source, UserQuery
from streams.operations import repartition_plan
from tests.archiving import archive_all
from tests.integration.test_large_records import limit
from tests.integration.test_refill import applied, command, environment, ingesting, retention

pytestmark = pytest.mark.timeout(400)
MORE_CLICKS, MORE_ITEMS = 7, 3
WORDS = ("--clicks", str(MORE_CLICKS), "--items", str(MORE_ITEMS), "--yes")


@pytest.fixture
def settings(fresh_settings: Settings, bundle: Any) -> Settings:
    return prepared(fresh_settings, bundle)


def prepared(settings: Settings, bundle: Any) -> Settings:
    """The settings with an active generation."""
    folder, manifest = bundle
    made = msgspec.structs.replace(settings, bundle_dir=str(folder), dedupe_window_events=600)
    topics.ensure_topics(made)
    generations.publish(made, manifest)
    return made


class Shop:
    """Producers of one shop, and what each user and item must have in the end.

    to: the namespace that each kind of record is sent to; it changes under way
    """

    def __init__(self, settings: Settings, seed: int) -> None:
        self.to = self.settings = settings
        self.histories: dict[str, Counter[tuple[str, int]]] = defaultdict(Counter)
        self.counts: Counter[str] = Counter()
        self.items: dict[str, str | None] = {}
        self._rng = random.Random(seed)
        self._number = itertools.count()
        self._producer = producers.make_producer(settings)

    def act(self) -> None:
        """Send a click and perhaps something else; each has its own item."""
        number, draw = next(self._number), self._rng.random()
        user, item = f"user-{self._rng.randrange(60)}", f"item-{number}"
        self._click(user, item, strays=draw < 0.15, with_id=draw > 0.1, again=draw > 0.85)
        changed = f"i{self._rng.randrange(30)}"
        title = None if draw < 0.1 else f"title {number}"
        self.items[changed] = title
        value = None if title is None else events.encode(Item(item_id=changed, title=title))
        partitions = self.to.items_partitions
        self._send(ITEMS, changed, value, partition_of(changed, partitions))

    def merge(self, visitor: str, user: str) -> None:
        """A visitor logs in."""
        merge = Merge(user_id=visitor, merge_into=user, at_ms=now_ms())
        producers.send_merge(self._producer, self.to, merge)
        self.histories[user] += self.histories.pop(visitor)

    def forget(self, user: str) -> None:
        """A user is forgotten."""
        producers.send_forget(self._producer, self.to, user)
        self.histories.pop(user)

    def profile(self, user: str, age: int) -> None:
        """A profile changes."""
        profile = UserProfile(user_id=user, attributes={"age": age})
        producers.send_profile(self._producer, self.to, profile)

    def flush(self) -> None:
        self._producer.flush(timeout=20)

    def close(self) -> None:
        self._producer.close(timeout=5)

    def _click(self, user: str, item: str, *, strays: bool, with_id: bool, again: bool) -> None:
        event_id = f"e-{item}" if with_id else None
        click = Click(user_id=user, item_id=item, at_ms=now_ms(), event_id=event_id)
        self.histories[user][item, click.at_ms] += 1
        self.counts[item] += 1_000
        partitions = self.to.clicks_partitions
        own = partition_of(user, partitions)
        place = (own + 1) % partitions if strays else own
        for _ in range(2 if again and with_id else 1):
            self._send(CLICKS, user, events.encode(click), place)

    def _send(self, topic: str, key: str, value: bytes | None, partition: int) -> None:
        name = self.to.prefixed(topic)
        self._producer.send(name, value, key=key.encode(), partition=partition)


def differences(target: Settings, shop: Shop) -> list[str]:
    """What of histories, counts and items is not as the shop sent it."""
    store, found = RedisStore(target), list[str]()
    try:
        for user, want in shop.histories.items():
            place = partition_of(user, target.clicks_partitions)
            query = UserQuery(f"u{place}", Source(CLICKS, place), [user], [])
            entries = store.read_many([query])[0].histories.get(user)
            have = Counter((e.item_id, e.at_ms) for e in (entries.entries if entries else ()))
            if have != want:
                found.append(f"{user}: doubled {have - want}, lost {want - have}")
        counted: Counter[str] = Counter()
        for bucket in store.popular("i0", 10**6).values():
            counted.update(bucket)
        if counted != shop.counts:
            more, less = counted - shop.counts, shop.counts - counted
            found.append(f"counts: doubled {more}, lost {less}")
        items = store.read_item_metadata([*shop.items], target.item_slots)
        titles = {i: json.loads(m.body)["title"] if m.body else None for i, m in items.items()}
        found += [
            f"item {i}: {titles.get(i)}, sent {t}"
            for i, t in shop.items.items()
            if titles.get(i) != t
        ]
    finally:
        store.close()
    return found


@contextmanager
def copying(settings: Settings, namespace: str) -> Iterator[subprocess.Popen[str]]:
    """The command, following."""
    argv = [sys.executable, "-m", "cli", "repartition", namespace, *WORDS, "--follow"]
    with subprocess.Popen(
        argv, env=environment(settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        try:
            yield child
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate(timeout=20)


@pytest.mark.long
def test_under_load_and_kills_nothing_is_lost_and_nothing_doubled(
    settings: Settings, bundle: Any
) -> None:
    namespace = f"{settings.namespace}-2"
    target = repartition_plan.target_of(settings, namespace, MORE_CLICKS, MORE_ITEMS)
    shop, stop = Shop(settings, seed=5), threading.Event()
    with ingesting(settings):
        for _ in range(200):
            shop.act()
        shop.profile("user-1", 20)
        shop.flush()
        applied(settings)
        # What happens between two namespaces to one user, in order.
        shop.merge("user-2", "user-3")
        shop.forget("user-4")
        shop.flush()
        applied(settings)
        load = threading.Thread(target=_load, args=(shop, stop))
        load.start()
        try:
            # Killed in the first transaction, after one, and in the middle of a later one.
            with copying(settings, namespace) as child:
                _wait_for_more(target, child)
            with copying(settings, namespace) as child:
                _wait_for(child, lambda: repartition_plan.plan(settings, target).goes_on)
            with copying(settings, namespace) as child:
                _wait_for_more(target, child)
            prepared(target, bundle)
            with copying(settings, namespace) as child, ingesting(target):
                _wait_for_more(target, child)
                shop.to = target  # the producers move while the copy goes on
                _wait_for_more(target, child, 40)
        finally:
            stop.set()
            load.join()
        shop.flush()
        done = command(settings, "repartition", namespace, *WORDS)
        assert done.returncode == 0, (done.stdout, done.stderr)
        assert "goes on with an earlier copy" in done.stdout
    with ingesting(target):
        applied(target)
    assert len(shop.counts) > 300 and sum(topics.end_offsets(target, CLICKS).values()) > 300
    assert differences(target, shop) == []


def _load(shop: Shop, stop: threading.Event) -> None:
    while not stop.wait(0.1):
        shop.act()


def _wait_for_more(target: Settings, child: subprocess.Popen[str], count: int = 1) -> None:
    """Return once the copy's topic has so many offsets more."""
    before = _offsets(target)
    _wait_for(child, lambda: _offsets(target) >= before + count)


def _wait_for(child: subprocess.Popen[str], done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not done():
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline, "nothing is copied"
        time.sleep(0.05)


def _offsets(target: Settings) -> int:
    if not topics.log_ids(target, [CLICKS], missing_ok=True):
        return 0
    return sum(topics.end_offsets(target, CLICKS).values())


@pytest.mark.long
def test_clicks_that_only_the_archive_has_are_copied(settings: Settings, bundle: Any) -> None:
    namespace = f"{settings.namespace}-2"
    target = repartition_plan.target_of(settings, namespace, MORE_CLICKS, MORE_ITEMS)
    shop = Shop(settings, seed=6)
    with ingesting(settings):
        for _ in range(150):
            shop.act()
        shop.flush()
        applied(settings)
        shop.merge("user-2", "user-3")
        shop.flush()
        applied(settings)
        retained = sum(topics.end_offsets(settings, CLICKS).values())
        archive_all(settings)
        for _ in range(50):
            shop.act()
        shop.flush()
        applied(settings)
        begins = retention(settings, 0.6)
        assert 0 < sum(begins.values()) <= retained
        planned = repartition_plan.plan(settings, target)
        assert not planned.lost and planned.records[CLICKS] > sum(begins.values())
        done = command(settings, "repartition", namespace, *WORDS)
        assert done.returncode == 0, (done.stdout, done.stderr)
    shop.close()
    prepared(target, bundle)
    with ingesting(target):
        applied(target)
    assert differences(target, shop) == []


@pytest.mark.long
def test_a_copy_that_its_topic_refuses_by_size_is_copied_once_the_limit_is_raised(
    settings: Settings, bundle: Any
) -> None:
    namespace = f"{settings.namespace}-5"
    target = repartition_plan.target_of(settings, namespace, MORE_CLICKS, MORE_ITEMS)
    topics.ensure_topics(target)
    limit(target, ITEMS, 500_000)
    producer = producers.make_producer(settings)
    for number, size in enumerate([10, *[1_000_000] * 12, 10]):
        item = Item(item_id=f"i{number}", title="t", attributes={"x": "y" * size})
        producers.sent_to(producers.send_item(producer, settings, item), settings)
    producer.close(timeout=5)
    with ingesting(settings):
        applied(settings)
        refused = command(settings, "repartition", namespace, *WORDS)
        assert refused.returncode == 1, (refused.stdout, refused.stderr)
        said = " ".join(refused.stderr.split())
        assert re.search(r"of items/\d+/\d+: 1,000,\d+ bytes: .*raise max.message.bytes", said)
        assert said.endswith("and start the command again: it goes on there")
        limit(target, ITEMS, 1_048_588)
        done = command(settings, "repartition", namespace, *WORDS)
    assert done.returncode == 0, (done.stdout, done.stderr)
    with closing(reading.read(target, ITEMS)) as copies:
        found = [record.key for record in copies]
    assert sorted(found) == sorted(f"i{number}".encode() for number in range(14))


def test_what_cannot_be_copied_is_refused_with_its_reason(
    settings: Settings, tmp_path: Path
) -> None:
    def target(**changed: Any) -> Settings:
        made = msgspec.structs.replace(settings, **changed)
        return repartition_plan.target_of(made, "other", 7, 3)

    for changed, match in (
        ({"clicks_topic": "theirs"}, "clicks_topic = 'theirs': another system's topic"),
        ({"items_map": "debezium"}, "items_map is set"),
        ({"namespace": "other"}, "is the present one"),
    ):
        with pytest.raises(SettingsError, match=match):
            target(**changed)
    with pytest.raises(
        SettingsError, match="4 partitions of clicks and 2 of items are the present"
    ):
        repartition_plan.target_of(settings, "other", 4, 2)
    for namespace, clicks in (("No", 7), ("other", 0), ("other", 10**6)):
        with pytest.raises(SettingsError, match="the second namespace"):
            repartition_plan.target_of(settings, namespace, clicks, 2)
    other = repartition_plan.target_of(settings, f"{settings.namespace}-3", 7, 3)
    topics.ensure_topics(other)
    shop = Shop(other, seed=1)
    shop.act()
    shop.flush()
    hasty = msgspec.structs.replace(other, kafka_timeout_ms=1_000)
    with pytest.raises(LogMismatch, match="has records, but no copy into it has begun"):
        repartition_plan.plan(settings, hasty)
    # Clicks that neither Kafka nor the archive has.
    shop.to = settings
    for _ in range(30):
        shop.act()
    shop.flush()
    shop.close()
    retention(settings, 0.5)
    namespace = f"{settings.namespace}-4"
    refused = command(settings, "repartition", namespace, *WORDS)
    assert refused.returncode == 3
    assert re.search("lacks [0-9]+: clicks/0 offsets 0 to", refused.stderr)
    assert "--skip-lost" in refused.stderr
    assert not topics.log_ids(
        repartition_plan.target_of(settings, namespace, 7, 3), [CLICKS], missing_ok=True
    ), "nothing is made before the question"
