"""The fence is the position: where reading a partition goes on, and the fences this process expects.

A partition goes on after the lowest of its fences. A fence that was written for another log is never
skipped over: Kafka made anew under an old Redis, or another cluster, raises LogMismatch. So do clicks that
retention removed before they were applied. Compacted topics (items, users) lose nothing that counts: there
the oldest record that is kept is good enough.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from eddyline.errors import FenceMoved, LogMismatch
from eddyline.kafka.topics import CLICKS
from eddyline.stores.state_store import Fence, LogId, Source, StateStore

# No log is so long.
_NO_RECORD_BEYOND = 2**63 - 1


class PartitionFences:
    """The fences of one topic's partitions, as this process last read or wrote them.

    store:      where the fences are
    topic:      the real name of the topic, for messages
    sources_of: partition -> its sources, each with the slots that have a fence of it
    log_id:     asks Kafka which log the topic is now; may raise KafkaUnavailable

    Thread rule: one thread, the one that applies the topic's chunks.
    """

    def __init__(
        self,
        store: StateStore,
        topic: str,
        sources_of: Callable[[int], Mapping[Source, Sequence[str]]],
        log_id: Callable[[], LogId],
    ) -> None:
        self._store = store
        self._topic = topic
        self._sources_of = sources_of
        self._log_id = log_id
        self._log: LogId | None = None
        self._expected: dict[int, dict[tuple[Source, str], Fence | None]] = {}
        self._read: dict[int, int] = {}  # partition -> the last offset that a chunk brought
        self._told: dict[int, int] = {}
        self._again: dict[
            int, int
        ] = {}  # partition -> an offset that is read again when it is opened

    def replay_from(self, partition: int, first: int) -> None:
        """When the partition is opened next, read it from `first` on although its fences are beyond."""
        self._again[partition] = first

    def open(
        self, bounds: Mapping[int, tuple[int, int]], told: Mapping[int, int] | None = None
    ) -> dict[int, int]:
        """Read the fences anew and return where to read on, by partition.

        bounds: partition -> (offset of the oldest record kept, offset the next record will get)
        told:   partition -> what the consumer group committed, see `sent_on`
        Raises LogMismatch (also for clicks that are gone by retention), StoreUnavailable, KafkaUnavailable.
        """
        self._log = self._log_id()
        self._told |= {p: min(end, (told or {}).get(p, 0)) for p, (_, end) in bounds.items()}
        return {
            partition: self._open(partition, begin, end, self._log)
            for partition, (begin, end) in bounds.items()
        }

    def expected(self, source: Source, slot: str) -> Fence | None:
        """The fence that the store must have; None where nothing was ever applied."""
        return self._of(source.partition)[source, slot]

    def lowest(self, partition: int) -> int:
        """The offset up to which every slot has everything; −1 for none."""
        return _lowest(self._of(partition))

    def forwarded_up_to(self, partition: int) -> int:
        """What records up to this offset send on was sent by whoever applied them first; −1 for none.

        Offsets are committed after the effects. Reading such records anew (Redis was emptied, or went back)
        sends nothing again: beyond the event-id window it would count a second time.
        """
        return self._told.get(partition, 0) - 1

    def fence(self, offset: int) -> Fence:
        """The fence that says: everything up to and with `offset`, of the log that was opened."""
        if self._log is None:
            raise LookupError(f"topic {self._topic} has not been opened")
        return Fence(offset, self._log)

    def moved(self, source: Source, slot: str, fence: Fence) -> None:
        """Remember a fence that was just written."""
        self._of(source.partition)[source, slot] = fence

    def find_diverged(self, partitions: Collection[int]) -> list[int]:
        """Those of these partitions whose stored fences are not the expected ones.

        The store went back in time, or another process wrote. A write would be refused; this is for
        partitions that have nothing to write. Raises StoreUnavailable.
        """
        moved = []
        for partition in self._expected.keys() & partitions:
            expected = self._expected[partition]
            for source, slots in self._sources_of(partition).items():
                found = self._store.fences(source, slots)
                if any(expected[source, slot] != found[slot] for slot in slots):
                    moved.append(partition)
                    break
        return moved

    def begin(self, partition: int, first: int, last: int) -> None:
        """Note that a chunk is taken up. Raises FenceMoved where it does not lie after the one before.

        Then the log itself went back: the topic was made anew, for one. `open` says what is the matter.
        """
        before = self._read[partition]
        if first <= before:
            raise FenceMoved(
                f"{self._topic}:{partition}", f"a record after {before}", f"record {first}"
            )
        self._read[partition] = last

    def invalidate(self, partition: int) -> None:
        """Refuse the partition's chunks from here on (FenceMoved), until it is opened anew."""
        self._read[partition] = _NO_RECORD_BEYOND

    def _of(self, partition: int) -> dict[tuple[Source, str], Fence | None]:
        try:
            return self._expected[partition]
        except KeyError:
            raise LookupError(
                f"partition {partition} of {self._topic} has not been opened"
            ) from None

    def _open(self, partition: int, begin: int, end: int, now: LogId) -> int:
        found: dict[tuple[Source, str], Fence | None] = {}
        for source, slots in self._sources_of(partition).items():
            for slot, fence in self._store.fences(source, slots).items():
                self._check(source, slot, fence, end, now)
                found[source, slot] = fence
        self._expected[partition] = found
        lowest = _lowest(found)
        if lowest + 1 < begin and any(source.name == CLICKS for source, _ in found):
            raise self._lost(partition, lowest + 1, begin - 1, begin, applied=lowest >= 0)
        position = max(min(lowest + 1, self._again.pop(partition, lowest + 1)), begin)
        self._read[partition] = position - 1
        return position

    def _lost(
        self, partition: int, first: int, last: int, begin: int, *, applied: bool
    ) -> LogMismatch:
        state = (
            f"the state has everything up to offset {first - 1}"
            if applied
            else "the state has nothing"
        )
        return LogMismatch(
            f"topic {self._topic}, partition {partition}: {state}, but the log begins with offset {begin}: "
            f"Kafka's retention removed offsets {first} to {last} ({last - first + 1:,}) before they were "
            "applied here. Stop every ingest and run `eddyline refill`, which applies them from the archive; "
            "or `eddyline accept-log --skip-lost` to go on without them, as on a first start on an old topic."
        )

    def _check(self, source: Source, slot: str, fence: Fence | None, end: int, now: LogId) -> None:
        if fence is None or (fence.log == now and fence.offset < end):
            return
        at = f"topic {self._topic}, partition {source.partition} (fence of {source.name} in slot {slot})"
        way_out = (
            "If the log is meant to go on as it is now, stop every ingest and run `eddyline accept-log`: it "
            "lets go of the fences of logs that are gone; a new log is then read from its beginning."
        )
        if "@" in source.name:
            way_out = (
                f"Item vectors of generation {source.name.partition('@')[2]} are versioned by the old log: "
                "train and activate a new generation with `eddyline train`."
            )
        if fence.log != now:
            raise LogMismatch(
                f"{at}: the state was written for cluster {fence.log.cluster_id} and topic id "
                f"{fence.log.topic_id}, but this is cluster {now.cluster_id} and topic id "
                f"{now.topic_id}. {way_out}"
            )
        raise LogMismatch(
            f"{at}: the state has everything up to offset {fence.offset}, but the log ends before {end} "
            f"(cluster {now.cluster_id}, topic id {now.topic_id}): Kafka lost records. {way_out}"
        )


def _lowest(fences: Mapping[tuple[Source, str], Fence | None]) -> int:
    return min(-1 if fence is None else fence.offset for fence in fences.values())
