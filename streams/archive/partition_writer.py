"""One partition into files whose boundaries the log alone decides.

A file ends where the next record was appended in another hour, or where the next offset is in another run of
`archive_file_offsets` offsets. Its rows are the accepted events. So whoever reads the partition from a file's
beginning writes the same file, byte for byte. What is not complete lies in `.partial` and counts for nothing.
The merges among a file's records go into a file of their own under the same name, which gets its place first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from eddyline import archive as layout
from eddyline.archive import (
    HOUR_MS,
    MERGES,
    ROW_GROUP_BYTES,
    ROW_GROUP_ROWS,
    Archive,
    Archived,
    Forgotten,
)
from eddyline.errors import Rejected
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema import events, validation
from eddyline.schema.deduplication import DedupeWindow
from eddyline.schema.events import Forget, Merge
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId
from streams.archive import file_placement
from streams.archive.erasure import without
from streams.ports import Record

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Forgetting:
    """Who of one partition was forgotten, shared by its clicks and users. By digest: ids are not kept.

    Removed from a file that is written after the null record was read; files before are rewritten.
    """

    by_digest: dict[str, Forgotten] = field(default_factory=dict)

    def note(self, digest: str, forgotten: Forgotten) -> None:
        """Remember a null record."""
        self.by_digest[digest] = forgotten

    def of(self, user_id: str) -> Forgotten | None:
        """Up to where the user's rows go."""
        return self.by_digest.get(layout.digest(user_id))

    def drop_before(self, appended_ms: int) -> None:
        """Let go of null records older than any click that is still to be written."""
        self.by_digest = {d: f for d, f in self.by_digest.items() if f.appended_ms >= appended_ms}


class _OpenFile:
    """Rows of one file to be. Full row groups are on disk already: memory holds one at most.

    since: from which offset on the partition was read without a break
    gone:  who is forgotten by a record in it; into: who visitors became by a merge in it
    """

    def __init__(
        self, archive: Archive, topic: str, log_id: LogId, record: Record, since: int
    ) -> None:
        self.first = self.last = record.offset
        self.hour = record.timestamp // HOUR_MS
        self.rows = 0
        self.gone: dict[str, Forgotten] = {}
        self.into: set[str] = set()
        self.partial = file_placement.partial_path(
            archive, f"{topic}-{record.partition}-{self.first}"
        )
        self._schema = layout.schema(topic).with_metadata(layout.metadata_of(log_id, since))
        self._writer = layout.writer(self.partial, self._schema)
        self._pending: list[tuple[Any, ...]] = []
        self._bytes = 0

    def add(self, row: tuple[Any, ...], size: int) -> None:
        self._pending.append(row)
        self._bytes += size
        if len(self._pending) >= ROW_GROUP_ROWS or self._bytes >= ROW_GROUP_BYTES:
            self._flush()

    def finish(self) -> Path:
        """The complete file, still in its partial place."""
        self._flush()
        self._writer.close()
        return self.partial

    def discard(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            log.info("a partial file could not be closed", extra={"reason": str(error)})
        self.partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._pending:
            return
        columns = zip(*self._pending, strict=True)
        arrays = [
            pa.array(column, kind) for column, kind in zip(columns, self._schema.types, strict=True)
        ]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
        self.rows += len(self._pending)
        self._pending, self._bytes = [], 0


class PartitionWriter:
    """Archives one partition from `position` on. Thread rule: one thread.

    window:     what was accepted before the position; clicks only
    forgetting: shared by clicks and users of the partition
    written:    everything below this offset is in complete files
    rows, left_out: records accepted; refused, stray or sent again
    """

    def __init__(
        self,
        settings: Settings,
        archive: Archive,
        topic: str,
        partition: int,
        log_id: LogId,
        position: int,
        window: DedupeWindow,
        forgetting: Forgetting,
    ) -> None:
        self.written = position
        self.last_read = position - 1
        self.rows = self.left_out = 0
        self._settings = settings
        self._archive = archive
        self._topic = topic
        self._partition = partition
        self._log_id = log_id
        self._window = window
        self._forgetting = forgetting
        self._file: _OpenFile | None = None
        self._merges: _OpenFile | None = None

    def append(self, records: Sequence[Record]) -> None:
        """Take consecutive records, oldest first; completes every file whose end is among them.

        Raises OSError where a file cannot be written; then this object is of no more use.
        """
        run = self._settings.archive_file_offsets
        for record in records:
            if record.offset <= self.last_read:
                continue
            file = self._file
            if file is not None and (
                record.timestamp // HOUR_MS != file.hour
                or record.offset // run != file.first // run
            ):
                self.complete()
                file = None
            if file is None:
                file = self._file = self._begin(self._topic, record)
            self.last_read = file.last = record.offset
            event = self._accept(file, record)
            if event is None:
                continue
            if isinstance(event.event, Merge):
                file = self._merges = self._merges or self._begin(MERGES, record)
                file.into.add(event.event.merge_into)
            file.add(layout.row(event), len(record.value or b""))

    def skip_to(self, offset: int) -> None:
        """Go on behind records that Kafka no longer has. What was read before them gets its place now."""
        self.complete()
        self.written, self.last_read = offset, offset - 1

    def hour_over_ms(self) -> int | None:
        """When the open file's hour ends, milliseconds since 1970; None where no file is open."""
        return None if self._file is None else (self._file.hour + 1) * HOUR_MS

    def complete(self) -> None:
        """Give the open file its place. Only at a boundary: the caller knows that its last record is in.

        Users who were forgotten in it are taken out of all files first: once it is there, they are gone.
        """
        file = self._file
        if file is None:
            return
        partial = file.finish()
        if file.gone:
            done, rows = file_placement.forget(self._archive, file.gone, self._partition)
            log.info(
                "users forgotten", extra={"users": len(file.gone), "files": done, "rows": rows}
            )
        if self._forgetting.by_digest and self._topic in (CLICKS, USERS):
            _leave_out(partial, self._topic, self._forgetting.of)
        if self._merges is not None:
            self._complete_merges(file, self._merges)
        hour_ms = file.hour * HOUR_MS
        path = self._archive.path(self._topic, hour_ms, self._partition, file.first, file.last)
        with file_placement.locked(self._archive):
            if file.gone:  # once more: a process that completes merges sees this file from here on
                file_placement.forget_merges(self._archive, file.gone, held=True)
            file_placement.put(self._archive, partial, path)
        self._file, self.written = None, file.last + 1
        if self._topic == CLICKS:
            # An hour to spare for a broker whose clock was set back.
            self._forgetting.drop_before(hour_ms - HOUR_MS)
        about = {
            "topic": self._topic,
            "partition": self._partition,
            "first": file.first,
            "last": file.last,
        }
        log.info("archived", extra=about | {"rows": file.rows, "path": path})

    def discard(self) -> None:
        """Let go of what is not complete: it is read again by whoever owns the partition next."""
        for file in (self._file, self._merges):
            if file is not None:
                file.discard()
        self._file = self._merges = None

    def _begin(self, topic: str, record: Record) -> _OpenFile:
        return _OpenFile(self._archive, topic, self._log_id, record, self.written)

    def _complete_merges(self, clicks: _OpenFile, merges: _OpenFile) -> None:
        """Give the merges among these clicks their place, without the users who were forgotten since.

        A visitor's null record lies in his own partition; that of the user in the user's, whose files say it.
        """
        partial = merges.finish()
        _leave_out(partial, MERGES, self._forgetting.of)
        path = self._archive.path(
            MERGES, clicks.hour * HOUR_MS, self._partition, clicks.first, clicks.last
        )
        with file_placement.locked(self._archive):
            # An hour to spare for a broker whose clock was set back.
            gone = self._forgotten_elsewhere(merges.into, (clicks.hour - 1) * HOUR_MS)
            _leave_out(partial, MERGES, gone.get)
            file_placement.put(self._archive, partial, path)
        self._merges = None

    def _forgotten_elsewhere(self, users: set[str], since_ms: int) -> dict[str, Forgotten]:
        """Which of these users were forgotten, by the files that are there. since_ms: their earliest hour."""
        found: dict[str, Forgotten] = {}
        for partition in {partition_of(user, self._settings.clicks_partitions) for user in users}:
            digests = dict(_digests(self._archive, partition, since_ms))
            found |= {user: digests[d] for user in users if (d := layout.digest(user)) in digests}
        return found

    def _accept(self, file: _OpenFile, record: Record) -> Archived | None:
        """The event as it is archived; None where the record is refused, stray or a re-send."""
        settings, partition, at_ms = self._settings, self._partition, record.timestamp
        try:
            if self._topic == CLICKS:
                event, own = validation.user_event(settings, partition, record.value, at_ms)
                counts = own and self._window.accept(event.event_id, record.offset)
                if not counts or isinstance(
                    event, Forget
                ):  # files of `users` say who was forgotten
                    self.left_out += 1
                    return None
                stamp = events.produced_us(record.headers)
                found = Archived(partition, record.offset, at_ms, event.user_id, event, stamp)
            elif self._topic == ITEMS:
                key, item = validation.item(settings, partition, record.key, record.value, at_ms)
                found = Archived(partition, record.offset, at_ms, key, item)
            else:
                user, profile = validation.profile(
                    settings, partition, record.key, record.value, at_ms
                )
                if profile is None:
                    return self._forgotten(file, record, user)
                found = Archived(partition, record.offset, at_ms, user, profile)
        except Rejected:
            self.left_out += 1
            return None
        self.rows += 1
        return found

    def _forgotten(self, file: _OpenFile, record: Record, user_id: str) -> Archived:
        limit = Forgotten(record.timestamp, record.offset)
        file.gone[user_id] = limit
        digest = layout.digest(user_id)
        self._forgetting.note(digest, limit)
        self.rows += 1
        return Archived(
            record.partition, record.offset, record.timestamp, None, None, digest=digest
        )


def open_partition(
    settings: Settings,
    archive: Archive,
    topic: str,
    partition: int,
    log_id: LogId,
    begin: int,
    forgetting: Mapping[int, Forgetting],
) -> PartitionWriter:
    """Where the files of a partition end, and what must be known to go on: window and forgotten users.

    begin: offset of the oldest record that Kafka keeps
    The window is read from the files, not from the log before the position: which events were accepted there
    depends on what lay before those, and so on to the log's beginning. The files have the answer.
    """
    mine = archive.files(topic, partition)
    last = max((file.last for file in mine), default=-1)
    if mine and last + 1 < begin:
        log.error(
            "records between the archive's end and the log's beginning are gone by retention",
            extra={"topic": topic, "partition": partition, "records": begin - last - 1},
        )
    window = DedupeWindow(settings.dedupe_window_events)
    if topic == CLICKS:
        floor = max(0, last + 1 - settings.dedupe_window_events)
        for event in archive.read(CLICKS, partition, first=floor):
            if event.event is not None:
                window.accept(getattr(event.event, "event_id", None), event.offset)
        since_ms = max((file.hour_ms for file in mine), default=0) - HOUR_MS
        for found, limit in _digests(archive, partition, since_ms):
            forgetting[partition].note(found, limit)
    position = max(last + 1, begin)
    return PartitionWriter(
        settings, archive, topic, partition, log_id, position, window, forgetting[partition]
    )


def _digests(archive: Archive, partition: int, since_ms: int) -> Iterator[tuple[str, Forgotten]]:
    """Who was forgotten by the files of `users` of this hour and later: (digest, up to where his rows go)."""
    for file in archive.files(USERS, partition):
        if file.hour_ms >= since_ms:
            for event in archive.events(file):
                if event.digest is not None:
                    yield event.digest, Forgotten(event.appended_ms, event.offset)


def _leave_out(partial: Path, topic: str, forgotten: Callable[[str], Forgotten | None]) -> None:
    """Take forgotten users out of a file that has no place yet."""
    kept = partial.with_name(f"{partial.name}-kept")
    without(partial, kept, topic, forgotten)
    kept.replace(partial)
