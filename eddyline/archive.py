"""The archive of accepted events, Parquet in a folder or an object store: names, columns, reading.

    <archive_url>/<topic>/hour=2026-11-22T05/0003-00000000000000065536-00000000000000131071.parquet
                           append time, UTC  partition, first and last offset of its records

The offsets of a name are those of the first and the last *record*; a rejected or re-sent record has
no row. A file is complete or absent. Merges and Forgets are records of `clicks` with files of their
own, `merges` and `forgets`: they are rare, merges are about two users, and Forgets hold no id.
docs/archive.md has the columns. pyarrow and fsspec are imported late, because the processes without
the extra `archive` import the names in this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec

from eddyline.errors import SettingsError, Unavailable
from eddyline.kafka.topics import ANSWERS, CLICKS, ITEMS, USERS
from eddyline.schema.answers import RecordedAnswer
from eddyline.schema.erasure import Erasure, erased_after, erased_before
from eddyline.schema.events import Click, Forget, Item, Merge, UserProfile
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId

HOUR_MS = 3_600_000
# The folders of the merges and of the Forgets in `clicks`, next to those of the three topics.
MERGES, FORGETS = "merges", "forgets"
# Rows of a row group, which a reader holds at a time. ROW_GROUP_BYTES limits it as well.
ROW_GROUP_ROWS = 8_192
# A row group ends early with this many bytes of values: item vectors are long.
ROW_GROUP_BYTES = 8 * 1024 * 1024
_LOG_KEY = b"eddyline.log"
# The offset from which on the file has every event; below `first` if markers precede it.
_SINCE_KEY = b"eddyline.since"
_NAME = re.compile(r"hour=(\d{4}-\d\d-\d\dT\d\d)/(\d+)-(\d+)-(\d+)\.parquet\Z")
_RESYNCED, _EMPTY = "resynced_ms", "empty"
_HOUR = "%Y-%m-%dT%H"
# partition, offset, appended_ms
Place = tuple[int, int, int]
# The columns after these three.
_COLUMNS = {
    CLICKS: "event_id user_id item_id at_ms kind weight context impression_id produced_us",
    ITEMS: "item_id deleted title categories tags attributes available at_ms vector",
    USERS: "user_id deleted attributes at_ms forgotten_sha256",
    MERGES: "user_id merge_into at_ms",
    FORGETS: "forgotten_sha256 forget_until_ms keep_after_ms users_offset ends_ms",
    ANSWERS: "impression_id user_id at_ms generation user_offset scene arm k session"
    " filtered popularity_beta items paths missing",
}
_CLICK_FIELDS = attrgetter("event_id", "user_id", "item_id", "at_ms", "kind", "weight")
_FORGET_FIELDS = attrgetter("forget_until_ms", "keep_after_ms", "users_offset", "ends_ms")
_ANSWER_FIELDS = attrgetter(*_COLUMNS[ANSWERS].split()[:11])
_ITEM_TEXTS = attrgetter("title", "categories", "tags")
_ITEM_REST = attrgetter("available", "at_ms", "vector")


@dataclass(frozen=True, slots=True)
class ArchiveFile:
    """A file by its name.

    first, last: offsets of its first and last record
    hour_ms:     the begin of its hour
    """

    topic: str
    partition: int
    first: int
    last: int
    hour_ms: int
    path: str


@dataclass(frozen=True, slots=True)
class Archived:
    """One accepted event and its place in the log.

    event:  None for a deleted item and for a forgotten user
    key:    the item or user id; None for a forgotten user, of whom only `digest` is kept

    A merge into a user who was forgotten later has "" as `merge_into`, every Forget has "" as
    `user_id`.
    """

    partition: int
    offset: int
    appended_ms: int
    key: str | None
    event: Click | Item | UserProfile | Merge | Forget | RecordedAnswer | None
    produced_us: int = 0
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A user's rows to remove.

    erasure:       of the user's null record, or of the Forget
    clicks_offset: of the Forget in `clicks`; -1 while only the null record was read
    keep_after_ms: see `events.Forget`; without a Forget it is not used
    """

    erasure: Erasure
    clicks_offset: int = -1
    keep_after_ms: int = -1

    @classmethod
    def of(cls, forget: Forget, clicks_offset: int) -> Forgotten:
        """What a Forget at this offset of `clicks` removes."""
        return cls(Erasure.of(forget), clicks_offset, forget.bound_ms)

    @property
    def request(self) -> tuple[int, int]:
        """(append time, offset) of the null record: the later of two requests is greater."""
        return self.erasure.until_ms, self.erasure.users_offset

    def covers_event(
        self, offset: int, appended_ms: int, at_ms: int, origin_ms: int | None = None
    ) -> bool:
        """Whether a click or merge goes. The rule is that of ingest, see `schema.erasure`.

        While only the null record was read, events appended up to it go: its Forget comes later.
        """
        if offset < self.clicks_offset and erased_before(self.keep_after_ms, at_ms):
            return True
        return appended_ms <= self.erasure.until_ms or erased_after(
            self.erasure, at_ms, appended_ms, origin_ms
        )

    def covers_answer(self, user_offset: int, appended_ms: int, at_ms: int) -> bool:
        """Whether an answer to the user goes: it was given before the request or knew older events.

        user_offset: of the last event that it knew, see `RecordedAnswer`; a worker may have read
                     the user after the request, but before ingest had applied it
        """
        if min(appended_ms, at_ms) <= self.erasure.until_ms:
            return True
        return 0 <= user_offset < self.clicks_offset


class ArchiveUnavailable(Unavailable):
    """The files cannot be read or written now, or one of them is no Parquet file."""


EVERYTHING = Forgotten(Erasure(2**62, 2**62, 2**62))


@cache
def schema(topic: str) -> Any:
    """The pyarrow schema of a topic's files."""
    import pyarrow as pa

    text, integer, boolean, number = pa.string(), pa.int64(), pa.bool_(), pa.float64()
    types = {"event_id": text, "weight": number, "at_ms": integer, "produced_us": integer}
    types |= {"deleted": boolean, "available": boolean, "vector": pa.list_(number)}
    types |= {"categories": pa.list_(text), "tags": pa.list_(text)}
    types |= dict.fromkeys(("forget_until_ms", "keep_after_ms", "users_offset", "ends_ms"), integer)
    types |= {"user_offset": integer, "k": pa.int32(), "session": pa.int32(), "filtered": boolean}
    types |= {"popularity_beta": number, "missing": pa.list_(text)}
    if topic == ANSWERS:
        candidate = [("item_id", text), ("score", number)]
        item = pa.struct([*candidate, ("path", text), ("path_rank", pa.int32())])
        counts = [("path", text), ("found", pa.int32()), ("taken", pa.int32())]
        path = pa.struct([*counts, ("items", pa.list_(pa.struct(candidate)))])
        types |= {"items": pa.list_(item), "paths": pa.list_(path)}
    place = [("partition", pa.int32()), ("offset", integer), ("appended_ms", integer)]
    return pa.schema([*place, *((name, types.get(name, text)) for name in _COLUMNS[topic].split())])


def row(event: Archived) -> tuple[Any, ...]:
    """An event as a row, in the order of its topic's columns."""
    place, found = (event.partition, event.offset, event.appended_ms), event.event
    if isinstance(found, Click):
        rest = _json(found.context), found.impression_id, event.produced_us
        return (*place, *_CLICK_FIELDS(found), *rest)
    if isinstance(found, Item):
        texts, attributes = _ITEM_TEXTS(found), _json(found.attributes)
        return (*place, found.item_id, False, *texts, attributes, *_ITEM_REST(found))
    if isinstance(found, UserProfile):
        return (*place, found.user_id, False, _json(found.attributes), found.at_ms, None)
    if isinstance(found, Merge):
        return (*place, found.user_id, found.merge_into, found.at_ms)
    if isinstance(found, Forget):
        return (*place, event.digest, *_FORGET_FIELDS(found))
    if isinstance(found, RecordedAnswer):
        lists = msgspec.to_builtins((found.items, found.paths, found.missing))
        return (*place, *_ANSWER_FIELDS(found), *lists)
    if event.digest is not None:
        return (*place, None, True, None, None, event.digest)
    return (*place, event.key, True, *(7 * (None,)))


class Archive:
    """The files of one archive. Thread rule: any thread; the only state is the store's connection.

    Raises SettingsError if no file system for `archive_url` is installed, OSError if the store does
    not answer.
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
        """The path of the file with these offsets."""
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
        chosen = (file for file in found if partition in (None, file.partition))
        return sorted(chosen, key=lambda file: (file.partition, file.first, file.last))

    def read(
        self, topic: str, partition: int | None = None, *, first: int = 0
    ) -> Iterator[Archived]:
        """Events from offset `first` on, each once, by partition and offset.

        A record has several events, all in one file, where its topic has a map.
        """
        at = (-1, -1)
        for file in self.files(topic, partition):
            if file.last < first:
                continue
            of_files_before = at
            for event in self.events(file):
                place = (event.partition, event.offset)
                if event.offset >= first and place > of_files_before:
                    at = place
                    yield event

    def events(self, file: ArchiveFile) -> Iterator[Archived]:
        """The events of one file; holds one row group at a time."""
        import pyarrow.parquet as pq

        make = _OF_TOPIC[file.topic]
        with self.fs.open(file.path, "rb") as opened, pq.ParquetFile(opened) as parquet:
            for batch in parquet.iter_batches(batch_size=ROW_GROUP_ROWS):
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    yield make(values[:3], values[3:])

    def ends(self, topic: str) -> dict[int, int]:
        """Partition → the last archived offset. Partitions without files are absent."""
        last: dict[int, int] = {}
        for file in self.files(topic):
            last[file.partition] = max(file.last, last.get(file.partition, -1))
        return last

    def log_id(self, file: ArchiveFile) -> LogId | None:
        """The log that a file was made of; None if the file does not say."""
        text = self._metadata(file).get(_LOG_KEY, b"").decode()
        return LogId(*text.split("|")) if text else None

    def since(self, file: ArchiveFile) -> int | None:
        """The offset from which on a file has every event; None for a file of an older version."""
        text = self._metadata(file).get(_SINCE_KEY, b"")
        return int(text) if text else None

    def note_empty(self, topic: str, partition: int, log_id: LogId, last: int, end: int) -> None:
        """Note that there is no record from offset `last` + 1 to `end`, which is not included.

        last: the last offset of the partition's last file
        """
        folder = f"{self.root}/{self.settings.prefixed(topic)}/{_EMPTY}"
        self.fs.makedirs(folder, exist_ok=True)
        self.fs.pipe_file(f"{folder}/{partition:04d}", f"{log_id}|{last}|{end}".encode())

    def empty(self, topic: str, partition: int, log_id: LogId | None) -> tuple[int, int]:
        """(last, end) of the last `note_empty` of this log; (-1, 0) for none."""
        path = f"{self.root}/{self.settings.prefixed(topic)}/{_EMPTY}/{partition:04d}"
        try:
            found, last, end = self.fs.cat_file(path).decode().rsplit("|", 2)
        except FileNotFoundError:
            return -1, 0
        return (int(last), int(end)) if found == str(log_id) else (-1, 0)

    def lacking(
        self, topic: str, partition: int, first: int, last: int, log_id: LogId | None = None
    ) -> list[tuple[int, int]]:
        """The ranges of offsets within [first, last] that no file has, both ends included.

        Their records were lost before the archive read them, or are not archived yet.
        log_id: offsets at the partition's end that had no record in this log are not lacking
        """
        empty_after, empty_end = self.empty(topic, partition, log_id)
        if empty_after < first < empty_end:
            first = empty_end
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
            if file.last == empty_after:
                at = max(at, empty_end)
            if at > last:
                break
        return [*lacking, (at, last)] if at <= last else lacking

    def note_resync(self, topic: str, now_ms: int) -> None:
        """Note that null records were appended for all that the topic had lost by now."""
        folder = f"{self.root}/{self.settings.prefixed(topic)}"
        self.fs.makedirs(folder, exist_ok=True)
        self.fs.pipe_file(f"{folder}/{_RESYNCED}", str(now_ms).encode())

    def resynced_ms(self, topic: str) -> int:
        """The time of the last `note_resync`; 0 for none."""
        try:
            text = self.fs.cat_file(f"{self.root}/{self.settings.prefixed(topic)}/{_RESYNCED}")
        except FileNotFoundError:
            return 0
        return int(text)

    def version(self, file: ArchiveFile) -> str:
        """Changes when the file is rewritten, as far as the store shows it (etag, size, time)."""
        self.fs.invalidate_cache(file.path.rsplit("/", 1)[0])
        return str(self.fs.ukey(file.path))

    def _metadata(self, file: ArchiveFile) -> dict[bytes, bytes]:
        import pyarrow.parquet as pq

        with self.fs.open(file.path, "rb") as opened:
            return pq.read_metadata(opened).metadata or {}

    def partials(self) -> Path:
        """The local folder of unfinished files; in a local archive, so that a rename suffices."""
        return self._local() / ".partial"

    def lock_path(self) -> Path:
        """The lock of processes that place or rewrite files (`streams.archive.file_placement`)."""
        return self._local() / ".lock"

    def _local(self) -> Path:
        return Path(self.root) if self.is_local else Path(self.settings.data_dir) / "archive"


def metadata_of(log_id: LogId, since: int) -> dict[bytes, bytes]:
    """The metadata in a file's schema. since: see `Archive.since`."""
    return {
        _LOG_KEY: f"{log_id.cluster_id}|{log_id.topic_id}".encode(),
        _SINCE_KEY: str(since).encode(),
    }


def writer(path: Path, arrow_schema: Any) -> Any:
    """A pyarrow ParquetWriter with the options of the archive: equal rows make equal bytes."""
    import pyarrow.parquet as pq

    return pq.ParquetWriter(
        path, arrow_schema, compression="zstd", compression_level=3, version="2.6"
    )


def _json(attributes: object) -> str | None:
    return None if attributes is None else msgspec.json.encode(attributes).decode()


def _attributes(text: str | None) -> Any:
    return None if text is None else msgspec.json.decode(text)


def _click(place: Place, values: Any) -> Archived:
    event_id, user, item, at_ms, kind, weight, context, impression, produced_us = values
    event = Click(
        user_id=user,
        item_id=item,
        at_ms=at_ms,
        kind=kind,
        event_id=event_id,
        weight=weight,
        context=_attributes(context),
        impression_id=impression,
    )
    return Archived(*place, user, event, produced_us)


def _item(place: Place, values: Any) -> Archived:
    item, deleted, title, categories, tags, attributes, available, at_ms, vector = values
    if deleted:
        return Archived(*place, item, None)
    event = Item(
        item_id=item,
        title=title,
        categories=categories,
        tags=tags,
        attributes=_attributes(attributes),
        available=available,
        at_ms=at_ms,
        vector=vector,
    )
    return Archived(*place, item, event)


def _profile(place: Place, values: Any) -> Archived:
    user, deleted, attributes, at_ms, forgotten = values
    if deleted:
        return Archived(*place, None, None, digest=forgotten)
    event = UserProfile(user_id=user, attributes=_attributes(attributes), at_ms=at_ms)
    return Archived(*place, user, event)


def _merge(place: Place, values: Any) -> Archived:
    user, into, at_ms = values
    return Archived(*place, user, Merge(user_id=user, merge_into=into or "", at_ms=at_ms))


def _forget(place: Place, values: Any) -> Archived:
    hashed, until_ms, keep_after_ms, users_offset, ends_ms = values
    event = Forget(
        user_id="",
        forget_until_ms=until_ms,
        keep_after_ms=keep_after_ms,
        users_offset=users_offset,
        ends_ms=ends_ms,
    )
    return Archived(*place, None, event, digest=hashed)


def _answer(place: Place, values: Any) -> Archived:
    fields = dict(zip(_COLUMNS[ANSWERS].split(), values, strict=True))
    answer = msgspec.convert(fields, RecordedAnswer)
    return Archived(*place, answer.user_id, answer)


_OF_TOPIC: dict[str, Callable[[Place, Any], Archived]] = {
    CLICKS: _click,
    ITEMS: _item,
    USERS: _profile,
    MERGES: _merge,
    FORGETS: _forget,
    ANSWERS: _answer,
}
