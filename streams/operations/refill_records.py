"""The archive's events as the records they were; profiles of archive and Kafka as one stream."""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import groupby

import msgspec

from eddyline.archive import FORGETS, Archive, Archived
from eddyline.kafka import reading, topics
from eddyline.kafka.topics import CLICKS, USERS
from eddyline.schema import events
from eddyline.schema.answers import RecordedAnswer
from eddyline.schema.erasure import Erasure, digest
from eddyline.schema.events import Forget, Merge
from eddyline.schema.id_form import IdForm, key_in_form
from eddyline.schema.partitioning import user_slot
from eddyline.schema.records import MAPPED, BuiltRecord, Record
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Source
from streams.dead_letters import record_bytes


class ArchivedRecord(BuiltRecord, frozen=True):
    """An event of the archive as the record it was.

    target_forgotten: a merge whose target was forgotten: the moved events are dropped
    forget:           a Forget without the user's id, of which the archive has the `digest`
    """

    target_forgotten: bool = False
    forget: Forget | None = None
    digest: str = ""


def as_sent(topic: str, archived: Archived) -> ArchivedRecord:
    """The record that an archived event was."""
    event, headers = archived.event, [MAPPED]
    assert not isinstance(event, RecordedAnswer)  # those of `answers` alone
    if isinstance(event, Forget):
        place = archived.partition, archived.offset, archived.appended_ms
        hashed = archived.digest or ""
        return ArchivedRecord(topic, *place, None, None, forget=event, digest=hashed)
    target_forgotten = isinstance(event, Merge) and not event.merge_into
    if isinstance(event, Merge) and target_forgotten:
        # The target's id was erased with the target. The visitor's history ends all the same.
        event = Merge(user_id=event.user_id, merge_into="forgotten since", at_ms=event.at_ms)
    if archived.produced_us:
        headers.append(("produced_us", str(archived.produced_us).encode()))
    return ArchivedRecord(
        topic,
        archived.partition,
        archived.offset,
        archived.appended_ms,
        key=None if archived.key is None else archived.key.encode(),
        value=None if event is None else events.encode(event),
        headers=headers,
        target_forgotten=target_forgotten,
    )


def with_ids(
    records: Iterator[Record], ids: dict[str, bytes | None], id_form: IdForm
) -> Iterator[Record]:
    """The records; a Forget gets the user's id where the store or an earlier record has it.

    ids: SHA-256 of every user of a Forget -> the id, None where the store has no such user; gains
         ids of the records
    """
    for record in records:
        if isinstance(record, ArchivedRecord) and record.forget is not None:
            user_id = ids.get(record.digest)
            if user_id is not None:
                forget = msgspec.structs.replace(record.forget, user_id=user_id.decode())
                value = events.encode(forget)
                record = msgspec.structs.replace(record, key=user_id, value=value, forget=None)
        elif ids and record.key is not None:
            key = key_in_form(record.key, id_form)
            hashed = digest(key.decode("utf-8", "replace"))
            if hashed in ids:
                ids[hashed] = key
        yield record


def is_unknown(record: Record) -> bool:
    """Whether this is the Forget of a user whose id is not known."""
    return isinstance(record, ArchivedRecord) and record.forget is not None


def erasures(records: Sequence[Record]) -> dict[str, Erasure]:
    """What is kept of the users of Forgets without ids, by digest."""
    return {
        record.digest: Erasure.of(record.forget)
        for record in records
        if isinstance(record, ArchivedRecord) and record.forget is not None
    }


def batches(
    records: Iterable[Record], records_max: int, bytes_max: float = math.inf
) -> Iterator[list[Record]]:
    """Consecutive records in batches; events of one record, which share its offset, stay together.

    records_max, bytes_max: of a batch, unless one record has more events or bytes
    """
    batch: list[Record] = []
    size = 0
    for _, same in groupby(records, key=lambda record: record.offset):
        found = list(same)
        more = sum(_bytes(record) for record in found)
        if batch and (len(batch) + len(found) > records_max or size + more > bytes_max):
            yield batch
            batch, size = [], 0
        batch += found
        size += more
    if batch:
        yield batch


def _bytes(record: Record) -> int:
    headers = [(name, value or b"") for name, value in record.headers]
    return record_bytes(record.key, record.value, headers)


class ProfileRecords:
    """Profiles and null records of `users`, from the archive and from Kafka.

    Thread rule: one thread.
    """

    def __init__(self, settings: Settings, archive: Archive, store: RedisStore) -> None:
        self._settings = settings
        self._archive = archive
        self._store = store
        self._begins = topics.beginning_offsets(settings, USERS)

    def merged(self, partition: int, first: int, in_kafka: Iterator[Record]) -> Iterator[Record]:
        """The partition's records of both sources from offset `first` on, by offset, each once.

        The archive has what compaction removed, Kafka what is older or newer than the archive.
        """
        last, last_archived = -1, False
        kafka = ((record, False) for record in in_kafka)
        archived = ((record, True) for record in self._archived(partition, first))
        for record, of_archive in heapq.merge(kafka, archived, key=lambda pair: pair[0].offset):
            # The archive has an event of its own for each profile that a map made of a record.
            if record.offset > last or (of_archive and last_archived):
                last, last_archived = record.offset, of_archive
                yield record

    def in_kafka(self, partition: int, first: int) -> Generator[Record, None, None]:
        """Kafka's records of the partition up to its present end.

        The caller closes the generator.
        """
        begin = max(first, self._begins.get(partition, 0))
        yield from reading.read(self._settings, USERS, {partition: begin})

    def next_offset(self, name: str, partition: int) -> int:
        """The offset after the fence of the user slot; 0 where there is no fence."""
        slot = user_slot(partition)
        fence = self._store.fences(Source(name, partition), [slot])[slot]
        return 0 if fence is None else fence.offset + 1

    def reset(self, partition: int) -> None:
        """Delete the partition's profiles where no click was ever applied: profiles must not be
        ahead.

        An ingest that ran when Redis was emptied may have applied some before it met the gap.
        """
        if self.next_offset(CLICKS, partition) or not self.next_offset(USERS, partition):
            return
        self._store.drop_profiles(user_slot(partition), Source(USERS, partition))

    def _archived(self, partition: int, first: int) -> Iterator[Record]:
        ids: dict[str, bytes] | None = None
        topic = self._settings.prefixed(USERS)
        for found in self._archive.read(USERS, partition, first=first):
            if found.digest is None:
                yield as_sent(topic, found)
                continue
            if ids is None:
                ids = self._ids_by_digest(partition)
            if found.digest in ids:
                yield ArchivedRecord(
                    topic,
                    partition,
                    found.offset,
                    found.appended_ms,
                    ids[found.digest],
                    None,
                    headers=[MAPPED],
                )

    def ids_of_forgets(self, partition: int, first: int, last: int) -> dict[str, bytes | None]:
        """The users of the archive's Forgets at these offsets of `clicks`, see `with_ids`."""
        forgets = self._archive.read(FORGETS, partition, first=first)
        digests = {found.digest or "" for found in forgets if found.offset <= last}
        known = self._ids_by_digest(partition) if digests else {}
        return {hashed: known.get(hashed) for hashed in digests}

    def _ids_by_digest(self, partition: int) -> dict[str, bytes]:
        """The store's users by digest: the archive has only digests of forgotten users."""
        slot = user_slot(partition)
        users = self._store.user_ids(slot, "h") | self._store.user_ids(slot, "p")
        return {digest(user): user.encode() for user in users}
