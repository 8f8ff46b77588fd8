"""Any interleaving of item changes, crashes, zombies, lost Redis and compaction ends as the last
changes do.

The oracle is one dictionary. Compared are the metadata, and a replica of the index that takes what
was published in any order, and twice, and restarts from an earlier copy (`test_index_stateful` has
its snapshots).
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from eddyline.errors import FenceMoved, KafkaUnavailable, StoreUnavailable
from eddyline.schema import events
from eddyline.schema.events import Item
from eddyline.schema.item_record import ItemRecord
from eddyline.schema.partitioning import item_slots, partition_of
from index.exact import ExactIndex
from streams.items.handler import ItemHandler
from tests.applying import ingest
from tests.simulation.test_ingest_faults import (
    BASE_MS,
    FAULTS,
    PARTITIONS,
    D,
    Died,
    Outside,
    Rec,
    Unsure,
    make_items,
    make_settings,
)

ITEMS = [f"i{n}" for n in range(6)]
CHANGES = ["new", "new", "unavailable", "delete", "delete", "rubbish"]
KEPT_S = 5
PARTITION = st.integers(0, PARTITIONS - 1)


class ItemsMachine(RuleBasedStateMachine):
    """Two processes at most: the owner, and a zombie that still takes itself for it."""

    @initialize(slots=st.sampled_from([1, 3]))
    def begin(self, slots: int) -> None:
        self.settings = make_settings(item_slots=slots, deleted_items_kept_s=KEPT_S)
        self.store, self.outside = Unsure(), Outside(self.settings)
        self.logs: dict[int, list[Rec]] = {p: [] for p in range(PARTITIONS)}
        self.ends = dict.fromkeys(self.logs, 0)
        self.last: dict[str, Rec] = {}
        self.old: Any = self.store.snapshot()
        self.owner = self.zombie = make_items(self.settings, self.store, self.outside)
        self.index, self.taken = ExactIndex(D), 0
        self.saved = self.passed_ms = 0

    @rule(
        changes=st.lists(
            st.tuples(st.sampled_from(ITEMS), st.sampled_from(CHANGES)), min_size=1, max_size=12
        )
    )
    def produce(self, changes: list[tuple[str, str]]) -> None:
        for item_id, change in changes:
            partition = partition_of(item_id, PARTITIONS)
            offset = self.ends[partition]
            self.ends[partition] += 1
            item = Item(
                item_id=item_id, title="t" * (offset % 50), available=change != "unavailable"
            )
            value = {"delete": None, "rubbish": b"rubbish"}.get(change, events.encode(item))
            # Without a key: under one, compaction would keep the rubbish and drop the item.
            key = None if change == "rubbish" else item_id.encode()
            record = Rec("items", partition, offset, BASE_MS + self.passed_ms + offset, key, value)
            self.logs[partition].append(record)
            if change != "rubbish":
                self.last[item_id] = record

    @rule(partition=PARTITION)
    def compact(self, partition: int) -> None:
        """The cleaner keeps the last record of a key, and everything at the end of the log."""
        log = self.logs[partition]
        newest = {record.key: record.offset for record in log}
        self.logs[partition] = [r for r in log[:-3] if newest[r.key] == r.offset] + log[-3:]

    @rule(
        partition=PARTITION,
        size=st.integers(1, 8),
        zombie=st.booleans(),
        faults=st.lists(st.sampled_from(FAULTS), max_size=2),
        away=st.booleans(),
    )
    def ingest(
        self, partition: int, size: int, zombie: bool, faults: list[str], away: bool
    ) -> None:
        self.store.faults, self.outside.away = list(faults), int(away)
        process = self.zombie if zombie else self.owner
        try:
            self._turn(process, partition, size)
        except (FenceMoved, StoreUnavailable, KafkaUnavailable):
            process.fences.open({partition: (0, self.ends[partition])})
        except Died:
            self.zombie, self.owner = (
                self.owner,
                make_items(self.settings, self.store, self.outside),
            )
        self.store.faults, self.outside.away = [], 0

    @rule()
    def a_deleted_item_ends(self) -> None:
        self.passed_ms += 1_000 * KEPT_S

    @rule()
    def remove_deleted_items(self) -> None:
        slots = item_slots(self.settings.item_slots)
        assert sum(self.store.remove_deleted_items(slots, PARTITIONS, 0)) >= 0

    @rule()
    def another_owner(self) -> None:
        self.zombie, self.owner = self.owner, make_items(self.settings, self.store, self.outside)

    @rule()
    def copy_redis(self) -> None:
        self.old = self.store.snapshot()

    @rule()
    def redis_goes_back(self) -> None:
        self.store.restore(self.old)

    @rule(upto=st.integers(0, 40), order=st.randoms(use_true_random=False))
    def replica_reads(self, upto: int, order: Any) -> None:
        """A batch in any order, with some of it twice: the highest version wins."""
        batch = self.outside.published[self.taken : self.taken + upto]
        self.taken += len(batch)
        batch += batch[: len(batch) // 2]
        order.shuffle(batch)
        self.index.apply(batch)

    @rule()
    def replica_saves(self) -> None:
        self.saved = self.taken

    @rule()
    def replica_starts_from_its_copy(self) -> None:
        self.index, self.taken = ExactIndex(D), self.saved
        self.index.apply(self.outside.published[: self.taken])

    @invariant()
    def no_deleted_item_is_found_once_its_delete_was_read(self) -> None:
        if not hasattr(self, "index"):
            return
        versions: dict[str, ItemRecord] = {}
        for record in self.outside.published[: self.taken]:
            if record.item_id not in versions or record.offset >= versions[record.item_id].offset:
                versions[record.item_id] = record
        assert self._found() == {item for item, record in versions.items() if not record.retired}

    def teardown(self) -> None:
        """Everything is applied in the end, whatever came before."""
        if not hasattr(self, "index"):
            return
        for partition in self.logs:
            for _ in range(3):  # a zombie's write may send the owner back
                self.owner.fences.open({partition: (0, self.ends[partition])})
                while self._turn(self.owner, partition, 8):
                    pass
        metadata = self.store.read_item_metadata(ITEMS, self.settings.item_slots)
        assert set(metadata) <= set(self.last)
        for item_id, record in self.last.items():
            if item_id not in metadata:
                ends_ms = record.timestamp + 1_000 * KEPT_S
                assert record.value is None and ends_ms < self.logs[record.partition][-1].timestamp
                continue
            assert metadata[item_id].offset == record.offset
            assert metadata[item_id].body == (record.value or b"")
        self.index.apply(self.outside.published[self.taken :])
        alive = {i for i, r in self.last.items() if r.value and b'"available":true' in r.value}
        assert self._found() == alive
        self.index = ExactIndex(D)
        anyhow = self.outside.published * 2
        random.Random(len(anyhow)).shuffle(anyhow)
        for start in range(0, len(anyhow), 5):
            self.index.apply(anyhow[start : start + 5])
        assert self._found() == alive

    def _turn(self, process: ItemHandler, partition: int, size: int) -> bool:
        try:
            at = process.fences.lowest(partition) + 1
        except LookupError:
            process.fences.open({partition: (0, self.ends[partition])})
            at = process.fences.lowest(partition) + 1
        records = [r for r in self.logs[partition] if r.offset >= at][:size]
        if records:
            ingest(process, partition, records)
        return bool(records)

    def _found(self) -> set[str]:
        hits = self.index.query(np.ones(D, np.float32) / np.float32(D**0.5), len(ITEMS) + 3)
        return {hit.item_id for hit in hits}


ItemsMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestItems = ItemsMachine.TestCase
