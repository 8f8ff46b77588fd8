"""Topics: their names, configuration, identity and offsets, by kafka-python.

A name in Kafka has the namespace in front, `settings.prefixed(name)`:

    clicks, items, users            from producers; time stamps are the broker's (LogAppendTime)
    item-vectors.<generation>       the log of the index, see `eddyline.schema.item_record`
    generations                     what is recorded of each generation, see `eddyline.generations`
    dead-letters                    rejected records with their reason
    answers                         from query workers: answers to sampled users
    blender                         from the judge: the learned weights of the fusion `blend`
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, NewPartitions, NewTopic
from kafka.errors import (
    KafkaError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)

from eddyline.errors import KafkaRefused, KafkaUnavailable, LogMismatch, SettingsError
from eddyline.kafka.clients import connect, translate_error
from eddyline.process.retry import Backoff
from eddyline.schema import validation
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId

log = logging.getLogger(__name__)

CLICKS, ITEMS, USERS = "clicks", "items", "users"
DEAD_LETTERS, GENERATIONS, ANSWERS = "dead-letters", "generations", "answers"
BLENDER = "blender"
SOURCES = (CLICKS, ITEMS, USERS)
# What ingest needs. It has no rights on `answers`, and Kafka would hide that topic from it.
OF_INGEST = (*SOURCES, DEAD_LETTERS, GENERATIONS)
# What the archive keeps.
ARCHIVED = (*SOURCES, ANSWERS)
# What the archive and the judge need.
OF_READERS = (*ARCHIVED, DEAD_LETTERS, GENERATIONS)
# All but the item vectors, which belong to a generation.
ALL = (*OF_INGEST, ANSWERS, BLENDER)

# A dead letter holds the whole rejected record (at most 1 MiB, the broker's default) and headers.
DEAD_LETTER_BYTES_MAX = 2 * 1024 * 1024
_HOUR_MS = 3_600_000
_DELETE_RETENTION = "delete.retention.ms"
# Compaction keeps a delete record this long: a longer pause of ingest may miss deletes.
DELETE_RETENTION_MS = 30 * 24 * _HOUR_MS


def item_vectors(generation: str) -> str:
    """The name of the compacted topic of a generation's item vectors."""
    return f"item-vectors.{generation}"


def topic_configs(settings: Settings, name: str) -> tuple[int, dict[str, str]]:
    """(partitions, configuration) of a topic.

    Append time, because the broker's clock decides what lies in the far future.
    """
    compact = {"cleanup.policy": "compact", _DELETE_RETENTION: str(DELETE_RETENTION_MS)}
    append_time = {"message.timestamp.type": "LogAppendTime"}
    if name == CLICKS:
        keep = {"retention.ms": str(settings.clicks_retention_h * _HOUR_MS)}
        return settings.clicks_partitions, append_time | keep
    if name == ANSWERS:  # the partitions of `clicks`: one process archives all of a user
        keep = {"retention.ms": str(settings.answers_retention_h * _HOUR_MS)}
        return settings.clicks_partitions, append_time | keep
    if name == USERS:
        return settings.clicks_partitions, append_time | compact
    if name == ITEMS and validation.carries_patches(settings):
        whole = {"cleanup.policy": "delete", "retention.ms": "-1"}
        return settings.items_partitions, append_time | whole
    if name == ITEMS:
        return settings.items_partitions, append_time | compact
    if name == DEAD_LETTERS:
        keep = {"retention.ms": str(settings.dead_letters_retention_h * _HOUR_MS)}
        return 1, keep | {"max.message.bytes": str(DEAD_LETTER_BYTES_MAX)}
    if name in (GENERATIONS, BLENDER):
        return 1, compact
    # A broker's own limit may be lower than that of `items`.
    return settings.items_partitions, compact | {"max.message.bytes": str(DEAD_LETTER_BYTES_MAX)}


@contextmanager
def open_admin(settings: Settings) -> Iterator[KafkaAdminClient]:
    """An admin client, closed with the block. Raises KafkaUnavailable, KafkaRefused."""
    admin = connect(settings, KafkaAdminClient)
    try:
        yield admin
    except KafkaError as error:
        raise translate_error(settings, error) from None
    finally:
        admin.close()


def wait_until_up(settings: Settings, timeout_s: float) -> None:
    """Return when Kafka answers. Raises KafkaUnavailable after `timeout_s`, KafkaRefused."""
    deadline, backoff = time.monotonic() + timeout_s, Backoff(0.05, settings.backoff_ms_max / 1000)
    while True:
        wait_s = backoff.next_s()
        try:
            with open_admin(settings) as admin:
                admin.describe_cluster()
            return
        except KafkaUnavailable as error:
            if time.monotonic() + wait_s > deadline:
                raise
            log.info(
                "waiting for Kafka", extra={"reason": str(error), "wait_ms": int(wait_s * 1000)}
            )
        time.sleep(wait_s)


def ensure_topics(settings: Settings, names: Sequence[str] | None = None) -> list[str]:
    """Create the topics that are missing. Returns those that were made or got partitions.

    A topic without a record that has too few partitions gets the others: a broker that creates
    topics by itself made it, most likely.
    names: default: `ALL`

    A topic under its own name (`clicks_topic`, …) is another system's: it is left as it is.
    Raises LogMismatch if a topic has another number of partitions than the settings, SettingsError
    if a topic under its own name does not exist.
    """
    names = ALL if names is None else names
    made: list[str] = []
    with open_admin(settings) as admin:
        existing = set(admin.list_topics())
        # Kafka hides a topic that we may not describe, and creating it would fail.
        _described(
            settings, admin, [t for n in names if (t := settings.prefixed(n)) not in existing]
        )
        for name in names:
            if settings.prefixed(name) in existing:
                continue
            if settings.has_own_topic(name):
                raise SettingsError(
                    f"{name}_topic = {settings.prefixed(name)!r}: Kafka has no such topic"
                )
            partitions, configs = topic_configs(settings, name)
            copies, real = settings.replication_factor, settings.prefixed(name)
            try:
                topic = NewTopic(real, partitions, copies, topic_configs=configs)
                admin.create_topics([topic], timeout_ms=settings.kafka_timeout_ms)
            except TopicAlreadyExistsError:
                continue  # another process created it
            made.append(real)
        admin.wait_for_topics(
            [settings.prefixed(n) for n in names], timeout_ms=settings.kafka_timeout_ms
        )
        by_topic = {settings.prefixed(name): name for name in names}
        for described in _described(settings, admin, list(by_topic)):
            name = by_topic[described["name"]]
            expected, found = topic_configs(settings, name)[0], len(described["partitions"])
            may_grow = found < expected and not settings.has_own_topic(name)
            if may_grow and not any(end_offsets(settings, name).values()):
                more = {described["name"]: NewPartitions(expected)}
                admin.create_partitions(more, timeout_ms=settings.kafka_timeout_ms)
                log.warning(
                    "an empty topic got its partitions",
                    extra={"topic": described["name"], "before": found, "now": expected},
                )
                made.append(described["name"])
            elif expected != found:
                raise LogMismatch(
                    f"topic {described['name']} has {found} partitions, the settings {expected}; "
                    f"set EDDYLINE_{'ITEMS' if 'item' in name else 'CLICKS'}_PARTITIONS={found}"
                )
    return made


def delete_topics(settings: Settings, names: Sequence[str]) -> list[str]:
    """Delete those of these topics that exist; returns their names in Kafka.

    Raises KafkaUnavailable, KafkaRefused (the right DELETE is missing).
    """
    with open_admin(settings) as admin:
        existing = set(admin.list_topics())
        found = [topic for n in names if (topic := settings.prefixed(n)) in existing]
        # One by one: an error names the topic that it is about.
        for topic in found:
            with suppress(UnknownTopicOrPartitionError):  # another process deleted it
                admin.delete_topics([topic], timeout_ms=settings.kafka_timeout_ms)
    return found


def _described(
    settings: Settings, admin: KafkaAdminClient, topics: list[str]
) -> list[dict[str, Any]]:
    """Kafka's description of topics, also of those that do not exist. Raises KafkaRefused."""
    found: list[dict[str, Any]] = admin.describe_topics(topics) if topics else []
    for topic in found:
        if topic["error_code"] == TopicAuthorizationFailedError.errno:
            raise translate_error(settings, TopicAuthorizationFailedError(topic["name"]))
    return found


def check_seen(settings: Settings, name: str) -> None:
    """Raise KafkaRefused if we may not describe the topic, whether it exists or not."""
    with open_admin(settings) as admin:
        _described(settings, admin, [settings.prefixed(name)])


def log_ids(
    settings: Settings, names: Sequence[str], *, missing_ok: bool = False
) -> dict[str, LogId]:
    """The identity of each topic's log: cluster id and topic id. A recreated topic has another.

    missing_ok: leave out topics that do not exist
    """
    with open_admin(settings) as admin:
        return ids_by(admin, settings, names, missing_ok=missing_ok)


def ids_by(
    admin: KafkaAdminClient, settings: Settings, names: Sequence[str], *, missing_ok: bool = False
) -> dict[str, LogId]:
    """`log_ids` by an open client."""
    cluster_id = str(admin.describe_cluster()["cluster_id"])
    described = _described(settings, admin, [settings.prefixed(name) for name in names])
    ids = {
        topic["name"]: str(topic["topic_id"])
        for topic in described
        if not (missing_ok and topic["error_code"])
    }
    if missing_ok:
        names = [name for name in names if settings.prefixed(name) in ids]
    return {name: LogId(cluster_id, ids[settings.prefixed(name)]) for name in names}


def delete_retention_ms(settings: Settings, names: Sequence[str]) -> dict[str, int]:
    """How long compaction keeps the delete records of these topics, as they are configured now.

    A topic of patches is absent: it is not compacted, and no delete leaves it.
    Raises KafkaUnavailable, KafkaRefused (the right DESCRIBE_CONFIGS is missing).
    """
    found: dict[str, int] = {}
    names = [n for n in names if n != ITEMS or not validation.carries_patches(settings)]
    with open_admin(settings) as admin:
        configs = shown_configs(settings, admin, names)
    for name in names:
        if _DELETE_RETENTION not in configs[name]:
            raise KafkaRefused(
                f"topic {settings.prefixed(name)}: Kafka does not show {_DELETE_RETENTION}: the "
                "right DESCRIBE_CONFIGS is missing; docs/security.md lists the rights that "
                "Eddyline needs"
            )
        found[name] = int(configs[name][_DELETE_RETENTION])
    return found


def shown_configs(
    settings: Settings, admin: KafkaAdminClient, names: Sequence[str]
) -> dict[str, dict[str, str]]:
    """The whole configuration of topics that exist; {} for one that Kafka does not show us."""
    resources = [ConfigResource(ConfigResourceType.TOPIC, settings.prefixed(n)) for n in names]
    found = admin.describe_configs(resources, config_filter="all").get("topic", {})
    return {
        name: {
            key: str(one["value"]) for key, one in found.get(settings.prefixed(name), {}).items()
        }
        for name in names
    }


def end_offsets(settings: Settings, name: str) -> dict[int, int]:
    """Partition → the offset that the next record will get."""
    return _offsets(settings, name, "end_offsets")


def beginning_offsets(settings: Settings, name: str) -> dict[int, int]:
    """Partition → the offset of the oldest record that is still kept."""
    return _offsets(settings, name, "beginning_offsets")


def _offsets(settings: Settings, name: str, which: str) -> dict[int, int]:
    topic = settings.prefixed(name)
    try:
        consumer = connect(settings, KafkaConsumer, group_id=None, enable_auto_commit=False)
        try:
            partitions = consumer.partitions_for_topic(topic)
            if not partitions:
                check_seen(settings, name)
            found = getattr(consumer, which)([TopicPartition(topic, p) for p in partitions])
            return {at.partition: offset for at, offset in found.items()}
        finally:
            consumer.close()
    except (KafkaError, OSError) as error:
        raise translate_error(settings, error) from None
