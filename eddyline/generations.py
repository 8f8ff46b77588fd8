"""The generations and what is recorded of them: the compacted topic `generations`.

Keys, with JSON values: `active` holds `{"generation": "<id>"}`; `<id>` that generation's manifest;
`begin/<id>/<partition>` where its micro-steps are taken in that partition of `clicks`; `end/<id>`
that it has ended, and when what belongs to it may be removed (ADR 22). Keys `skip/…` are of
`eddyline.kafka.skips`.
The towers, item vectors and id map of one generation are used together, never with another's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec
from kafka import KafkaProducer
from kafka.errors import KafkaError

from eddyline.errors import BundleError, GenerationEnded, Unavailable
from eddyline.kafka import clients, producers, reading, topics
from eddyline.kafka.kept import KeptKafka
from eddyline.schema.step_ranges import FOREVER, StepRanges
from eddyline.settings.loader import Settings

log = logging.getLogger(__name__)

_ACTIVE = b"active"
# No generation is called so: its name is part of a topic's name, which has no slash.
_BEGIN, _END = b"begin/", b"end/"
# From when the last process stops using an ended generation until what belongs to it is removed:
# processes look every `CHECK_S`, and their clocks differ.
REMOVE_AFTER_MS = 300_000
# How often a running process looks whether its generation has ended.
CHECK_S = 30.0
# Ends that stay recorded, the newest: their names stay refused, and their embeddings are removed
# from an older copy of Redis too.
ENDS_KEPT = 100


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


class End(msgspec.Struct, frozen=True, kw_only=True):
    """A generation has ended; all times in milliseconds since 1970.

    ended_ms:  when that was decided
    leave_ms:  from then on no process uses it
    remove_ms: from then on its embeddings, item vectors and bundle may be removed
    """

    ended_ms: int
    leave_ms: int
    remove_ms: int


@dataclass(frozen=True, slots=True)
class Generations:
    """All that the topic says.

    active:    the active generation; "" for none
    manifests: by generation, published last at the end
    ranges:    (generation, partition of `clicks`) -> where its micro-steps are taken
    ended:     by generation, ended last at the end; never the active one
    """

    active: str = ""
    manifests: dict[str, Manifest] = field(default_factory=dict)
    ranges: Mapping[tuple[str, int], StepRanges] = field(default_factory=dict)
    ended: dict[str, End] = field(default_factory=dict)

    def outdated(self, kept: int) -> list[str]:
        """The generations that are neither active nor among the newest `kept`, nor ended yet."""
        older = list(self.manifests)[:-kept]
        return [name for name in older if name != self.active and name not in self.ended]

    def removable(self, now_ms: int) -> list[str]:
        """The ended generations of which everything may be removed now."""
        return [name for name, end in self.ended.items() if now_ms >= end.remove_ms]

    def check_usable(self, names: Collection[str], now_ms: int) -> None:
        """Raise GenerationEnded where no process uses one of these generations any more."""
        for name in names:
            end = self.ended.get(name)
            if end is not None and now_ms >= end.leave_ms:
                raise GenerationEnded(
                    f"generation {name} has ended ({utc(end.ended_ms)}), and its item vectors and "
                    f"embeddings are removed from {utc(end.remove_ms)} on; the active generation "
                    f"is {self.active or 'none'}. Start the process again: it loads the active "
                    "one. `eddyline generations list` shows all"
                )


class UsedGenerations:
    """The generations that a process uses, until they end. Thread rule: one thread."""

    def __init__(self, settings: Settings, names: Sequence[str]) -> None:
        self._settings = settings
        self._names = names
        self._reported = set[str]()

    def check(self, now_ms: int | None = None) -> Generations:
        """All that the topic says now; logs once that one of them has ended.

        Raises GenerationEnded where it must not be used any more, and the errors of `read`.
        """
        found = read(self._settings)
        found.check_usable(self._names, _now_ms() if now_ms is None else now_ms)
        for name in self._names:
            end = found.ended.get(name)
            if end is not None and name not in self._reported:
                self._reported.add(name)
                log.warning(
                    "the generation of this process has ended: restart it before it has to end",
                    extra={"generation": name, "ends": utc(end.leave_ms)},
                )
        return found


class _Active(msgspec.Struct, frozen=True):
    generation: str


class _Ranges(msgspec.Struct, frozen=True):
    """log: `str(LogId)`; ranges: (first offset, offset after the last, null for none)."""

    log: str
    ranges: tuple[tuple[int, int | None], ...]


def utc(at_ms: int) -> str:
    """A time for a message: seconds, UTC."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


class KafkaStepRanges:
    """Where each generation takes micro-steps, in the topic. Thread rule: one thread.

    producer: waits for all replicas
    """

    def __init__(
        self, settings: Settings, producer: KafkaProducer, kept: KeptKafka | None = None
    ) -> None:
        """kept: reads the topic; default: each read has a connection of its own"""
        self._settings = settings
        self._producer = producer
        self._kept = kept
        self._topic = settings.prefixed(topics.GENERATIONS)

    def read(self) -> Generations:
        """See `read`."""
        kept = self._kept
        return read(self._settings, None if kept is None else kept.latest(topics.GENERATIONS))

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


def read(settings: Settings, records: Mapping[bytes, bytes] | None = None) -> Generations:
    """All that the topic says.

    records: key → value of the topic; default: as it is now
    Raises KafkaUnavailable if it gives nothing for `kafka_timeout_ms`, KafkaRefused, BundleError
    for a record that cannot be decoded.
    """
    active_, manifests, ended = "", dict[str, Manifest](), dict[str, End]()
    ranges = dict[tuple[str, int], StepRanges]()
    for key, value in (_read_all(settings) if records is None else records).items():
        try:
            if key == _ACTIVE:
                active_ = msgspec.json.decode(value, type=_Active).generation
            elif key.startswith(_BEGIN):
                generation, _, partition = key.removeprefix(_BEGIN).decode().rpartition("/")
                ranges[generation, int(partition)] = _decode(value)
            elif key.startswith(_END):
                ended[key.removeprefix(_END).decode()] = msgspec.json.decode(value, type=End)
            elif b"/" not in key:
                manifests[key.decode()] = msgspec.json.decode(value, type=Manifest)
        except ValueError as error:
            raise BundleError(
                f"topic {settings.prefixed(topics.GENERATIONS)}, key {key!r}: {error}"
            ) from None
    # An end that was decided while the generation became active again is void.
    ended.pop(active_, None)
    return Generations(active_, manifests, ranges, ended)


def step_ranges(settings: Settings) -> Mapping[tuple[str, int], StepRanges]:
    """(generation, partition of `clicks`) -> where its micro-steps are taken; errors of `read`."""
    return read(settings).ranges


def _begin_key(generation: str, partition: int) -> bytes:
    return _BEGIN + f"{generation}/{partition}".encode()


def _encode(ranges: StepRanges) -> bytes:
    pairs = tuple((first, None if end == FOREVER else end) for first, end in ranges.ranges)
    return msgspec.json.encode(_Ranges(ranges.log, pairs))


def _decode(value: bytes) -> StepRanges:
    record = msgspec.json.decode(value, type=_Ranges)
    pairs = ((first, FOREVER if end is None else end) for first, end in record.ranges)
    return StepRanges(record.log, tuple(pairs))


def publish(settings: Settings, manifest: Manifest, *, activate: bool = True) -> None:
    """Record a generation, create its item-vectors topic and, by default, activate it.

    Then end the generations that are outdated, see `end_outdated`.
    Raises BundleError for the id `active`, which is the key of the active generation's record, and
    for one that has ended; KafkaUnavailable, KafkaRefused.
    """
    name = manifest.generation
    if name.encode() == _ACTIVE:
        raise BundleError("a generation cannot be called 'active'")
    topics.ensure_topics(settings, [topics.GENERATIONS])
    refuse_ended(read(settings), name)
    topics.ensure_topics(settings, [topics.item_vectors(name)])
    _void_end_of_active(settings)
    records = [(name.encode(), msgspec.json.encode(manifest))]
    if activate:
        records.append((_ACTIVE, msgspec.json.encode(_Active(name))))
    _append(settings, records)
    end_outdated(settings)


def activate(settings: Settings, name: str, now_ms: int | None = None) -> None:
    """Activate a published generation; processes load it at their next start.

    One that has ended may become active again until its removal begins. Raises BundleError where
    it is not published or is being removed; KafkaUnavailable, KafkaRefused.
    """
    found = read(settings)
    removable = found.removable(_now_ms() if now_ms is None else now_ms)
    if name not in found.manifests or name in removable:
        refuse_ended(found, name)
        raise BundleError(f"generation {name} is not published: {', '.join(found.manifests)} are")
    _void_end_of_active(settings)
    _append(settings, [(_ACTIVE, msgspec.json.encode(_Active(name))), (_END + name.encode(), None)])
    _void_end_of_active(settings)


def refuse_ended(found: Generations, name: str) -> None:
    """Raise BundleError for a generation that has ended: its name is not used again."""
    if name in found.ended:
        raise BundleError(
            f"generation {name} has ended ({utc(found.ended[name].ended_ms)}); a new generation "
            "needs a name of its own. `eddyline generations list` shows all"
        )


def end_outdated(settings: Settings, now_ms: int | None = None) -> list[str]:
    """Decide which generations have ended: all but the newest `generations_kept` and the active
    one. Returns those that ended now.

    It may be repeated: what is decided stays. Raises KafkaUnavailable, KafkaRefused, BundleError.
    """
    found, now = read(settings), _now_ms() if now_ms is None else now_ms
    if not (names := found.outdated(settings.generations_kept)):
        return []
    leave_ms = now + settings.generation_grace_s * 1_000
    end = End(ended_ms=now, leave_ms=leave_ms, remove_ms=leave_ms + REMOVE_AFTER_MS)
    _append(settings, [(_END + name.encode(), msgspec.json.encode(end)) for name in names])
    # Somebody may have activated one of them between the two.
    _void_end_of_active(settings)
    for name in names:
        log.info("a generation has ended", extra={"generation": name, "leave": utc(leave_ms)})
    return names


def clear_records(settings: Settings, names: Sequence[str]) -> None:
    """Delete the manifest and the step ranges of ended generations; their ends stay.

    Raises KafkaUnavailable, KafkaRefused, BundleError.
    """
    found = read(settings)
    keys = [name.encode() for name in names if name in found.manifests]
    keys += [_begin_key(*of) for of in found.ranges if of[0] in names]
    cleared = [n for n in found.ended if n in names or n not in found.manifests]
    keys += [_END + name.encode() for name in cleared[:-ENDS_KEPT]]
    _append(settings, [(key, None) for key in keys])


def _void_end_of_active(settings: Settings) -> None:
    """Delete the end of the active generation, which a race may have left."""
    records = _read_all(settings)
    if _ACTIVE in records:
        name = msgspec.json.decode(records[_ACTIVE], type=_Active).generation.encode()
        if _END + name in records:
            _append(settings, [(_END + name, None)])


def _append(settings: Settings, records: Sequence[tuple[bytes, bytes | None]]) -> None:
    """Return once the records are stored, in this order. Raises KafkaUnavailable, KafkaRefused."""
    if not records:
        return
    topic = settings.prefixed(topics.GENERATIONS)
    with _translated(settings, topic):
        producer = producers.make_producer(settings)
        try:
            for future in [producer.send(topic, value, key=key) for key, value in records]:
                future.get(timeout=settings.kafka_timeout_ms / 1000)
        finally:
            producer.close(timeout=settings.kafka_timeout_ms / 1000)


@contextmanager
def _translated(settings: Settings, topic: str) -> Iterator[None]:
    try:
        yield
    except KafkaError as error:
        raise clients.translate_error(settings, error, f"topic {topic}") from None


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def active(settings: Settings) -> Manifest | None:
    """The active generation's manifest, None if there is none yet.

    Raises BundleError if the records contradict each other, and the errors of `read`.
    """
    found = read(settings)
    if found.active and found.active not in found.manifests:
        raise BundleError(f"generation {found.active!r} is active but its manifest is not recorded")
    return found.manifests[found.active] if found.active else None


def known(settings: Settings) -> list[str]:
    """The ids of all recorded generations, the active one included. Errors of `read`."""
    return sorted(read(settings).manifests)


def _read_all(settings: Settings) -> dict[bytes, bytes]:
    """Key → value of the compacted topic, by the offset of the key's last record."""
    return reading.latest(settings, topics.GENERATIONS)


class NoGeneration(Unavailable):
    """There is no active generation yet; training makes one."""


def active_generation(settings: Settings) -> Manifest:
    """The active generation's manifest. Raises NoGeneration, KafkaUnavailable, BundleError."""
    manifest = active(settings)
    if manifest is None:
        raise NoGeneration("there is no active generation yet; `eddyline train` makes one")
    return manifest
