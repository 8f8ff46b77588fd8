"""One user sends ten thousand events: other users do not wait, and the user's state stays small."""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from functools import partial

import redis

from eddyline.kafka import producers
from eddyline.kafka.producers import now_ms
from eddyline.schema.events import Click
from eddyline.schema.partitioning import partition_of
from eddyline.stores.redis import RedisStore

BOT = "a-bot"
# Twice; more than seven times as fast as ten thousand a minute.
EVENTS, SECONDS = 5_000, 4
# Some milliseconds on an idle machine (`make bench-bot`). Here it only rules out that the bot's
# events hold the partition: a busy machine may stop any process for seconds.
NEIGHBOUR_S_MAX = 20


def behave(live) -> None:
    """The bot's events, at a steady pace."""
    begun = time.monotonic()
    for n in range(EVENTS):
        if n % 50 == 0:
            time.sleep(max(0.0, begun + n * SECONDS / EVENTS - time.monotonic()))
        item = live.dataset.items[n % 100].item_id
        click = Click(user_id=BOT, item_id=item, at_ms=now_ms(), event_id=uuid.uuid4().hex)
        producers.send_click(live.producer, live.settings, click)
    live.producer.flush(timeout=30)


def own_bytes(live) -> int:
    """The size of the user's keys in Redis."""
    with redis.Redis.from_url(live.settings.redis_url) as client:
        found = list(client.scan_iter(match=f"{live.settings.namespace}:*:{BOT}", count=1_000))
        assert len(found) >= 2, "a list and an embedding"
        return sum(client.memory_usage(key) for key in found)


def test_a_bot_neither_slows_other_users_nor_grows(make_live) -> None:
    live = make_live(with_worker=False)
    store, partitions = RedisStore(live.settings), live.settings.clicks_partitions
    partition = partition_of(BOT, partitions)
    names = (f"neighbour-{n}" for n in itertools.count())
    neighbours = (name for name in names if partition_of(name, partitions) == partition)
    heard, sizes = 0, []
    for _ in range(2):
        acting = threading.Thread(target=behave, args=(live,), daemon=True)
        acting.start()
        while acting.is_alive():
            name = next(neighbours)
            live.click(name, live.dataset.items[5].item_id)
            known = partial(_known, store, partition, name)
            live.wait_for("the list", known, NEIGHBOUR_S_MAX)
            heard += 1
            time.sleep(0.1)
        acting.join(60)
        live.applied(timeout_s=60)
        sizes.append(own_bytes(live))
    found = store.read_user(f"u{partition}", partition, BOT, "1").history
    store.close()
    assert len(found.entries) == live.settings.history_length_max
    assert sizes[1] <= 1.1 * sizes[0] and sizes[1] < 64 * 1024, sizes
    assert heard >= 2


def _known(store: RedisStore, partition: int, user: str) -> bool:
    return store.read_user(f"u{partition}", partition, user, "1").history.offset >= 0
