"""The load of `make bench-item_visible`, in a process of its own: item changes at a steady rate.

By librdkafka, as `benchmarks.ingest_load`. Every change is a whole item; every other one is about
something else than before, so it gets another vector. One argument, a `Load` as JSON; one JSON line
at the end.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import msgspec
from confluent_kafka import Producer

from benchmarks.item_catalogue import item
from eddyline.kafka import topics
from eddyline.schema import events
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import load

FLUSH_S = 60


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What to send: `rate` changes a second for `seconds`, of items 0 … items - 1."""

    rate: float
    seconds: float
    items: int


def send(what: Load) -> dict[str, Any]:
    """Send it all; what was measured. Raises RuntimeError where something was not delivered."""
    settings, rng = load(), random.Random(7)
    producer = Producer(
        {"bootstrap.servers": settings.kafka_bootstrap_servers, "enable.idempotence": True}
    )
    topic, partitions = settings.prefixed(topics.ITEMS), settings.items_partitions
    failed: list[Any] = []

    def sent(error: Any, _: Any) -> None:
        if error is not None:
            failed.append(error)

    state: dict[int, tuple[int, int]] = {}
    begun, cpu = time.perf_counter(), time.process_time()
    count = int(what.rate * what.seconds)
    for n in range(count):
        ahead = begun + n / what.rate - time.perf_counter()
        if ahead > 0:
            time.sleep(ahead)
        number = rng.randrange(what.items)
        about, price = state.get(number, (0, 1))
        about, price = state[number] = (about + 1, price) if n % 2 else (about, price + 1)
        one = item(number, about, price)
        producer.produce(
            topic,
            events.encode(one),
            one.item_id.encode(),
            partition_of(one.item_id, partitions),
            sent,
        )
        producer.poll(0)
    left = producer.flush(FLUSH_S)
    if left or failed:
        raise RuntimeError(f"{left} changes were not delivered, {len(failed)} failed: {failed[:1]}")
    took, used = time.perf_counter() - begun, time.process_time() - cpu
    return {"sent": count, "seconds": took, "cpu_s": used}


if __name__ == "__main__":
    print(json.dumps(send(msgspec.json.decode(sys.argv[1], type=Load))))
