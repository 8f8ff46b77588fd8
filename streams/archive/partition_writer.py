"""Write one partition into files whose boundaries depend on the log alone.

A file ends where the next record was appended in another hour, or where the next offset is in
another run of `archive_file_offsets` offsets. Its rows are the accepted events. So every process
that reads the partition from a file's beginning writes the same file, byte for byte. Incomplete
files are in `.partial` and count for nothing. The merges among a file's records go into a file of
their own with the same name, which is placed first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
from eddyline.schema.erasure import Erasure, digest, erased_after
from eddyline.schema.events import Click, Forget, Merge
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId
from streams.archive import erasure, file_placement
from streams.archive.erasure import ForgottenOf, copy_without
from streams.ports import Record

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ForgottenUsers:
    """The forgotten users of a partition, by digest of their ids; shared by its clicks and users.

    Their rows are erased from each file that is completed later; earlier files are rewritten.
    """

    by_digest: dict[str, Forgotten] = field(default_factory=dict)

    def add(self, digest: str, forgotten: Forgotten) -> None:
        """Add the user of a null record or of a Forget; the later request counts."""
        known = self.by_digest.get(digest)
        if known is None or (known.appended_ms, known.offset) <= (
            forgotten.appended_ms,
            forgotten.offset,
        ):
            self.by_digest[digest] = forgotten

    def of(self, user_id: str) -> Forgotten | None:
        """Up to which point the user's rows are erased; None for a user who was not forgotten."""
        return self.by_digest.get(digest(user_id)) if self.by_digest else None

    def drop_before(self, appended_ms: int) -> None:
        """Drop null records older than that: events from before them are not expected any more."""
        self.by_digest = {d: f for d, f in self.by_digest.items() if f.appended_ms >= appended_ms}


class _OpenFile:
    """A file being written. Full row groups are on disk: memory holds one at most.

    since:         the partition was read without a break from this offset on
    forgotten:     users whose null record is in the file; merge_targets: of the merges in it
    """

    def __init__(
        self, archive: Archive, topic: str, log_id: LogId, record: Record, since: int
    ) -> None:
        self.first = self.last = record.offset
        self.hour = record.timestamp // HOUR_MS
        self.rows = 0
        self.forgotten: dict[str, Forgotten] = {}
        self.merge_targets: set[str] = set()
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
        """Complete the file; returns its partial path."""
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

    window:    event ids accepted before the position; clicks only
    forgotten: shared by clicks and users of the partition
    written:   everything below this offset is in complete files
    rows:      records accepted; skipped: records refused, stray or sent again
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
        forgotten: ForgottenUsers,
    ) -> None:
        self.written = position
        self.last_read = position - 1
        self.rows = self.skipped = 0
        self._settings = settings
        self._archive = archive
        self._topic = topic
        self._partition = partition
        self._log_id = log_id
        self._window = window
        self._forgotten = forgotten
        self._file: _OpenFile | None = None
        self._merges: _OpenFile | None = None

    def append(self, records: Sequence[Record]) -> None:
        """Write consecutive records, oldest first; completes every file whose end is among them.

        Raises OSError if a file cannot be written; the writer is unusable then.
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
                file.merge_targets.add(event.event.merge_into)
            file.add(layout.row(event), len(record.value or b""))

    def skip_to(self, offset: int) -> None:
        """Continue after records that Kafka no longer has; first completes the open file."""
        self.complete()
        self.written, self.last_read = offset, offset - 1

    def hour_over_ms(self) -> int | None:
        """When the open file's hour ends, milliseconds since 1970; None if no file is open."""
        return None if self._file is None else (self._file.hour + 1) * HOUR_MS

    def complete(self) -> None:
        """Place the open file. Only at a boundary: the caller knows that its last record was read.

        Users forgotten in it are erased from all files first.
        """
        file = self._file
        if file is None:
            return
        partial = file.finish()
        if file.forgotten:
            files, rows = erasure.forget(self._archive, file.forgotten, self._partition)
            counts = {"users": len(file.forgotten), "files": files, "rows": rows}
            log.info("users forgotten", extra=counts)
        if self._forgotten.by_digest and self._topic in (CLICKS, USERS):
            _erase(partial, self._topic, self._forgotten.of)
        if self._merges is not None:
            self._complete_merges(file, self._merges)
        hour_ms = file.hour * HOUR_MS
        path = self._archive.path(self._topic, hour_ms, self._partition, file.first, file.last)
        with file_placement.locked(self._archive):
            if file.forgotten:
                # Again, for merges that were placed since: processes see this file only from here
                # on.
                erasure.forget_merges(self._archive, file.forgotten, lock_held=True)
            file_placement.place(self._archive, partial, path)
        self._file, self.written = None, file.last + 1
        if self._topic == CLICKS:
            self._forgotten.drop_before(hour_ms - _kept_ms(self._settings))
        about = {
            "topic": self._topic,
            "partition": self._partition,
            "first": file.first,
            "last": file.last,
        }
        log.info("archived", extra=about | {"rows": file.rows, "path": path})

    def discard(self) -> None:
        """Drop the incomplete file: the partition's next owner reads its records again."""
        for file in (self._file, self._merges):
            if file is not None:
                file.discard()
        self._file = self._merges = None

    def _begin(self, topic: str, record: Record) -> _OpenFile:
        return _OpenFile(self._archive, topic, self._log_id, record, self.written)

    def _complete_merges(self, clicks: _OpenFile, merges: _OpenFile) -> None:
        """Place the merges among these clicks, without users who were forgotten since.

        The visitor's null record is in this partition; the target's is in the target's partition,
        and in the files of that partition.
        """
        partial = merges.finish()
        _erase(partial, MERGES, self._forgotten.of)
        path = self._archive.path(
            MERGES, clicks.hour * HOUR_MS, self._partition, clicks.first, clicks.last
        )
        with file_placement.locked(self._archive):
            # An hour to spare for a broker whose clock was set back.
            targets = self._forgotten_targets(merges.merge_targets, (clicks.hour - 1) * HOUR_MS)
            _erase(partial, MERGES, targets.get)
            file_placement.place(self._archive, partial, path)
        self._merges = None

    def _forgotten_targets(self, users: set[str], since_ms: int) -> dict[str, Forgotten]:
        """Which of these users were forgotten, by files of the hour `since_ms` and later."""
        found: dict[str, Forgotten] = {}
        for partition in {partition_of(user, self._settings.clicks_partitions) for user in users}:
            digests = dict(_digests(self._archive, partition, since_ms))
            found |= {user: digests[d] for user in users if (d := digest(user)) in digests}
        return found

    def _accept(self, file: _OpenFile, record: Record) -> Archived | None:
        """The event as it is archived; None if the record is refused, stray or sent again."""
        settings, partition, at_ms = self._settings, self._partition, record.timestamp
        try:
            if self._topic == CLICKS:
                event, own = validation.user_event(settings, partition, record.value, at_ms)
                counts = own and self._window.accept(event.event_id, record.offset)
                if counts and isinstance(event, Forget):
                    self._accept_forget(file, record, event)
                if not counts or isinstance(event, Forget) or self._is_late(record, event):
                    self.skipped += 1
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
                    return self._accept_null(file, record, user)
                found = Archived(partition, record.offset, at_ms, user, profile)
        except Rejected:
            self.skipped += 1
            return None
        self.rows += 1
        return found

    def _accept_forget(self, file: _OpenFile, record: Record, forget: Forget) -> None:
        """Take over the boundary of an erasure, and the null record where it was not read.

        The files of `users` hold the null records, so no file holds the Forget.
        """
        limit = Forgotten(
            forget.forget_until_ms, forget.users_offset, record.offset, forget.bound_ms
        )
        known = self._forgotten.of(forget.user_id)
        if known is not None and (known.appended_ms, known.offset) > (
            limit.appended_ms,
            limit.offset,
        ):
            return
        if known is not None and known.clicks_offset >= 0 and known.offset == limit.offset:
            return  # a repeated Forget: what stands between the two is of the new user
        file.forgotten[forget.user_id] = limit
        self._forgotten.add(digest(forget.user_id), limit)

    def _is_late(self, record: Record, event: Click | Merge) -> bool:
        """Whether the event is from before its user was forgotten, and arrives after that."""
        limit = self._forgotten.of(event.user_id)
        if limit is None or record.timestamp <= limit.appended_ms:
            return False
        erasure = Erasure(
            limit.appended_ms, limit.offset, limit.appended_ms + _kept_ms(self._settings)
        )
        origin_ms = events.origin_ms(record.headers)
        return erased_after(erasure, event.at_ms, record.timestamp, origin_ms)

    def _accept_null(self, file: _OpenFile, record: Record, user_id: str) -> Archived:
        limit = Forgotten(record.timestamp, record.offset)
        file.forgotten[user_id] = limit
        hashed = digest(user_id)
        known = self._forgotten.of(user_id)
        if known is None or known.offset != limit.offset:  # else the Forget was read first
            self._forgotten.add(hashed, limit)
        self.rows += 1
        return Archived(
            record.partition, record.offset, record.timestamp, None, None, digest=hashed
        )


def open_partition(
    settings: Settings,
    archive: Archive,
    topic: str,
    partition: int,
    log_id: LogId,
    begin: int,
    forgotten: Mapping[int, ForgottenUsers],
) -> PartitionWriter:
    """A writer that continues at the end of the partition's files.

    begin:     offset of the oldest record that Kafka keeps
    forgotten: by partition; gains the forgotten users of this one
    The window is read from the files, not from the log before the position: which events were
    accepted there depends on earlier ones, back to the log's beginning. The files hold the outcome.
    """
    files = archive.files(topic, partition)
    last = max((file.last for file in files), default=-1)
    if files and last + 1 < begin:
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
        since_ms = max((file.hour_ms for file in files), default=0) - _kept_ms(settings)
        for hashed, limit in _digests(archive, partition, since_ms):
            forgotten[partition].add(hashed, limit)
    position = max(last + 1, begin)
    return PartitionWriter(
        settings, archive, topic, partition, log_id, position, window, forgotten[partition]
    )


def _digests(archive: Archive, partition: int, since_ms: int) -> Iterator[tuple[str, Forgotten]]:
    """(digest, limit) of each user forgotten in the files of `users` of this hour and later."""
    names = ["forgotten_sha256", "appended_ms", "offset"]
    for file in archive.files(USERS, partition):
        if file.hour_ms < since_ms:
            continue
        with archive.fs.open(file.path, "rb") as opened, pq.ParquetFile(opened) as parquet:
            for batch in parquet.iter_batches(columns=names):
                for row in batch.to_pylist():
                    if row["forgotten_sha256"] is not None:
                        yield (
                            row["forgotten_sha256"],
                            Forgotten(row["appended_ms"], row["offset"]),
                        )


def _kept_ms(settings: Settings) -> int:
    """How long an erasure is kept, for events that arrive late; an hour at least."""
    return max(settings.forgotten_kept_d * 24 * HOUR_MS, HOUR_MS)


def _erase(partial: Path, topic: str, forgotten: ForgottenOf) -> None:
    """Erase forgotten users from a file that is not placed yet."""
    kept = partial.with_name(f"{partial.name}-kept")
    copy_without(partial, kept, topic, forgotten)
    kept.replace(partial)
