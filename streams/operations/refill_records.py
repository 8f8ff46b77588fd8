"""The archive's events as the records that they were; profiles from archive and Kafka as one stream."""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from eddyline import archive as layout
from eddyline.archive import Archive, Archived
from eddyline.kafka import reading, topics
from eddyline.kafka.topics import CLICKS, USERS
from eddyline.schema import events
from eddyline.schema.events import Merge
from eddyline.schema.partitioning import user_slot
from eddyline.settings.loader import Settings
from eddyline.stores import redis_client
from eddyline.stores.state_store import Source, StateStore
from streams.ports import Headers, Record


@dataclass(frozen=True, slots=True)
class Refilled:
    """An event of the archive as the record that it was.

    to_nobody: a merge whose target was forgotten: what it moves goes nowhere
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    to_nobody: bool = False


def as_sent(topic: str, found: Archived) -> Refilled:
    """The record that an archived event was."""
    event, headers = found.event, []
    to_nobody = isinstance(event, Merge) and not event.merge_into
    if isinstance(event, Merge) and to_nobody:
        # Into whom is forgotten with him. The visitor's list ends all the same.
        event = Merge(user_id=event.user_id, merge_into="forgotten since", at_ms=event.at_ms)
    if found.produced_us:
        headers = [("produced_us", str(found.produced_us).encode())]
    value = None if event is None else events.encode(event)
    key = None if found.key is None else found.key.encode()
    return Refilled(
        topic, found.partition, found.offset, found.appended_ms, key, value, headers, to_nobody
    )


class People:
    """Profiles and null records of `users`. Thread rule: one thread."""

    def __init__(self, settings: Settings, archive: Archive, store: StateStore) -> None:
        self._settings, self._archive, self._store = settings, archive, store
        self._begins = topics.beginning_offsets(settings, USERS)

    def of(self, partition: int, first: int, in_kafka: Iterator[Record]) -> Iterator[Record]:
        """Profiles and null records of a partition, by offset: of the archive and of Kafka, each once.

        The archive has what compaction removed, Kafka what is older or newer than the archive.
        """
        last = -1
        archived = self._archived(partition, first)
        for record in heapq.merge(in_kafka, archived, key=lambda r: r.offset):
            if record.offset > last:
                last = record.offset
                yield record

    def in_kafka(self, partition: int, first: int) -> Generator[Record, None, None]:
        """What Kafka has of them, up to its present end; to be closed."""
        begin = max(first, self._begins.get(partition, 0))
        yield from reading.read(self._settings, USERS, {partition: begin})

    def _archived(self, partition: int, first: int) -> Iterator[Record]:
        ids: dict[str, bytes] | None = None
        topic = self._settings.prefixed(USERS)
        for found in self._archive.read(USERS, partition, first=first):
            if found.digest is None:
                yield as_sent(topic, found)
                continue
            if ids is None:
                ids = self._by_digest(partition)
            if found.digest in ids:
                yield Refilled(
                    topic, partition, found.offset, found.appended_ms, ids[found.digest], None
                )

    def next(self, name: str, partition: int) -> int:
        """From which offset on a user slot has not got the records of clicks or users."""
        slot = user_slot(partition)
        fence = self._store.fences(Source(name, partition), [slot])[slot]
        return 0 if fence is None else fence.offset + 1

    def reset(self, partition: int) -> None:
        """Where no click was ever applied, let profiles begin anew, too: they must not be ahead.

        An ingest that was running when Redis was emptied may have read some, before it met the gap.
        """
        if self.next(CLICKS, partition) or not self.next(USERS, partition):
            return
        ns, slot = self._ns, user_slot(partition)
        with redis_client.client(self._settings) as client:
            client.delete(
                f"{ns}fence:{{{slot}}}:{USERS}:{partition}"
            )  # first: what is left is then read anew
            for key in client.scan_iter(match=f"{ns}{{{slot}}}:p:*", count=1_000):
                client.delete(key)

    @property
    def _ns(self) -> str:
        return f"{self._settings.namespace}:" if self._settings.namespace else ""

    def _by_digest(self, partition: int) -> dict[str, bytes]:
        """Users that the store has now, by digest: of who was forgotten the archive knows no more."""
        found: dict[str, bytes] = {}
        with redis_client.client(self._settings) as client:
            for kind in ("h", "p"):
                head = f"{self._ns}{{{user_slot(partition)}}}:{kind}:".encode()
                for key in client.scan_iter(match=head.decode() + "*", count=1_000):
                    found[layout.digest(key.removeprefix(head).decode())] = key.removeprefix(head)
        return found
