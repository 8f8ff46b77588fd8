"""Delete what the compacted topics no longer have: after a pause that lost delete records.

Compaction removes all records of a key that was deleted, and the delete record too after
`delete.retention.ms`. A state that is older may hold items and profiles that the topic no longer
has. For each of them a null record is appended to the topic. Ingest and the archive then delete it
as they delete any other.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from eddyline import generations
from eddyline.archive import Archive, ArchiveUnavailable
from eddyline.errors import Rejected, SettingsError
from eddyline.kafka import producers, reading, topics
from eddyline.kafka.topics import ITEMS, USERS
from eddyline.schema import validation
from eddyline.schema.id_form import key_in_form
from eddyline.schema.item_record import decode_record
from eddyline.schema.partitioning import user_slot
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Fence
from embeddings.bundle import bundle as bundles
from streams.fences import sources
from streams.operations import retention_gaps

# Records that were sent and not confirmed yet.
_UNCONFIRMED_MAX = 1_000


@dataclass(frozen=True, slots=True)
class ResyncReport:
    """How many null records were appended for items and for users."""

    items: int
    users: int


def run(settings: Settings) -> ResyncReport:
    """Append the null records, and note that the state has all deletes of before this call.

    Searched are Redis, the item vectors and the bundle of the active generation, and the archive. A
    record that is sent under the same key within this call may be deleted: send it again.
    Raises SettingsError for topics with a map, Unavailable, StoreRefused, BundleError, LogMismatch,
    and EddylineError while an ingest runs.
    """
    for name in (ITEMS, USERS):
        if map_name := getattr(settings, f"{name}_map"):
            raise SettingsError(
                f"{name}_map = {map_name!r}: the producer of {settings.prefixed(name)} has to send "
                "the deletes that are missing; resync writes to topics without a map only"
            )
    with retention_gaps.open_store(settings) as store:
        begun_ms = producers.now_ms()
        archive = Archive(settings) if importlib.util.find_spec("pyarrow") else None
        try:
            items = _known_items(settings, store) | _archived(archive, ITEMS)
            users = _archived(archive, USERS).union(
                *(store.user_ids(user_slot(p), "p") for p in range(settings.clicks_partitions))
            )
            report = ResyncReport(_delete(settings, ITEMS, items), _delete(settings, USERS, users))
            if archive is not None:
                for name in (ITEMS, USERS):
                    archive.note_resync(name, begun_ms)
        except OSError as error:
            url = "" if archive is None else archive.url
            raise ArchiveUnavailable(f"archive at {url}: {error}") from None
        _renew_marks(settings, store, begun_ms)
        return report


def _delete(settings: Settings, name: str, known: set[str]) -> int:
    """Append a null record for each of these ids that the topic does not have; how many."""
    starts = topics.end_offsets(settings, name)
    lost = known - _live(settings, name, None, set())
    # What was sent while the topic was read.
    lost -= _live(settings, name, starts, set())
    send = producers.send_delete if name == ITEMS else producers.send_forget
    producer, pending = producers.make_producer(settings), []
    try:
        for key in sorted(lost):
            pending.append(send(producer, settings, key))
            if len(pending) >= _UNCONFIRMED_MAX:
                producers.sent_to(pending[-1], settings)
                pending = pending[-1:]
        producer.flush(timeout=settings.kafka_timeout_ms / 1000)
        for future in pending:
            producers.sent_to(future, settings)
    finally:
        producer.close(timeout=1)
    return len(lost)


def _live(settings: Settings, name: str, starts: dict[int, int] | None, live: set[str]) -> set[str]:
    """The ids whose last record in their own partition is no delete.

    A stray record does not count: compaction keeps it although its item was deleted since.
    """
    for record in reading.read(settings, name, starts):
        for key, found, own in _changes(settings, name, record):
            if own:
                (live.discard if found is None else live.add)(key)
    return live


def _changes(settings: Settings, name: str, record: Any) -> Sequence[tuple[str, Any, bool]]:
    """(id, what it is; None deletes it, whether it lies in its partition) of each change.

    A record that ingest refuses shows that its key is there.
    """
    try:
        if name == ITEMS:
            return validation.item_changes(settings, record)
        return validation.profiles(settings, record)
    except Rejected:
        key = key_in_form(record.key, settings.id_form)
        return [(key.decode("utf-8", "replace"), record.value, True)]


def _known_items(settings: Settings, store: RedisStore) -> set[str]:
    """Items that are not deleted in Redis, or that workers of the active generation may serve."""
    manifest = generations.active_generation(settings)
    found = set(bundles.recorded(settings, manifest).item_ids)
    vectors = topics.item_vectors(manifest.generation)
    for record in reading.read(settings, vectors):
        with suppress(Rejected):
            item = decode_record(record.key or b"", record.value or b"")
            (found.discard if item.retired else found.add)(item.item_id)
    return found | store.live_item_ids()


def _archived(archive: Archive | None, name: str) -> set[str]:
    """The ids that the archive has and does not know to be deleted."""
    found = set[str]()
    for event in archive.read(name) if archive is not None else ():
        if event.key is not None and event.event is None:
            found.discard(event.key)
        elif event.key is not None:
            found.add(event.key)
    return found


def _renew_marks(settings: Settings, store: RedisStore, now_ms: int) -> None:
    """Note in the fences that no delete of before this time is missing. Raises FenceMoved."""

    def renewed(fence: Fence | None) -> Fence | None:
        if fence is None or fence.mark is None:
            return None
        return replace(fence, mark=replace(fence.mark, appended_ms=now_ms))

    known = generations.known(settings)
    for partition in range(settings.items_partitions):
        for source, slots in sources(settings, ITEMS, partition, known).items():
            for slot, fence in store.fences(source, slots).items():
                if (new := renewed(fence)) is not None:
                    store.write_item_metadata(slot, source, fence, new, {})
    for partition in range(settings.clicks_partitions):
        for source, slots in sources(settings, USERS, partition).items():
            for slot, fence in store.fences(source, slots).items():
                if (new := renewed(fence)) is not None:
                    store.write_profiles(slot, source, fence, new, {}, [])
