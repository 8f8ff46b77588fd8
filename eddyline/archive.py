"""The archive of accepted events: Parquet files in a folder or an object store. Names, columns, reading.

    <archive_url>/<topic>/hour=2026-11-22T05/0003-00000000000000065536-00000000000000131071.parquet
                           append time, UTC  partition, first and last offset that the file was made of

The offsets of a name are those of the first and the last *record*; a refused or re-sent record has no row. A
file is complete or absent. Merges are records of `clicks`, but lie in files of their own, `merges`: they are
rare and about two users. docs/archive.md has the columns. pyarrow and fsspec (extra `archive`) are imported
when an archive is opened.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from eddyline.errors import SettingsError, Unavailable
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema.events import Click, Item, Merge, UserProfile
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId

HOUR_MS = 3_600_000
# What `clicks` has besides clicks; the files lie beside those of the three topics.
MERGES = "merges"
# Rows of a row group and of what a reader holds at a time; with `ROW_GROUP_BYTES` it bounds both.
ROW_GROUP_ROWS = 8_192
# So many bytes of values end a row group early: item vectors are long.
ROW_GROUP_BYTES = 8 * 1024 * 1024
_LOG_KEY = b"eddyline.log"
# From which offset on a file's records were read without a break; it is below `first` where markers lie.
_SINCE_KEY = b"eddyline.since"
_NAME = re.compile(r"hour=(\d{4}-\d\d-\d\dT\d\d)/(\d+)-(\d+)-(\d+)\.parquet\Z")
_HOUR = "%Y-%m-%dT%H"


@dataclass(frozen=True, slots=True)
class ArchiveFile:
    """A file by its name. first, last: offsets of the records it was made of; hour_ms: its hour's begin."""

    topic: str
    partition: int
    first: int
    last: int
    hour_ms: int
    path: str


@dataclass(frozen=True, slots=True)
class Archived:
    """One accepted event and where it lay. event: None for an item's delete and for a user forgotten.

    key: the item or user id; None for a user forgotten, of whom only `digest` is kept
    A merge into a user who was forgotten since has "" in place of his id.
    """

    partition: int
    offset: int
    appended_ms: int
    key: str | None
    event: Click | Item | UserProfile | Merge | None
    produced_us: int = 0
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Up to where a user's rows go: clicks appended at or before, profiles below the offset."""

    appended_ms: int
    offset: int


class ArchiveUnavailable(Unavailable):
    """The archive's files cannot be read or written now, or one of them is no Parquet file."""


EVERYTHING = Forgotten(2**62, 2**62)


def digest(user_id: str) -> str:
    """What the archive keeps of a forgotten user's id: SHA-256, in hexadecimal."""
    return hashlib.sha256(user_id.encode()).hexdigest()


@cache
def schema(topic: str) -> Any:
    """The pyarrow schema of a topic's files."""
    import pyarrow as pa

    text = pa.string()
    place = [("partition", pa.int32()), ("offset", pa.int64()), ("appended_ms", pa.int64())]
    own: dict[str, list[tuple[str, Any]]] = {
        CLICKS: [
            ("event_id", text),
            ("user_id", text),
            ("item_id", text),
            ("at_ms", pa.int64()),
            ("kind", text),
            ("weight", pa.float64()),
            ("context", text),
            ("impression_id", text),
            ("produced_us", pa.int64()),
        ],
        ITEMS: [
            ("item_id", text),
            ("deleted", pa.bool_()),
            ("title", text),
            ("categories", pa.list_(text)),
            ("tags", pa.list_(text)),
            ("attributes", text),
            ("available", pa.bool_()),
            ("at_ms", pa.int64()),
            ("vector", pa.list_(pa.float64())),
        ],
        USERS: [
            ("user_id", text),
            ("deleted", pa.bool_()),
            ("attributes", text),
            ("at_ms", pa.int64()),
            ("forgotten_sha256", text),
        ],
        MERGES: [("user_id", text), ("merge_into", text), ("at_ms", pa.int64())],
    }
    return pa.schema(place + own[topic])


def row(event: Archived) -> tuple[Any, ...]:
    """An event as a row, in the order of its topic's columns."""
    place, found = (event.partition, event.offset, event.appended_ms), event.event
    if isinstance(found, Click):
        return (
            *place,
            found.event_id,
            found.user_id,
            found.item_id,
            found.at_ms,
            found.kind,
            found.weight,
            _json(found.context),
            found.impression_id,
            event.produced_us,
        )
    if isinstance(found, Item):
        return (
            *place,
            found.item_id,
            False,
            found.title,
            found.categories,
            found.tags,
            _json(found.attributes),
            found.available,
            found.at_ms,
            found.vector,
        )
    if isinstance(found, UserProfile):
        return (*place, found.user_id, False, _json(found.attributes), found.at_ms, None)
    if isinstance(found, Merge):
        return (*place, found.user_id, found.merge_into, found.at_ms)
    if event.digest is not None:
        return (*place, None, True, None, None, event.digest)
    return (*place, event.key, True, None, None, None, None, None, None, None)


class Archive:
    """Files of one archive. Thread rule: any thread; no state but the connection to an object store.

    Raises SettingsError for an `archive_url` that names no file system that is installed, and OSError where
    the store does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.settings = settings
        self.url = settings.archive_url or str(Path(settings.data_dir).absolute() / "archive")
        try:
            self.fs, root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise SettingsError(f"archive_url = {self.url!r}: {error}") from None
        self.root = str(root).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def path(self, topic: str, hour_ms: int, partition: int, first: int, last: int) -> str:
        """Where the file of these offsets lies."""
        hour = datetime.fromtimestamp(hour_ms / 1000, UTC).strftime(_HOUR)
        name = f"{partition:04d}-{first:020d}-{last:020d}.parquet"
        return f"{self.root}/{self.settings.prefixed(topic)}/hour={hour}/{name}"

    def files(self, topic: str, partition: int | None = None) -> list[ArchiveFile]:
        """The complete files, by partition and offset."""
        folder = f"{self.root}/{self.settings.prefixed(topic)}"
        self.fs.invalidate_cache(folder)
        found = []
        for path in self.fs.find(folder):
            if match := _NAME.search(path):
                hour = datetime.strptime(match[1], _HOUR).replace(tzinfo=UTC)
                hour_ms = int(hour.timestamp()) * 1000
                found.append(
                    ArchiveFile(topic, int(match[2]), int(match[3]), int(match[4]), hour_ms, path)
                )
        wanted = (file for file in found if partition in (None, file.partition))
        return sorted(wanted, key=lambda file: (file.partition, file.first, file.last))

    def read(
        self, topic: str, partition: int | None = None, *, first: int = 0
    ) -> Iterator[Archived]:
        """Events in the order of the log, partition after partition, from offset `first` on, each once."""
        at = (-1, -1)
        for file in self.files(topic, partition):
            if file.last < first:
                continue
            for event in self.events(file):
                if event.offset >= first and (event.partition, event.offset) > at:
                    at = (event.partition, event.offset)
                    yield event

    def events(self, file: ArchiveFile) -> Iterator[Archived]:
        """The events of one file; holds one row group at a time."""
        import pyarrow.parquet as pq

        make = {CLICKS: _click, ITEMS: _item, USERS: _profile, MERGES: _merge}[file.topic]
        with self.fs.open(file.path, "rb") as opened, pq.ParquetFile(opened) as parquet:
            for batch in parquet.iter_batches(batch_size=ROW_GROUP_ROWS):
                for found in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    yield make(found)

    def ends(self, topic: str) -> dict[int, int]:
        """The last offset that each partition's files were made of; the position is the one after it."""
        last: dict[int, int] = {}
        for file in self.files(topic):
            last[file.partition] = max(file.last, last.get(file.partition, -1))
        return last

    def log_id(self, file: ArchiveFile) -> LogId | None:
        """Which log a file was made of."""
        text = self._metadata(file).get(_LOG_KEY, b"").decode()
        return LogId(*text.split("|")) if text else None

    def since(self, file: ArchiveFile) -> int | None:
        """From which offset on a file has every event; None for a file that is older than this mark."""
        text = self._metadata(file).get(_SINCE_KEY, b"")
        return int(text) if text else None

    def lacking(self, topic: str, partition: int, first: int, last: int) -> list[tuple[int, int]]:
        """The ranges of offsets within [first, last] that no file was made of, both ends contained.

        They were lost before the archive read them, or are not archived yet.
        """
        lacking, at = [], first
        for file in self.files(topic, partition):
            if file.last < at:
                continue
            if file.first > at:
                since = self.since(file)
                begin = min(file.first if since is None else since, last + 1)
                if begin > at:
                    lacking.append((at, begin - 1))
            at = max(at, file.last + 1)
            if at > last:
                break
        return [*lacking, (at, last)] if at <= last else lacking

    def version(self, file: ArchiveFile) -> str:
        """Another one whenever the file was written again, as far as the store tells (etag, size, time)."""
        self.fs.invalidate_cache(file.path.rsplit("/", 1)[0])
        return str(self.fs.ukey(file.path))

    def _metadata(self, file: ArchiveFile) -> dict[bytes, bytes]:
        import pyarrow.parquet as pq

        with self.fs.open(file.path, "rb") as opened:
            return pq.read_metadata(opened).metadata or {}

    def partials(self) -> Path:
        """The local folder of files being written; in a local archive, so that a rename is enough."""
        return self._local() / ".partial"

    def lock_path(self) -> Path:
        """The file that whoever puts or rewrites a file holds locked, see `streams.archive.file_placement`."""
        return self._local() / ".lock"

    def _local(self) -> Path:
        return Path(self.root) if self.is_local else Path(self.settings.data_dir) / "archive"


def metadata_of(log_id: LogId, since: int) -> dict[bytes, bytes]:
    """What a file's schema carries besides its columns. since: see `Archive.since`."""
    return {
        _LOG_KEY: f"{log_id.cluster_id}|{log_id.topic_id}".encode(),
        _SINCE_KEY: str(since).encode(),
    }


def writer(path: Path, arrow_schema: Any) -> Any:
    """A pyarrow ParquetWriter as every file of the archive is written: the same rows, the same bytes."""
    import pyarrow.parquet as pq

    return pq.ParquetWriter(
        path, arrow_schema, compression="zstd", compression_level=3, version="2.6"
    )


def _json(attributes: object) -> str | None:
    return None if attributes is None else msgspec.json.encode(attributes).decode()


def _attributes(text: str | None) -> Any:
    return None if text is None else msgspec.json.decode(text)


def _click(found: tuple[Any, ...]) -> Archived:
    (
        p,
        offset,
        appended_ms,
        event_id,
        user,
        item_id,
        at_ms,
        kind,
        weight,
        context,
        impression,
        produced,
    ) = found
    event = Click(
        user_id=user,
        item_id=item_id,
        at_ms=at_ms,
        kind=kind,
        event_id=event_id,
        weight=weight,
        context=_attributes(context),
        impression_id=impression,
    )
    return Archived(p, offset, appended_ms, user, event, produced)


def _item(found: tuple[Any, ...]) -> Archived:
    (
        p,
        offset,
        appended_ms,
        item_id,
        deleted,
        title,
        categories,
        tags,
        attributes,
        available,
        at_ms,
        vector,
    ) = found
    if deleted:
        return Archived(p, offset, appended_ms, item_id, None)
    event = Item(
        item_id=item_id,
        title=title,
        categories=categories,
        tags=tags,
        attributes=_attributes(attributes),
        available=available,
        at_ms=at_ms,
        vector=vector,
    )
    return Archived(p, offset, appended_ms, item_id, event)


def _profile(found: tuple[Any, ...]) -> Archived:
    p, offset, appended_ms, user, deleted, attributes, at_ms, forgotten = found
    if deleted:
        return Archived(p, offset, appended_ms, None, None, digest=forgotten)
    event = UserProfile(user_id=user, attributes=_attributes(attributes), at_ms=at_ms)
    return Archived(p, offset, appended_ms, user, event)


def _merge(found: tuple[Any, ...]) -> Archived:
    p, offset, appended_ms, user, into, at_ms = found
    return Archived(
        p, offset, appended_ms, user, Merge(user_id=user, merge_into=into or "", at_ms=at_ms)
    )
