"""What ingest is measured against: `python -m benchmarks.ingest_peers NAME WARM COUNT`, one in a
process.

    raw     aiokafka's getmany and the validated decode, no Faust, no effects
    consumer  the batch consumer of the product with the same decode, no effects
    faust   a plain Faust agent, all effects, one pipeline an event
    loop    an asyncio loop by hand, no Faust, all effects, one pipeline per 500 events, no fence

All effects: the newest 100 behaviours of the user with the stamps of the event, the event-id
window, popularity by day. The peers keep a list by LPUSH and LTRIM, in the order of arrival, which
is cheaper than the product's order by event time; the loop drops re-sends, the Faust agent does not
even look, for one pipeline cannot. Both forget what a crash interrupts. Each counts CPU, its own
and Redis', from event WARM to event COUNT.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import faust
import msgspec
import redis.asyncio
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from eddyline.kafka import topics
from eddyline.schema.events import Click, decode_click
from eddyline.schema.partitioning import partition_of
from eddyline.schema.records import Record
from eddyline.settings.loader import Settings, load
from eddyline.stores.memory import MemoryStore
from streams.app import IngestApp
from streams.dispatcher import HandlerThread, TopicPipeline
from streams.fences import PartitionFences
from streams.ports import Handler, Outcome, RecordBatch

BATCH = 500
LIST_MAX = 100
BUCKET_MS = 86_400_000
_pack = msgspec.msgpack.Encoder().encode


class Meter:
    """Prints the CPU seconds of this process and of Redis between two counts of events."""

    def __init__(self, settings: Settings, warm: int, count: int) -> None:
        self._redis = redis.Redis.from_url(settings.redis_url)
        self._warm, self._count = warm, count
        self._events, self._begun = 0, (0, 0.0, 0.0, 0.0)

    def add(self, events: int) -> None:
        """So many more are done."""
        self._events += events
        if not self._begun[0] and self._events >= self._warm:
            self._begun = (self._events, *self._now())
        if self._events >= self._count:
            first, cpu, theirs, clock = self._begun
            now_cpu, now_theirs, now = self._now()
            result = {
                "events": self._events - first,
                "cpu_s": now_cpu - cpu,
                "redis_s": now_theirs - theirs,
                "seconds": now - clock,
            }
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()
            os._exit(0)

    def _now(self) -> tuple[float, float, float]:
        said: Any = self._redis.info("cpu")
        return (
            time.process_time(),
            said["used_cpu_user"] + said["used_cpu_sys"],
            time.perf_counter(),
        )


def decoded(settings: Settings, value: bytes | None, timestamp_ms: int) -> Click:
    return decode_click(
        value,
        appended_ms=timestamp_ms,
        far_future_ms_max=settings.far_future_ms_max,
        id_form=settings.id_form,
    )


async def batches(settings: Settings, size: int | None) -> AsyncIterator[dict[Any, Any]]:
    """What getmany gives, from the beginning of all partitions."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap_servers, group_id=None, enable_auto_commit=False
    )
    await consumer.start()
    at = [
        TopicPartition(settings.prefixed(topics.CLICKS), p)
        for p in range(settings.clicks_partitions)
    ]
    consumer.assign(at)
    await consumer.seek_to_beginning(*at)
    while True:
        fetched = await consumer.getmany(timeout_ms=500, max_records=size)
        if fetched:
            yield fetched


async def raw(settings: Settings, meter: Meter) -> None:
    async for fetched in batches(settings, None):
        for records in fetched.values():
            for record in records:
                decoded(settings, record.value, record.timestamp)
            meter.add(len(records))


class _Begins(PartitionFences):
    """Positions of a handler without effects: every partition from its beginning."""

    def __init__(self) -> None:
        pass

    def open(
        self, bounds: Mapping[int, tuple[int, int]], committed: Mapping[int, int] | None = None
    ) -> dict[int, int]:
        return {partition: begin for partition, (begin, _) in bounds.items()}

    def resume_at(self, partition: int, position: int) -> int:
        return position

    def resumed(self, partition: int, records: Sequence[Record]) -> int:
        return 0

    def find_diverged(self, partitions: Collection[int]) -> list[int]:
        return []


class _Decode(Handler):
    """A handler that only decodes."""

    awaits_kafka = False

    def __init__(self, settings: Settings, meter: Meter) -> None:
        self.fences = _Begins()
        self._settings, self._meter = settings, meter

    def open(self, partition: int) -> None:
        pass

    def apply(self, batches: Sequence[RecordBatch]) -> list[Outcome | Exception]:
        outcomes: list[Outcome | Exception] = []
        for batch in batches:
            for record in batch.records:
                click = decoded(self._settings, record.value, record.timestamp)
                assert click.user_id
            self._meter.add(len(batch.records))
            outcomes.append(Outcome(records=len(batch.records)))
        return outcomes


async def consumer(settings: Settings, meter: Meter) -> None:
    pipeline = TopicPipeline(
        settings.prefixed(topics.CLICKS), _Decode(settings, meter), HandlerThread("decode")
    )
    with tempfile.TemporaryDirectory() as folder:
        app = IngestApp(settings, [pipeline], MemoryStore(), "bench-consumer", Path(folder))
        await app.run()


def keys(settings: Settings, user: str) -> tuple[str, str, int]:
    """(a user's history, the window of the user's partition, that partition)."""
    partition = partition_of(user, settings.clicks_partitions)
    return f"peer:{{u{partition}}}:h:{user}", f"peer:{{u{partition}}}:window", partition


def entry(click: Click, partition: int, offset: int, stamps: tuple[int, int, int]) -> bytes:
    return _pack((click.item_id, click.at_ms, click.kind, click.weight, partition, offset, *stamps))


def produced_us(headers: Any) -> int:
    return next((int(value) for name, value in headers or () if name == "produced_us"), 0)


def popular(click: Click) -> str:
    return f"peer:popular:{click.at_ms // BUCKET_MS}"


async def plain_faust(settings: Settings, meter: Meter) -> None:
    store = redis.asyncio.Redis.from_url(settings.redis_url)
    app = faust.App(
        "bench-plain",
        broker=f"kafka://{settings.kafka_bootstrap_servers}",
        web_enabled=False,
        consumer_auto_offset_reset="earliest",
        topic_disable_leader=True,
        topic_allow_declare=False,
        datadir=tempfile.mkdtemp(prefix="bench-plain-"),
        stream_wait_empty=False,
    )
    topic = app.topic(
        settings.prefixed(topics.CLICKS), key_serializer="raw", value_serializer="raw"
    )

    async def agent(stream: Any) -> None:
        async for event in stream.events():
            message = event.message
            appended_ms = round(message.timestamp * 1000)
            click = decoded(settings, event.value, appended_ms)
            seen, window, partition = keys(settings, click.user_id)
            stamps = (produced_us(message.headers), appended_ms, time.time_ns() // 1_000)
            async with store.pipeline(transaction=True) as pipe:
                pipe.zadd(window, {str(click.event_id): message.offset})
                pipe.zremrangebyscore(
                    window, "-inf", message.offset - settings.dedupe_window_events
                )
                pipe.lpush(seen, entry(click, partition, message.offset, stamps))
                pipe.ltrim(seen, 0, LIST_MAX - 1)
                pipe.zincrby(popular(click), click.weight, click.item_id)
                await pipe.execute()
            meter.add(1)

    app.agent(topic)(agent)
    await app.start()
    await asyncio.Event().wait()


async def loop(settings: Settings, meter: Meter) -> None:
    store = redis.asyncio.Redis.from_url(settings.redis_url)
    async for fetched in batches(settings, BATCH):
        read_us = time.time_ns() // 1_000
        clicks = [
            (r, decoded(settings, r.value, r.timestamp)) for rs in fetched.values() for r in rs
        ]
        ids: dict[str, dict[str, int]] = defaultdict(dict)
        for record, click in clicks:
            ids[keys(settings, click.user_id)[1]].setdefault(str(click.event_id), record.offset)
        async with store.pipeline(transaction=False) as pipe:
            for window, mine in ids.items():
                pipe.zmscore(window, list(mine))
            found = await pipe.execute()
        known = {
            e
            for mine, at in zip(ids.values(), found, strict=True)
            for e, offset in zip(mine, at, strict=True)
            if offset is not None
        }
        lists: dict[str, list[bytes]] = defaultdict(list)
        counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for record, click in clicks:
            seen, window, partition = keys(settings, click.user_id)
            if str(click.event_id) in known or ids[window][str(click.event_id)] != record.offset:
                continue
            stamps = (produced_us(record.headers), record.timestamp, read_us)
            lists[seen].append(entry(click, partition, record.offset, stamps))
            counts[popular(click)][click.item_id] += click.weight
        async with store.pipeline(transaction=True) as pipe:
            for window, mine in ids.items():
                pipe.zadd(window, mine)
                pipe.zremrangebyscore(
                    window, "-inf", max(mine.values()) - settings.dedupe_window_events
                )
            for seen, entries in lists.items():
                pipe.lpush(seen, *entries)
                pipe.ltrim(seen, 0, LIST_MAX - 1)
            for bucket, items in counts.items():
                for item, weight in items.items():
                    pipe.zincrby(bucket, weight, item)
            await pipe.execute()
        meter.add(len(clicks))


PEERS = {"raw": raw, "consumer": consumer, "faust": plain_faust, "loop": loop}


def main() -> None:
    """Run one peer until it has counted enough."""
    name, warm, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    settings = load()
    asyncio.run(PEERS[name](settings, Meter(settings, warm, count)))


if __name__ == "__main__":
    main()
