"""Write one partition into files whose boundaries depend on the log alone.

A file ends where the next record was appended in another hour, or where the next offset is in
another run of `archive_file_offsets` offsets. Its rows are the accepted events. So every process
that reads the partition from a file's beginning writes the same file, byte for byte. Incomplete
files are in `.partial` and count for nothing. The merges and the Forgets among a file's records go
into files of their own with the same name, which are placed first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from eddyline import archive as layout
from eddyline.archive import (
    FORGETS,
    HOUR_MS,
    MERGES,
    ROW_GROUP_BYTES,
    ROW_GROUP_ROWS,
    Archive,
    Archived,
    Forgotten,
)
from eddyline.errors import Rejected
from eddyline.kafka.topics import ANSWERS, CLICKS, ITEMS, USERS
from eddyline.schema import answers, events, validation
from eddyline.schema.deduplication import DedupeWindow
from eddyline.schema.erasure import DAY_MS, Erasure, digest, erased_after
from eddyline.schema.events import Forget, ItemPatch, Merge
from eddyline.schema.partitioning import partition_of
from eddyline.schema.records import Record
from eddyline.schema.validation import UserEvent
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId
from streams.archive import erasure, file_placement
from streams.archive.erasure import ForgottenOf, copy_without

log = logging.getLogger(__name__)

_NEVER_MS = 2**62


@dataclass(slots=True)
class ForgottenUsers:
    """The forgotten users of a partition, by digest of their ids; shared by its topics of users.

    Their rows are erased from each file that is completed later; earlier files are rewritten.
    """

    by_digest: dict[str, Forgotten] = field(default_factory=dict)

    def add_null(self, digest: str, forgotten: Forgotten) -> None:
        """Add the user of a null record, unless the user's Forget or a later request is known."""
        known = self.by_digest.get(digest)
        if known is None or known.request < forgotten.request:
            self.by_digest[digest] = forgotten

    def add_forget(self, digest: str, forgotten: Forgotten, appended_ms: int) -> bool:
        """Add the user of a Forget, appended at this time; False where it has no effect.

        A repeated one has none: what stands between the two is of a user who returned. Nor has one
        whose user was forgotten again: the next Forget comes later.
        """
        known = self.by_digest.get(digest)
        if known is not None:
            read = known.clicks_offset >= 0
            if read and forgotten.erasure.repeats(known.erasure, appended_ms):
                return False
            if known.request > forgotten.request:
                return False
        self.by_digest[digest] = forgotten
        return True

    def of(self, user_id: str) -> Forgotten | None:
        """What is removed of the user; None for a user who was not forgotten."""
        return self.by_digest.get(digest(user_id)) if self.by_digest else None

    def drop_ended(self, now_ms: int) -> None:
        """Drop the erasures that ended before this log time."""
        self.by_digest = {d: f for d, f in self.by_digest.items() if f.erasure.ends_ms >= now_ms}


class _OpenFile:
    """A file being written. Full row groups are on disk: memory holds one at most.

    since:         the partition was read without a break from this offset on
    forgotten:     users whose null record or Forget is in the file
    erase_from_ms: files of this time and later may have rows of theirs
    merge_targets: of the merges in it
    """

    def __init__(
        self, archive: Archive, topic: str, log_id: LogId, record: Record, since: int
    ) -> None:
        self.first = self.last = record.offset
        self._hour: int | None = None
        self.see_time(record)
        self.rows = 0
        self.forgotten: dict[str, Forgotten] = {}
        self.erase_from_ms = _NEVER_MS
        self.merge_targets: set[str] = set()
        self.partial = file_placement.partial_path(
            archive, f"{topic}-{record.partition}-{self.first}"
        )
        self._schema = layout.schema(topic).with_metadata(layout.metadata_of(log_id, since))
        self._writer = layout.writer(self.partial, self._schema)
        self._pending: list[tuple[Any, ...]] = []
        self._bytes = 0

    @property
    def hour(self) -> int:
        """Hours since 1970, by its first record with a time stamp; 0 where none has one."""
        return self._hour or 0

    def has_place_for(self, record: Record) -> bool:
        """Whether the record is of the file's hour, or has no time stamp."""
        return record.timestamp < 0 or self._hour in (None, record.timestamp // HOUR_MS)

    def see_time(self, record: Record) -> None:
        """Let the first time stamp decide on the hour."""
        if self._hour is None and record.timestamp >= 0:
            self._hour = record.timestamp // HOUR_MS

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
    forgotten: shared by clicks, users and answers of the partition
    log_id:    the log that is archived
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
        self.log_id = log_id
        self._window = window
        self._forgotten = forgotten
        self._file: _OpenFile | None = None
        self._aside: dict[str, _OpenFile] = {}  # of MERGES and FORGETS

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
                not file.has_place_for(record) or record.offset // run != file.first // run
            ):
                self.complete()
                file = None
            if file is None:
                file = self._file = self._begin(self._topic, record)
            file.see_time(record)
            self.last_read = file.last = record.offset
            for event in self._accept(file, record):
                into = file
                if isinstance(event.event, Merge):
                    into = self._file_aside(MERGES, record)
                    into.merge_targets.add(event.event.merge_into)
                elif isinstance(event.event, Forget):
                    into = self._file_aside(FORGETS, record)
                into.add(layout.row(event), len(record.value or b""))

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
            files, rows = erasure.forget(
                self._archive, file.forgotten, self._partition, file.erase_from_ms
            )
            counts = {"users": len(file.forgotten), "files": files, "rows": rows}
            log.info("users forgotten", extra=counts)
        if self._forgotten.by_digest and self._topic != ITEMS:
            _erase(partial, self._topic, self._forgotten.of)
        if MERGES in self._aside:
            self._complete_merges(file, self._aside.pop(MERGES))
        if FORGETS in self._aside:
            self._complete_forgets(file, self._aside.pop(FORGETS))
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
            # An hour to spare for a broker whose clock was set back.
            self._forgotten.drop_ended(hour_ms - HOUR_MS)
        about = {
            "topic": self._topic,
            "partition": self._partition,
            "first": file.first,
            "last": file.last,
        }
        log.info("archived", extra=about | {"rows": file.rows, "path": path})

    def discard(self) -> None:
        """Drop the incomplete file: the partition's next owner reads its records again."""
        for file in (self._file, *self._aside.values()):
            if file is not None:
                file.discard()
        self._file = None
        self._aside.clear()

    def _begin(self, topic: str, record: Record) -> _OpenFile:
        return _OpenFile(self._archive, topic, self.log_id, record, self.written)

    def _file_aside(self, topic: str, record: Record) -> _OpenFile:
        if topic not in self._aside:
            self._aside[topic] = self._begin(topic, record)
        return self._aside[topic]

    def _complete_forgets(self, clicks: _OpenFile, forgets: _OpenFile) -> None:
        """Place the Forgets among these clicks."""
        partial, hour_ms = forgets.finish(), clicks.hour * HOUR_MS
        path = self._archive.path(FORGETS, hour_ms, self._partition, clicks.first, clicks.last)
        with file_placement.locked(self._archive):
            file_placement.place(self._archive, partial, path)

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

    def _forgotten_targets(self, users: set[str], since_ms: int) -> dict[str, Forgotten]:
        """Which of these users were forgotten, by files of the hour `since_ms` and later."""
        found: dict[str, Forgotten] = {}
        for partition in {partition_of(user, self._settings.clicks_partitions) for user in users}:
            digests = dict(_null_records(self._settings, self._archive, partition, since_ms))
            found |= {user: digests[d] for user in users if (d := digest(user)) in digests}
        return found

    def _accept(self, file: _OpenFile, record: Record) -> list[Archived]:
        """The events as they are archived; none if the record is refused, stray or sent again."""
        settings, partition, at_ms = self._settings, self._partition, record.timestamp
        try:
            if self._topic == CLICKS:
                return self._accept_events(file, record)
            if self._topic == ANSWERS:
                return self._accept_answer(record)
            if self._topic == ITEMS:
                items = validation.item_changes(settings, record)
                read = len(items)
                found = [
                    Archived(partition, record.offset, at_ms, k, one)
                    for k, one, own in items
                    if own and not isinstance(one, ItemPatch)
                ]
            else:
                profiles = validation.profiles(settings, record)
                found = [
                    self._accept_null(file, record, user)
                    if profile is None
                    else Archived(partition, record.offset, at_ms, user, profile)
                    for user, profile, own in profiles
                    if own
                ]
                read = len(profiles)
        except Rejected:
            self.skipped += 1
            return []
        self.skipped += read - len(found)
        self.rows += len(found)
        return found

    def _accept_answer(self, record: Record) -> list[Archived]:
        """Of a record of `answers`. Raises Rejected."""
        answer = answers.decode_answer(record.value, key=events.decode_key(record.key))
        if partition_of(answer.user_id, self._settings.clicks_partitions) != self._partition:
            self.skipped += 1  # nothing of the user is looked for here when the user is forgotten
            return []
        self.rows += 1
        place = self._partition, record.offset, record.timestamp
        return [Archived(*place, answer.user_id, answer)]

    def _accept_events(self, file: _OpenFile, record: Record) -> list[Archived]:
        """Of a record of `clicks`. Raises Rejected."""
        found = []
        origin_ms, stamp = events.origin_ms(record.headers), events.produced_us(record.headers)
        for _, event, own in validation.user_events(self._settings, record):
            counts = own and self._window.accept(event.event_id, record.offset)
            if counts and isinstance(event, Forget):
                found.append(self._accept_forget(file, record, event))
            elif not counts or self._is_late(record, event, origin_ms):
                self.skipped += 1
            else:
                place = self._partition, record.offset, record.timestamp
                found.append(Archived(*place, event.user_id, event, stamp))
        self.rows += len(found)
        return found

    def _accept_forget(self, file: _OpenFile, record: Record, forget: Forget) -> Archived:
        limit, hashed = Forgotten.of(forget, record.offset), digest(forget.user_id)
        known = self._forgotten.by_digest.get(hashed)
        if self._forgotten.add_forget(hashed, limit, record.timestamp):
            file.forgotten[forget.user_id] = limit
            # The null record removes the rows from before it; a clock may have been set back.
            with_null = known is not None and known.request == limit.request
            begin_ms = limit.erasure.until_ms - HOUR_MS if with_null else 0
            file.erase_from_ms = min(file.erase_from_ms, begin_ms)
        event = msgspec.structs.replace(forget, ends_ms=limit.erasure.ends_ms)
        return Archived(
            record.partition, record.offset, record.timestamp, None, event, digest=hashed
        )

    def _is_late(self, record: Record, event: UserEvent, origin_ms: int | None) -> bool:
        """Whether the event is from before its user was forgotten, and arrives after that.

        Events before the Forget are erased when the file is completed.
        """
        limit = self._forgotten.of(event.user_id)
        if limit is None or isinstance(event, Forget):
            return False
        return erased_after(limit.erasure, event.at_ms, record.timestamp, origin_ms)

    def _accept_null(self, file: _OpenFile, record: Record, user_id: str) -> Archived:
        first_ms = events.first_append_ms(record)
        limit = _of_null(self._settings, first_ms, record.offset)
        file.forgotten[user_id], file.erase_from_ms = limit, 0
        hashed = digest(user_id)
        self._forgotten.add_null(hashed, limit)
        return Archived(record.partition, record.offset, first_ms, None, None, digest=hashed)


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
        newest_ms = max((file.hour_ms for file in files), default=0)
        _add_forgotten(settings, archive, partition, newest_ms, last, forgotten[partition])
    position = max(last + 1, begin)
    return PartitionWriter(
        settings, archive, topic, partition, log_id, position, window, forgotten[partition]
    )


def _add_forgotten(
    settings: Settings,
    archive: Archive,
    partition: int,
    newest_ms: int,
    last: int,
    forgotten: ForgottenUsers,
) -> None:
    """Add the users whose Forget is in the files and has not ended, and those of null records
    whose Forget may come.

    newest_ms: hour of the partition's last file of clicks; last: the last offset of that file
    """
    for file in archive.files(FORGETS, partition):
        for found in archive.events(file) if file.last <= last else ():
            if isinstance(found.event, Forget) and found.digest is not None:
                limit = Forgotten.of(found.event, found.offset)
                forgotten.add_forget(found.digest, limit, found.appended_ms)
    forgotten.drop_ended(newest_ms - HOUR_MS)
    # An hour to spare for a broker whose clock was set back.
    for hashed, limit in _null_records(settings, archive, partition, newest_ms - HOUR_MS):
        forgotten.add_null(hashed, limit)


def _null_records(
    settings: Settings, archive: Archive, partition: int, since_ms: int
) -> Iterator[tuple[str, Forgotten]]:
    """(digest, what is removed) of each null record in the files of this hour and later."""
    for file in archive.files(USERS, partition):
        for event in archive.events(file) if file.hour_ms >= since_ms else ():
            if event.digest is not None:
                yield event.digest, _of_null(settings, event.appended_ms, event.offset)


def _of_null(settings: Settings, appended_ms: int, offset: int) -> Forgotten:
    """What a null record removes before its Forget was read."""
    ends_ms = appended_ms + settings.forgotten_kept_d * DAY_MS
    return Forgotten(Erasure(appended_ms, offset, ends_ms))


def _erase(partial: Path, topic: str, forgotten: ForgottenOf) -> None:
    """Erase forgotten users from a file that is not placed yet."""
    kept = partial.with_name(f"{partial.name}-kept")
    copy_without(partial, kept, topic, forgotten)
    kept.replace(partial)
