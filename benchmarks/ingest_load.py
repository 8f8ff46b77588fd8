"""The load of `make bench-ingest`, in a process of its own: clicks as fast as they go, or paced.

By librdkafka, which takes a tenth of kafka-python's CPU: on two cores the load must not be what is
measured. One argument, a `Load` as JSON; the servers come from the environment as for every
process. It prints one JSON line at its end: how many were sent, how long that took, and its CPU
time.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import msgspec
from confluent_kafka import KafkaError, Message, Producer

from eddyline.kafka import topics
from eddyline.schema import events
from eddyline.schema.events import Click
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import load

# From this rate on a producer gathers records for a millisecond: one request for each would cost
# this process and the broker more than all of ingest.
LINGER_RATE = 1_000
# Where the generator was held up it catches up in steps of this many events, not in one burst.
BURST_MAX = 64
FLUSH_S = 120


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What to send.

    tag:   begins every event id
    rate:  events a second, 0 for as fast as they go
    users: so many different ones, `u0` …; some click more often than others, `in_turn` all the same
    items: an item is `<item_prefix><1 … items>`, popular ones more often
    """

    tag: str
    count: int
    rate: float = 0
    users: int = 10_000
    in_turn: bool = False
    item_prefix: str = "x"
    items: int = 2_000


def send(what: Load) -> dict[str, Any]:
    """Send it all; what was measured."""
    settings, rng = load(), random.Random(what.tag)
    linger_ms = 20 if not what.rate else int(what.rate >= LINGER_RATE)
    producer = Producer(
        {
            "bootstrap.servers": settings.kafka_bootstrap_servers,
            "linger.ms": linger_ms,
            "enable.idempotence": True,
            "queue.buffering.max.messages": 1_000_000,
        }
    )
    topic, partitions = settings.prefixed(topics.CLICKS), settings.clicks_partitions
    failed: list[KafkaError] = []

    def sent(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            failed.append(error)

    begun, cpu = time.perf_counter(), time.process_time()
    for n in range(what.count):
        if what.rate:
            ahead = begun + n / what.rate - time.perf_counter()
            if ahead > 0:
                time.sleep(ahead)
            elif n % BURST_MAX == 0:
                time.sleep(0)
        user = n % what.users if what.in_turn else int(what.users * rng.random() ** 1.5)
        click = Click(
            event_id=f"{what.tag}-{n}",
            user_id=f"u{user}",
            item_id=f"{what.item_prefix}{1 + int(what.items * rng.random() ** 2)}",
            at_ms=time.time_ns() // 1_000_000,
        )
        stamp = [("produced_us", str(time.time_ns() // 1_000).encode())]
        while True:
            try:
                producer.produce(
                    topic,
                    events.encode(click),
                    click.user_id.encode(),
                    partition_of(click.user_id, partitions),
                    sent,
                    headers=stamp,
                )
                break
            except BufferError:
                producer.poll(0.1)
        producer.poll(0)
    left = producer.flush(FLUSH_S)
    if left or failed:
        raise RuntimeError(f"{left} clicks were not delivered, {len(failed)} failed: {failed[:1]}")
    took, used = time.perf_counter() - begun, time.process_time() - cpu
    return {"sent": what.count, "seconds": took, "cpu_s": used}


if __name__ == "__main__":
    print(json.dumps(send(msgspec.json.decode(sys.argv[1], type=Load))))
