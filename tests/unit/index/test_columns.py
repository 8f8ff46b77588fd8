"""Columns of many names: a compaction keeps what lives, and costs little for each name."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.storage import columns as columns_module
from index.storage.columns import Columns

NAMES = 60_000
rows_of_items = st.lists(
    st.fixed_dictionaries(
        {
            "tags": st.lists(st.sampled_from("abcdef"), max_size=4),
            "attributes": st.dictionaries(st.sampled_from("xyz"), st.floats(-5, 5), max_size=2),
        }
    ),
    max_size=30,
)


def content(columns: Columns, count: int) -> dict[object, object]:
    return {
        key: (rows.tolist(), None if values is None else values.tolist())
        for key, rows, values in columns.items(count)
        if len(rows)
    }


@given(items=rows_of_items, data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_compaction_keeps_the_rows_that_live(
    items: list[dict[str, object]], data: st.DataObject
) -> None:
    """As if only the live rows below the count had ever been added."""
    count = data.draw(st.integers(0, len(items)))
    kept = sorted(data.draw(st.sets(st.integers(0, count - 1)) if count else st.just(set())))
    whole, expected = Columns(), Columns()
    whole.append(0, items)
    expected.append(0, [items[row] for row in kept])
    for at_once in (1, 3, 1_024):
        columns_module.NAMES_AT_ONCE, before = at_once, columns_module.NAMES_AT_ONCE
        try:
            found = whole.compact(np.array(kept, np.int64), count)
        finally:
            columns_module.NAMES_AT_ONCE = before
        assert content(found, len(kept)) == content(expected, len(kept))
        # The next rows go behind the kept ones and change nothing of the old columns.
        found.append(len(kept), items)
        expected_more = Columns()
        expected_more.append(0, [*(items[row] for row in kept), *items])
        n = len(kept) + len(items)
        assert content(found, n) == content(expected_more, n)


def one_by_one(columns: Columns, kept: np.ndarray, count: int) -> Columns:
    """The plain way: some numpy calls for each name."""
    new_row = np.full(count, -1)
    new_row[kept] = np.arange(len(kept))
    made = Columns()
    for key, old_rows, values in columns.items(count):
        rows = new_row[old_rows]
        stays = rows >= 0
        if stays.any():
            made.put(key, rows[stays], None if values is None else values[stays])
    return made


def test_60_000_names_compact_in_blocks_and_readers_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    columns, count = Columns(), 100_000
    columns.append(0, [{"tags": [f"t{n * 31 % NAMES}", "all"]} for n in range(count)])
    kept = np.flatnonzero(np.arange(count) % 3 > 0)
    blocks: list[int] = []
    renumber = columns_module._renumber
    monkeypatch.setattr(
        columns_module,
        "_renumber",
        lambda to, named, new_row: (blocks.append(len(named)), renumber(to, named, new_row)),
    )
    found = columns.compact(kept, count)
    assert content(found, len(kept)) == content(one_by_one(columns, kept, count), len(kept))
    # numpy is called for each block of names, not for each name.
    assert sum(blocks) == NAMES + 1 and len(blocks) == NAMES // columns_module.NAMES_AT_ONCE + 1
    # A reader that sleeps as for a socket is woken many times within one compaction.
    turns, done = 0, threading.Event()

    def read() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            time.sleep(1e-4)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        columns.compact(kept, count)
    finally:
        done.set()
        reader.join(20)
    assert turns > 20
