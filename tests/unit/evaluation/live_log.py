"""A log of events as the partitions of Kafka have it, and a judge that reads them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import msgspec

from eddyline.kafka.topics import ANSWERS, ARCHIVED, CLICKS, ITEMS, USERS
from eddyline.schema import events
from eddyline.schema.answers import RecordedAnswer, encode_answer
from eddyline.schema.events import Click, Item, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.schema.records import BuiltRecord
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import LogId
from embeddings.bundle.bundle import Bundle
from evaluation.engine import Engine
from evaluation.event_log import EventLog
from evaluation.judge.judge import Judge
from evaluation.judge.merging import Decoder, Merge, Place
from evaluation.protocol import Outcome
from tests.unit.evaluation.small import BASE_MS

# When the first record was appended: after everything happened, as in an import.
APPENDED_MS = BASE_MS + 10**10
LOGS = {topic: LogId("live", topic) for topic in ARCHIVED}
Topics = dict[Place, list[BuiltRecord]]


class Appender:
    """Appends records to partitions; the broker's clock ticks with each."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.topics: Topics = {
            (topic, partition): []
            for topic in ARCHIVED
            for partition in range(
                settings.items_partitions if topic == ITEMS else settings.clicks_partitions
            )
        }
        self.now_ms = APPENDED_MS

    def append(
        self, topic: str, key: str, value: bytes | None, *, partition: int | None = None
    ) -> BuiltRecord:
        of_topic = [place for place in self.topics if place[0] == topic]
        at = partition_of(key, len(of_topic)) if partition is None else partition
        records = self.topics[topic, at]
        name = self.settings.prefixed(topic)
        record = BuiltRecord(name, at, len(records), self.now_ms, key.encode(), value)
        records.append(record)
        self.now_ms += 1
        return record

    def click(self, click: Click) -> BuiltRecord:
        return self.append(CLICKS, click.user_id, events.encode(click))

    def answer(self, answer: RecordedAnswer) -> BuiltRecord:
        return self.append(ANSWERS, answer.user_id, encode_answer(answer))

    def item(self, item: Item) -> BuiltRecord:
        return self.append(ITEMS, item.item_id, events.encode(item))

    def profile(self, profile: UserProfile) -> BuiltRecord:
        return self.append(USERS, profile.user_id, events.encode(profile))


def append_log(log: EventLog, settings: Settings, first: int) -> tuple[Appender, int]:
    """(the topics with everything of a log, append time of event `first`)."""
    appender = Appender(settings)
    for item in log.changes:
        appender.item(item)
    for profile in log.profiles:
        appender.profile(profile)
    times = [appender.click(log.click(number)).timestamp for number in range(len(log))]
    return appender, times[first] if first < len(times) else appender.now_ms


def make_judge(
    settings: Settings, bundle: Bundle, since_ms: int, *, store: MemoryStore | None = None
) -> Judge:
    judge = Judge(settings, since_ms=since_ms)
    engine = Engine(settings, bundle, LOGS, store=store, follows=judge.follows)
    engine.fill_index()
    judge.open(engine)
    return judge


def feed(
    judge: Judge,
    topics: Topics,
    seed: int = 0,
    *,
    stop_after: int | None = None,
    positions: dict[Place, int] | None = None,
    on_group: Callable[[Judge], None] = lambda judge: None,
) -> dict[Place, int]:
    """Read the partitions in pieces of any size; returns the next offset of each partition.

    stop_after: groups; positions: where to begin
    """
    draw = random.Random(seed)
    decoder = Decoder(judge.settings, judge.follows, APPENDED_MS * 2)
    merge = Merge(topics.keys(), wait_s=0.0)
    read = dict(positions or dict.fromkeys(topics, 0))
    done, groups = dict(read), 0
    while True:
        for place in draw.sample(sorted(topics), len(topics)):
            some = topics[place][read[place] : read[place] + draw.randrange(1, 9)]
            merge.add(place, [decoder.decode(place[0], record, 0.0) for record in some])
            read[place] += len(some)
        ended = {place for place, records in topics.items() if read[place] == len(records)}
        while group := merge.next(ended, 1.0, APPENDED_MS * 2):
            judge.take(group)
            for one in group.records:
                done[one.topic, one.record.partition] = one.record.offset + 1
            groups += 1
            on_group(judge)
            if groups == stop_after:
                return done
        if len(ended) == len(topics):
            assert decoder.rejected == 0
            return done


def counts_of(outcome: Outcome, rows: Iterable[str]) -> dict[str, tuple[int, list[int], float]]:
    """What `evaluate` found, as the judge counts it: row -> (targets, hits, sum of 1 / rank)."""
    found = {}
    for row in rows:
        ranks = outcome.rows[row].ranks[outcome.kept]
        hits = [int((ranks <= k).sum()) for k in (10, 50, 100)]
        found[row] = (len(ranks), hits, round(float((1 / ranks).sum()), 6))
    return found


def judged(
    judge: Judge, group: str = "all", value: str = ""
) -> dict[str, tuple[int, list[int], float]]:
    return {
        series.row: (counts.targets, counts.hits, round(counts.reciprocal, 6))
        for series, counts in judge.rates.counts("total").items()
        if (series.group, series.value) == (group, value)
    }


def timed(items: Sequence[Item]) -> list[Item]:
    """The items, each with a time of its own."""
    return [
        msgspec.structs.replace(item, at_ms=item.at_ms or BASE_MS - 1_000 + n)
        for n, item in enumerate(items)
    ]
