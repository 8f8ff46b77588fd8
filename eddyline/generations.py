"""The active generation and the place of its bundle: the compacted topic `generations`.

Key `active` holds `{"generation": "<id>"}`, key `<id>` that generation's manifest, both as JSON.
The towers, item vectors and id map of one generation are used together, never with another's.
"""

from __future__ import annotations

import msgspec
from kafka.errors import KafkaError

from eddyline.errors import BundleError, Unavailable
from eddyline.kafka import clients, producers, reading, topics
from eddyline.settings.loader import Settings

_ACTIVE = b"active"


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
    return sorted(key.decode() for key in _read_all(settings) if key != _ACTIVE)


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
