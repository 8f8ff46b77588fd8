"""A batch that breaks off: no reader ever sees what it wrote, and the index goes on."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from eddyline.schema.item_record import ItemRecord
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.storage import item_offsets
from index.storage.item_offsets import ItemOffsets
from index.writing.placement import Placement
from tests.unit.index.item_records import records, units

D, N = 8, 40


class Index:
    """An index and its oracle, filled alike."""

    def __init__(self) -> None:
        self.live, self.oracle = HnswIndex(D, exact_below=5, fresh_max=10**6), ExactIndex(D)
        self.write(records(units(N, D, 1)))
        assert self.live.rebuild()

    def write(self, batch: list[ItemRecord]) -> None:
        assert self.live.apply(batch) == self.oracle.apply(batch)
        self.check()

    def check(self) -> None:
        for query in units(5, D, 9):
            assert self.live.query(query, 3 * N) == self.oracle.query(query, 3 * N)
        contents, stats = self.live.contents(), self.live.stats()
        assert len(contents.ids) == stats.live + stats.tombstones
        assert sorted(contents.ids) == sorted(self.oracle._records)


@pytest.fixture
def index() -> Iterator[Index]:
    made = Index()
    yield made
    made.live.close()


def test_a_reader_that_met_a_row_of_the_batch_still_finds_what_it_replaced(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader stops between its look at `row_of` and its look at the row that was replaced."""
    names = [f"i{n}" for n in range(10)]
    version = index.live._version
    labels = [version.label_of[name] for name in names]
    before = version.table.gather(version.row_of[labels])
    met: list[np.ndarray] = []

    def broken(*arguments: Any) -> Any:
        if threading.get_ident() != mine:  # a rebuild in the background
            return original(*arguments)
        met.append(segment.rows.copy())
        raise MemoryError("no room")

    mine, original = threading.get_ident(), Placement.live_entries
    segment = version.segments[0]
    turned = units(10, D, 2)
    first = [ItemRecord(name, 0, 100, 0, 0, v) for name, v in zip(names, turned, strict=True)]
    # A turn of nothing: its entry stays in the segment and names the new row.
    first += [ItemRecord("i20", 0, 100, 0, 0, index.oracle.vectors_of(["i20"])[0])]
    with monkeypatch.context() as patch:
        patch.setattr(Placement, "live_entries", broken)
        with pytest.raises(MemoryError):
            index.live.apply(first)
    index.check()
    assert (met[0] >= version.used).any(), "the reader met no row of the batch"
    # Others write now, over and over.
    for step in range(3):
        other = units(15, D, 10 + step)
        index.write([ItemRecord(f"j{n}", 0, 200 + step, 0, 0, v) for n, v in enumerate(other)])
    found = version.names[version.table.labels[version.living(met[0])]]
    assert sorted(found) == sorted(f"i{n}" for n in range(N))
    np.testing.assert_array_equal(version.table.gather(version.rows_of(names)), before)


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_failure_while_new_items_get_labels(
    index: Index, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """The third new id, or the room for the offsets of the new ids, cannot be allocated."""
    new = [ItemRecord(f"new{n}", 0, 100 + n, 0, 0, v) for n, v in enumerate(units(2_000, D, 3))]

    class Short(dict[str, int]):
        left = fails_at

        def __setitem__(self, key: str, value: int) -> None:
            Short.left -= 1
            if not Short.left:
                raise MemoryError("no room")
            super().__setitem__(key, value)

    offsets = index.live._offsets
    label_of = offsets.label_of
    offsets.label_of = short = Short(label_of)
    with pytest.raises(MemoryError):
        index.live.apply(new[:10])
    assert len(offsets.ids) == N and set(short) == set(label_of)
    offsets.label_of = label_of
    index.check()
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise MemoryError("no room")

        patch.setattr(item_offsets.np, "concatenate", full)
        with pytest.raises(MemoryError):
            index.live.apply(new)
    index.check()
    index.write(new[:30])
    index.write(new)


def test_a_failure_before_any_label_changes_no_older_item(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The undo belongs to the batch that fails, not to the one before it."""
    index.write([ItemRecord("i1", 0, 300, 0, 0, units(1, D, 4)[0])])

    def broken(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(ItemOffsets, "_add_labels", broken)
        with pytest.raises(MemoryError):
            index.live.apply([ItemRecord("new", 0, 301, 0, 0, units(1, D, 5)[0])])
    index.check()
    assert index.live.apply([ItemRecord("i1", 0, 299, 0, 0, units(1, D, 6)[0])]) == 0
    index.oracle.apply([ItemRecord("i1", 0, 299, 0, 0, units(1, D, 6)[0])])
    index.check()
