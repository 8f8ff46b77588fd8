"""The active generation and the place of its bundle: the compacted topic `generations`.

Key `active` holds `{"generation": "<id>"}`, key `<id>` that generation's manifest, key
`begin/<id>/<partition>` where its micro-steps are taken in that partition of `clicks`, all as JSON.
The towers, item vectors and id map of one generation are used together, never with another's.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from kafka import KafkaProducer
from kafka.errors import KafkaError

from eddyline.errors import BundleError, Unavailable
from eddyline.kafka import clients, producers, reading, topics
from eddyline.schema.step_ranges import FOREVER, StepRanges
from eddyline.settings.loader import Settings

_ACTIVE = b"active"
# No generation is called so: its name is part of a topic's name, which has no slash.
_BEGIN = b"begin/"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a process needs to know of a generation before it loads the bundle.

    bundle: the bundle's folder, relative to the setting `bundle_dir` unless it is absolute
    cut:    partition of `items`, as text → offset of the last item change in the bundle's vectors;
            −1 or absent for none. The topic of item vectors continues after it.
    """

    generation: str
    bundle: str
    dimension: int
    created_ms: int
    cut: dict[str, int] = {}


class _Active(msgspec.Struct, frozen=True):
    generation: str


class _Ranges(msgspec.Struct, frozen=True):
    """log: `str(LogId)`; ranges: (first offset, offset after the last, null for none)."""

    log: str
    ranges: tuple[tuple[int, int | None], ...]


class KafkaStepRanges:
    """Where each generation takes micro-steps, in the topic. Thread rule: one thread.

    producer: waits for all replicas
    """

    def __init__(self, settings: Settings, producer: KafkaProducer) -> None:
        self._settings = settings
        self._producer = producer
        self._topic = settings.prefixed(topics.GENERATIONS)

    def read(self) -> dict[tuple[str, int], StepRanges]:
        """See `step_ranges`."""
        return step_ranges(self._settings)

    def write(self, ranges: Mapping[tuple[str, int], StepRanges]) -> None:
        """Return once the ranges are stored. Raises KafkaUnavailable, KafkaRefused."""
        try:
            sent = [
                self._producer.send(self._topic, _encode(found), key=_begin_key(*of))
                for of, found in ranges.items()
            ]
            self._producer.flush(timeout=self._settings.kafka_timeout_ms / 1000)
            for future in sent:
                future.get(timeout=self._settings.kafka_timeout_ms / 1000)
        except KafkaError as error:
            raise clients.translate_error(self._settings, error, f"topic {self._topic}") from None


def step_ranges(settings: Settings) -> dict[tuple[str, int], StepRanges]:
    """(generation, partition of `clicks`) -> where its micro-steps are taken; all that is recorded.

    Raises KafkaUnavailable, KafkaRefused, BundleError for a record that cannot be decoded.
    """
    found = {}
    for key, value in _read_all(settings).items():
        if not key.startswith(_BEGIN):
            continue
        try:
            generation, _, partition = key.removeprefix(_BEGIN).decode().rpartition("/")
            record = msgspec.json.decode(value, type=_Ranges)
            found[generation, int(partition)] = StepRanges(
                record.log,
                tuple((first, FOREVER if end is None else end) for first, end in record.ranges),
            )
        except ValueError as error:
            raise BundleError(
                f"topic {settings.prefixed(topics.GENERATIONS)}, key {key!r}: {error}"
            ) from None
    return found


def _begin_key(generation: str, partition: int) -> bytes:
    return _BEGIN + f"{generation}/{partition}".encode()


def _encode(ranges: StepRanges) -> bytes:
    pairs = tuple((first, None if end == FOREVER else end) for first, end in ranges.ranges)
    return msgspec.json.encode(_Ranges(ranges.log, pairs))


def publish(settings: Settings, manifest: Manifest, *, activate: bool = True) -> None:
    """Record a generation, create its item-vectors topic and, by default, activate it.

    Raises BundleError for the id `active`, which is the key of the active generation's record, and
    KafkaUnavailable, KafkaRefused.
    """
    if manifest.generation.encode() == _ACTIVE:
        raise BundleError("a generation cannot be called 'active'")
    topics.ensure_topics(settings, [topics.GENERATIONS, topics.item_vectors(manifest.generation)])
    topic = settings.prefixed(topics.GENERATIONS)
    producer = producers.make_producer(settings)
    try:
        sent = [
            producer.send(topic, msgspec.json.encode(manifest), key=manifest.generation.encode())
        ]
        if activate:
            active_ = msgspec.json.encode(_Active(manifest.generation))
            sent.append(producer.send(topic, active_, key=_ACTIVE))
        for future in sent:
            future.get(timeout=settings.kafka_timeout_ms / 1000)
    except KafkaError as error:
        raise clients.translate_error(settings, error, f"topic {topic}") from None
    finally:
        producer.close(timeout=settings.kafka_timeout_ms / 1000)


def active(settings: Settings) -> Manifest | None:
    """The active generation's manifest, None if there is none yet.

    Raises KafkaUnavailable if the topic gives nothing for `kafka_timeout_ms`, BundleError if its
    records contradict each other.
    """
    records = _read_all(settings)
    if _ACTIVE not in records:
        return None
    try:
        generation = msgspec.json.decode(records[_ACTIVE], type=_Active).generation
        if generation.encode() not in records:
            raise BundleError(
                f"generation {generation!r} is active but its manifest is not recorded"
            )
        return msgspec.json.decode(records[generation.encode()], type=Manifest)
    except msgspec.DecodeError as error:
        raise BundleError(f"topic {settings.prefixed(topics.GENERATIONS)}: {error}") from None


def known(settings: Settings) -> list[str]:
    """The ids of all recorded generations, the active one included. Raises KafkaUnavailable."""
    keys = _read_all(settings)
    return sorted(key.decode() for key in keys if key != _ACTIVE and not key.startswith(_BEGIN))


def _read_all(settings: Settings) -> dict[bytes, bytes]:
    """Key → value of the compacted topic."""
    records: dict[bytes, bytes] = {}
    for record in reading.read(settings, topics.GENERATIONS):
        if record.value is None:
            records.pop(record.key, None)
        else:
            records[record.key] = record.value
    return records


class NoGeneration(Unavailable):
    """There is no active generation yet; training makes one."""


def active_generation(settings: Settings) -> Manifest:
    """The active generation's manifest. Raises NoGeneration, KafkaUnavailable, BundleError."""
    manifest = active(settings)
    if manifest is None:
        raise NoGeneration("there is no active generation yet; `eddyline train` makes one")
    return manifest
