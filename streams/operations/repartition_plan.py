"""What a copy into another namespace would do, and where an earlier one stopped (ADR 30)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass

import msgspec

from eddyline.archive import Archive, ArchiveUnavailable
from eddyline.errors import LogMismatch, SettingsError
from eddyline.kafka import reading, topics
from eddyline.kafka.topics import CLICKS, SOURCES
from eddyline.schema import validation
from eddyline.settings.loader import Settings
from streams.operations import retention_gaps
from streams.operations.retention_gaps import Gap

_PAUSE_S = 0.5
# (topic, partition)
Place = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a copy would do.

    records: topic -> offsets that are not copied yet
    lost:    which offsets neither Kafka nor the archive has, as a sentence; "" for none
    goes_on: whether a copy has begun before
    """

    records: Mapping[str, int]
    lost: str
    goes_on: bool


def target_of(settings: Settings, namespace: str, clicks: int, items: int) -> Settings:
    """The settings of the second namespace. Raises SettingsError where it cannot be one.

    clicks, items: partitions of `clicks` and `users`, and of `items`
    """
    for name in SOURCES:
        if settings.has_own_topic(name):
            raise SettingsError(
                f"{name}_topic = {settings.prefixed(name)!r}: another system's topic is not "
                "copied; let that system write a topic with more partitions, and begin with an "
                "empty Redis"
            )
        if validation.map_of(settings, name) is not None:
            raise SettingsError(
                f"{name}_map is set: a topic with a map is not copied; let its producer write a "
                "topic with more partitions, and begin with an empty Redis"
            )
    if namespace == settings.namespace:
        raise SettingsError(f"namespace {namespace!r} is the present one: name another")
    if (clicks, items) == (settings.clicks_partitions, settings.items_partitions):
        raise SettingsError(
            f"{clicks} partitions of clicks and {items} of items are the present numbers"
        )
    changed: dict[str, object] = {
        "namespace": namespace,
        "clicks_partitions": clicks,
        "items_partitions": items,
    }
    try:
        return msgspec.convert(msgspec.to_builtins(settings) | changed, type(settings))
    except msgspec.ValidationError as error:
        raise SettingsError(f"the second namespace: {error}") from None


def group(target: Settings) -> str:
    """The consumer group that holds the positions of a copy."""
    return target.prefixed("eddyline-repartition")


def plan(source: Settings, target: Settings) -> Plan:
    """What a copy would do. Raises KafkaUnavailable, KafkaRefused, LogMismatch, ArchiveUnavailable.

    LogMismatch: the second namespace has records that no copy made.
    """
    positions = checked_positions(source, target)
    ends = {name: topics.end_offsets(source, name) for name in SOURCES}
    begins = {name: topics.beginning_offsets(source, name) for name in SOURCES}
    left = {
        name: sum(
            max(0, end - max(positions[name, p], begins[name][p] if name != CLICKS else 0))
            for p, end in ends[name].items()
        )
        for name in SOURCES
    }
    clicks = {p: positions[CLICKS, p] for p in begins[CLICKS]}
    return Plan(left, lost_clicks(source, clicks, begins[CLICKS]), any(positions.values()))


def lost_error(lost: str) -> LogMismatch:
    """The error for a `Plan.lost`."""
    return LogMismatch(f"{lost}, and Kafka no longer has them. `--skip-lost` copies what is there")


def checked_positions(source: Settings, target: Settings) -> dict[Place, int]:
    """As `positions_of`.

    Raises LogMismatch where the second namespace has records that no copy made.
    """
    positions = positions_of(source, target)
    filled = "" if any(positions.values()) else _topic_with_records(target)
    deadline = time.monotonic() + target.kafka_timeout_ms / 1000
    # The positions of a copy that runs now may become visible a moment after its records.
    while filled and not any(positions.values()):
        if time.monotonic() > deadline:
            raise LogMismatch(
                f"topic {filled} has records, but no copy into it has begun: name a new namespace, "
                "or delete its topics"
            )
        time.sleep(_PAUSE_S)
        positions = positions_of(source, target)
    return positions


def lost_clicks(source: Settings, positions: Mapping[int, int], begins: Mapping[int, int]) -> str:
    """Which clicks neither Kafka nor the archive has. positions: partition -> the next offset."""
    places = [(p, first, begins[p]) for p, first in sorted(positions.items()) if first < begins[p]]
    gaps = [Gap(p, first, begin - 1, begin) for p, first, begin in places]
    if not gaps:
        return ""
    with open_archive(source) as archive:
        return retention_gaps.lacking(archive, gaps, topics.log_ids(source, [CLICKS])[CLICKS])


@contextmanager
def open_archive(source: Settings) -> Iterator[Archive]:
    """The archive of the first namespace; an OSError in the block is ArchiveUnavailable."""
    archive = Archive(source)
    try:
        yield archive
    except OSError as error:
        raise ArchiveUnavailable(f"archive at {archive.url}: {error}") from None


def _topic_with_records(target: Settings) -> str:
    for name in SOURCES:
        # Offsets are not records: a copy that was killed in its first transaction leaves some.
        with closing(reading.read(target, name)) as records:
            if next(records, None) is not None:
                return target.prefixed(name)
    return ""


def positions_of(source: Settings, target: Settings) -> dict[Place, int]:
    """The next offset of each partition of the first namespace; 0 before the first copy.

    An offset counts for the logs that it was committed for: a topic that was made anew, in either
    namespace, is copied from its begin.
    """
    logs = logs_of(source, target)
    found: dict[Place, int] = {}
    for name in SOURCES:
        count = topics.topic_configs(source, name)[0]
        committed = retention_gaps.committed(source, name, count, group(target))
        for partition, (offset, of_logs) in committed.items():
            found[name, partition] = offset if of_logs == logs.get(name) else 0
    return found


def logs_of(source: Settings, target: Settings) -> dict[str, str]:
    """The logs that each topic's positions belong to; absent where a topic does not exist."""
    there = topics.log_ids(target, SOURCES, missing_ok=True)
    here = topics.log_ids(source, SOURCES, missing_ok=True)
    return {name: f"{here[name]} {log}" for name, log in there.items() if name in here}
