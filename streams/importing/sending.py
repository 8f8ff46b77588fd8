"""Send the rows of a file to Kafka, each event once, even if the import is killed and resumed.

The checkpoint, a file in `<data_dir>/imports`, is written after the broker has confirmed all events
of a chunk. It has the next row and, for each partition, the offset after the last confirmed
record. A resumed import reads the topic from there and skips the events of the next chunk that
arrived, however much others wrote since. What still arrives later, from a connection of the killed
process, is dropped by ingest: the event ids are the same, and a chunk is smaller than the window.
Items and profiles are whole records: sending one again changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
from kafka import KafkaProducer
from kafka.errors import KafkaError

from eddyline.errors import EddylineError, Rejected, SettingsError
from eddyline.kafka import clients, producers, reading, topics
from eddyline.process.files import read_if_exists, write_atomically
from eddyline.process.locks import try_lock
from eddyline.schema import validation
from eddyline.schema.events import Click
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId
from streams.importing.rows import Event, RowReader

# Rows and events of a chunk, the most that is not confirmed. A row has 256 events at most.
CHUNK_ROWS = 2_000
CHUNK_EVENTS = 4_000


class Checkpoint(msgspec.Struct, kw_only=True):
    """How far the import of a file into a topic is.

    log:           the topic's identity: a topic that was made anew has nothing of the file
    next_row:      rows before it are confirmed or refused
    ends:          partition → offset after the last record that was confirmed, or from before
    sent, refused: events and rows so far; refused_bytes: of the file of refused rows
    """

    cluster_id: str
    topic_id: str
    next_row: int = 0
    ends: dict[int, int] = {}
    sent: int = 0
    refused: int = 0
    refused_bytes: int = 0
    is_done: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What an import did. resumed_at: the row that it started with; took_s: without earlier runs"""

    rows: int
    sent: int
    refused: int
    resumed_at: int
    took_s: float
    was_done: bool


class _Ids(msgspec.Struct):
    event_id: str | None = None


_ids = msgspec.json.Decoder(_Ids)
Progress = Callable[[int, int, int], None]
# (row number, key, event); see `Keyed`.
_Numbered = tuple[int, str, Event | None]


def send_file(
    settings: Settings,
    reader: RowReader,
    *,
    refused_file: Path | None = None,
    on_progress: Progress = lambda rows, sent, refused: None,
    on_refused: Callable[[int, bytes | None, Rejected], None] = lambda number, row, why: None,
) -> Result:
    """Send what is not sent yet, and return once the broker has confirmed all of it.

    refused_file: gets the refused rows as JSON lines; a new file unless the import is resumed
    on_progress:  called with (rows, events sent, rows refused) after each chunk
    Raises KafkaUnavailable, KafkaRefused, UnreadableFile, SettingsError, Rejected for an event that
    is too large for the topic: the same call resumes.
    """
    validation.check_may_send(settings, reader.topic)
    topic = settings.prefixed(reader.topic)
    path = Path(settings.data_dir) / "imports" / f"{reader.digest}-{topic}.json"
    lock = _locked(path)
    try:
        log = topics.log_ids(settings, [reader.topic])[reader.topic]
        point = _load(path, log)
        if point is not None and point.is_done:
            return Result(point.next_row, point.sent, point.refused, point.next_row, 0.0, True)
        sent_ids, is_resumed = None, point is not None
        if point is None:
            ends = topics.end_offsets(settings, reader.topic)
            point = Checkpoint(cluster_id=log.cluster_id, topic_id=log.topic_id, ends=ends)
            _save(path, point)
        elif reader.topic == topics.CLICKS:
            sent_ids = _sent_after(settings, point)
        with (
            _refused_rows(refused_file, point, is_resumed) as refused,
            _producer(settings) as producer,
        ):
            run = _Run(settings, reader, point, path, producer, refused, on_refused)
            return run.all(sent_ids, on_progress)
    finally:
        lock.release()


class _Run:
    """One run of an import."""

    def __init__(
        self,
        settings: Settings,
        reader: RowReader,
        point: Checkpoint,
        path: Path,
        producer: KafkaProducer,
        refused: IO[bytes] | None,
        on_refused: Callable[[int, bytes | None, Rejected], None],
    ) -> None:
        self._settings = settings
        self._reader = reader
        self._point = point
        self._path = path
        self._producer = producer
        self._refused = refused
        self._on_refused = on_refused

    def all(self, sent_ids: Callable[[set[str]], set[str]] | None, report: Progress) -> Result:
        started, point, first = time.monotonic(), self._point, self._point.next_row
        report(first, point.sent, point.refused)
        with closing(self._chunks(first)) as chunks:
            for next_row, events in chunks:
                arrived: set[str] = set()
                if sent_ids is not None:
                    arrived = sent_ids({one for *_, e in events if (one := _event_id(e))})
                    sent_ids = None
                self._send([one for one in events if _event_id(one[-1]) not in arrived])
                point.sent += len(events)
                point.next_row = next_row
                self._save()
                report(next_row, point.sent, point.refused)
        for line in self._reader.file.rejected:
            self._refuse(None, None, Rejected(line.reason, f"line {line.number}", line.text[:80]))
        point.is_done = True
        self._save()
        took_s = time.monotonic() - started
        return Result(point.next_row, point.sent, point.refused, first, took_s, False)

    def _chunks(self, first: int) -> Generator[tuple[int, list[_Numbered]]]:
        """(the row after the chunk, its events). A resumed import makes the same chunks."""
        events: list[_Numbered] = []
        begin, number = first, first - 1
        with closing(self._reader.file.rows(first)) as rows:
            for number, row in enumerate(rows, first):
                try:
                    events += [(number, *one) for one in self._reader.events(number, row)]
                except Rejected as why:
                    self._refuse(number, row, why)
                if number + 1 - begin >= CHUNK_ROWS or len(events) >= CHUNK_EVENTS:
                    yield number + 1, events
                    begin, events = number + 1, []
        if number + 1 > begin:
            yield number + 1, events

    def _refuse(self, number: int | None, row: bytes | None, why: Rejected) -> None:
        self._point.refused += 1
        self._on_refused(-1 if number is None else number, row, why)
        if self._refused is not None:
            line = msgspec.json.encode({"line": why.detail}) if row is None else row
            self._point.refused_bytes += self._refused.write(line.replace(b"\n", b" ") + b"\n")

    def _send(self, events: Sequence[_Numbered]) -> None:
        settings, topic = self._settings, self._reader.topic
        try:
            sent = [
                (number + 1, event, _send_one(self._producer, settings, topic, key, event))
                for number, key, event in events
            ]
            self._producer.flush(timeout=max(10.0, settings.kafka_timeout_ms / 1000))
            for meta in producers.confirm(settings, "row", sent):
                end = max(self._point.ends.get(meta.partition, 0), meta.offset + 1)
                self._point.ends[meta.partition] = end
        except KafkaError as error:
            text = "the import is not complete: the same command resumes it"
            raise clients.translate_error(settings, error, text) from None

    def _save(self) -> None:
        if self._refused is not None:
            self._refused.flush()
        _save(self._path, self._point)


def _send_one(
    producer: KafkaProducer, settings: Settings, topic: str, key: str, event: Event | None
) -> Any:
    if event is not None:
        return producers.send(producer, settings, event)
    delete = producers.send_delete if topic == topics.ITEMS else producers.send_forget
    return delete(producer, settings, key)


def _sent_after(settings: Settings, point: Checkpoint) -> Callable[[set[str]], set[str]]:
    """Which of some event ids arrived in `clicks` after the checkpoint."""

    def arrived(ids: set[str]) -> set[str]:
        found: set[str] = set()
        ends = topics.end_offsets(settings, topics.CLICKS)
        for record in reading.read(settings, topics.CLICKS, point.ends, ends):
            try:
                event_id = _ids.decode(record.value or b"{}").event_id
            except msgspec.DecodeError:
                continue
            if event_id in ids:
                found.add(event_id)
        return found

    return arrived


def _event_id(event: Any) -> str | None:
    return event.event_id if isinstance(event, Click) else None


def _load(path: Path, log: LogId) -> Checkpoint | None:
    content = read_if_exists(path)
    if content is None:
        return None
    try:
        found = msgspec.json.decode(content, type=Checkpoint)
    except msgspec.DecodeError as error:
        raise SettingsError(f"{path}: {error}: delete it to import the file anew") from None
    return found if (found.cluster_id, found.topic_id) == (log.cluster_id, log.topic_id) else None


def _save(path: Path, point: Checkpoint) -> None:
    try:
        write_atomically(path, msgspec.json.encode(point))
    except OSError as error:
        raise EddylineError(f"{path}: {error.strerror}") from None


def _locked(path: Path) -> Any:
    try:
        lock = try_lock(path.with_suffix(".lock"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; `data_dir` names another place") from None
    if lock is None:
        raise SettingsError("another import of this file is running")
    return lock


@contextmanager
def _refused_rows(
    path: Path | None, point: Checkpoint, is_resumed: bool
) -> Iterator[IO[bytes] | None]:
    """The file of refused rows, at the place of the checkpoint."""
    if path is None:
        yield None
        return
    try:
        with path.open("r+b" if is_resumed and path.exists() else "xb") as file:
            file.truncate(point.refused_bytes)
            file.seek(0, 2)
            yield file
    except FileExistsError:
        raise SettingsError(f"{path}: exists already") from None
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None


@contextmanager
def _producer(settings: Settings) -> Iterator[KafkaProducer]:
    # A chunk ends with a flush: until then batches wait to become full.
    producer = producers.make_producer(settings, linger_ms=1_000, batch_size=131_072)
    try:
        yield producer
    finally:
        producer.close(timeout=settings.kafka_timeout_ms / 1000)
