"""Deletes end with the retention; what is older than an ended delete stays refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from eddyline.schema.item_key import keys_of
from eddyline.schema.item_record import ItemRecord
from index.factory import HnswIndex
from index.live import READERS_S, LiveIndex
from index.snapshot import format
from index.snapshot.format import Origin
from index.storage.tombstones import Tombstones
from tests.unit.index.item_records import units

D, DAY_US = 8, 86_400_000_000
KEPT_US = 7 * DAY_US
VECTORS = units(4, D, 1)
ORIGIN = Origin(generation="1", dimension=D, bundle_ms=1, log="c/t")


def record(
    name: str, offset: int, day: float, partition: int = 0, *, gone: bool = False
) -> ItemRecord:
    vector = None if gone else VECTORS[offset % len(VECTORS)]
    return ItemRecord(name, partition, offset, 0, int(day * DAY_US), vector)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def index(clock: Clock) -> LiveIndex:
    made = HnswIndex(D)
    made._clock_s = clock
    return made


def ended(index: LiveIndex, clock: Clock) -> int:
    """What ends now, after the last readers have gone."""
    index.end_tombstones(KEPT_US)
    clock.now_s += READERS_S
    return index.end_tombstones(KEPT_US)


def test_a_catalogue_that_turns_over_keeps_the_deletes_of_the_retention_only(
    index: LiveIndex, clock: Clock
) -> None:
    """100 days of 50 new items a day, each deleted a day later."""
    offset = 0
    for day in range(100):
        for n in range(50):
            index.apply([record(f"{day}-{n}", offset, day)])
            offset += 1
            if day:
                index.apply([record(f"{day - 1}-{n}", offset, day, gone=True)])
                offset += 1
        ended(index, clock)
    stats = index.stats()
    assert stats.live == 50 and stats.tombstones == 8 * 50
    contents = index.contents()
    assert len(contents.ids) == 9 * 50, "the snapshot has no more either"
    assert len(index._version.label_of) == len(contents.ids)
    assert len(index._version.ids) <= 11 * 50, "labels are used again"


def test_a_delete_ends_at_the_retention_and_not_before(index: LiveIndex, clock: Clock) -> None:
    index.apply([record("a", 1, 0.0), record("a", 2, 1.0, gone=True)])
    index.apply([record("b", 3, 8.0, partition=1)])
    assert ended(index, clock) == 0 and index.stats().tombstones == 1
    later = ItemRecord("b", 1, 5, 0, int(8 * DAY_US) + 1, VECTORS[0])
    index.apply([later])
    assert ended(index, clock) == 1 and index.stats().tombstones == 0


def test_readers_of_older_versions_are_waited_for(index: LiveIndex, clock: Clock) -> None:
    index.apply([record("a", 1, 0.0), record("b", 2, 20.0)])
    index.apply([record("a", 3, 1.0, gone=True)])
    assert index.end_tombstones(KEPT_US) == 0
    clock.now_s += READERS_S - 0.001
    assert index.end_tombstones(KEPT_US) == 0
    assert index.apply([record("a", 1, 20.0)]) == 0, "until then it refuses older records"
    clock.now_s += 0.001
    assert index.end_tombstones(KEPT_US) == 1


def test_an_older_record_of_an_ended_delete_is_refused_and_a_newer_one_creates_the_item(
    index: LiveIndex, clock: Clock
) -> None:
    index.apply([record("a", 5, 0.0), record("b", 2, 0.0), record("c", 9, 20.0)])
    index.apply([record("a", 7, 1.0, gone=True), record("d", 3, 1.0, partition=1, gone=True)])
    assert ended(index, clock) == 2
    assert index.apply([record("a", 5, 20.0)]) == 0, "read again"
    assert index.apply([record("a", 7, 20.0, gone=True)]) == 0 and index.stats().tombstones == 0
    assert index.apply([record("b", 4, 20.0)]) == 1, "a known item is below the floor"
    assert index.apply([record("new", 4, 20.0, partition=1)]) == 1, "each partition has its own"
    assert index.apply([record("a", 5, 20.0), record("a", 8, 20.0)]) == 1
    assert {hit.item_id for hit in index.query(VECTORS[0], 9)} == {"a", "b", "c", "new"}
    assert index.stats().ignored == 3
    index.apply([record("a", 11, 21.0, gone=True)])
    assert ended(index, clock) == 0, "its own delete is new"


def test_a_snapshot_has_the_floors_and_the_times(
    index: LiveIndex, clock: Clock, tmp_path: Path
) -> None:
    index.apply([record("a", 5, 0.0), record("b", 6, 20.0), record("e", 7, 20.0)])
    index.apply([record("a", 8, 1.0, gone=True)])
    assert ended(index, clock) == 1
    index.apply([record("e", 9, 19.0, gone=True)])
    format.write(tmp_path / "x", index.contents(), ORIGIN, {0: 4}, 1)
    contents, header = format.load(tmp_path / "x", ORIGIN, 0)
    assert (header.tombstones, header.floors) == (1, {0: 8})
    other = HnswIndex(D)
    other._clock_s = clock
    other.restore(contents)
    assert other.apply([record("a", 5, 20.0)]) == 0 and other.apply([record("e", 7, 20.0)]) == 0
    assert ended(other, clock) == 0
    other.apply([record("b", 10, 26.1)])
    assert ended(other, clock) == 1
    assert other.apply([record("e", 7, 27.0)]) == 0 and other.apply([record("e", 11, 27.0)]) == 1


def test_a_batch_that_fails_gives_its_labels_back(index: LiveIndex, clock: Clock) -> None:
    index.apply([record("a", 1, 0.0), record("b", 2, 20.0)])
    index.apply([record("a", 3, 1.0, gone=True)])
    assert ended(index, clock) == 1

    def fails(*_: object) -> None:
        raise MemoryError

    index._placement.reserve, before = fails, index._placement.reserve  # type: ignore[method-assign,assignment]
    with pytest.raises(MemoryError):
        index.apply([record("n", 4, 20.0), record("m", 5, 20.0)])
    index._placement.reserve = before  # type: ignore[method-assign]
    assert (index._offsets.free_count, len(index._version.ids)) == (1, 2)
    assert index.apply([record("m", 5, 20.0), record("n", 4, 20.0)]) == 2
    assert [hit.item_id for hit in index.query(VECTORS[1], 9)].count("n") == 1
    assert index.describe(["a"]) == [None]
    names = ["a", "b", "m", "n"]
    assert index.find_keys(keys_of(names)) == index.describe(names)


def test_one_call_takes_about_its_limit() -> None:
    import numpy as np

    kept = Tombstones()
    for n in range(10):
        kept.add(np.tile(np.array([n, n, 0, n]), (1_000, 1)))
    assert 2_000 <= len(kept.take(9, 2_000)) <= 6_000
    taken = 0
    while len(rows := kept.take(9, 2_000)):
        taken += len(rows)
    assert sum(map(len, kept.rows())) == 1_000 and 0 < taken < 8_000
