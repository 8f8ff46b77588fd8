"""Columns of many names: they keep what lives, and cost nothing for each name."""

import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eddyline.schema.item_record import ItemRecord
from index.factory import HnswIndex
from index.filters import Filter, Range, matches
from index.snapshot import format as snapshot_format
from index.storage import columns as columns_module
from index.storage.columns import Columns

NAMES = 6_000
BRAND = frozenset({"brand"})
ORIGIN: dict[str, Any] = {"generation": "g", "dimension": 2, "bundle_ms": 0, "log": "log"}
items_with_attributes = st.lists(
    st.fixed_dictionaries(
        {
            "categories": st.lists(st.sampled_from("ab"), max_size=1),
            "tags": st.lists(st.sampled_from("abcdef"), max_size=4),
            "attributes": st.fixed_dictionaries(
                {},
                optional={
                    **dict.fromkeys("xyz", st.floats(-5, 5)),
                    "brand": st.sampled_from("abc"),
                },
            ),
        }
    ),
    max_size=30,
)
some_tags = st.frozensets(st.sampled_from("abcdefg"), max_size=3)
some_filters = st.builds(
    Filter,
    categories=st.frozensets(st.sampled_from("abc"), max_size=2),
    tags=some_tags,
    tags_all=some_tags,
    texts=st.dictionaries(st.just("brand"), some_tags, max_size=1),
    categories_none=st.frozensets(st.sampled_from("abc"), max_size=1),
    tags_none=some_tags,
    texts_none=st.dictionaries(st.just("brand"), some_tags, max_size=1),
    ranges=st.dictionaries(
        st.sampled_from("xyzw"), st.floats(-5, 0).map(lambda low: Range(low, 3.0)), max_size=2
    ),
)


def content(columns: Columns, count: int) -> dict[object, object]:
    return {
        key: (
            part.rows[part.starts[n] : part.starts[n + 1]].tolist(),
            None
            if part.values is None
            else part.values[part.starts[n] : part.starts[n + 1]].tolist(),
        )
        for part in columns.data(np.arange(count), count)
        for n, key in enumerate(part.keys)
        if part.starts[n] < part.starts[n + 1]
    }


def plain(items: list[dict[str, Any]]) -> dict[object, object]:
    """What `content` of these rows must be, entry by entry."""
    found: dict[object, tuple[list[int], list[float] | None]] = {}
    for row, item in enumerate(items):
        for field_name in ("categories", "tags"):
            for name in set(item[field_name]):
                found.setdefault((field_name, name), ([], None))[0].append(row)
        if brand := item["attributes"].get("brand"):
            found.setdefault(("=brand", brand), ([], None))[0].append(row)
        for name, value in item["attributes"].items():
            if name == "brand":
                continue
            rows, values = found.setdefault(("attributes", name), ([], []))
            rows.append(row)
            assert values is not None
            values.append(value)
    return dict(found)


@given(items=items_with_attributes, more=items_with_attributes, data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_compaction_keeps_the_rows_that_live(
    items: list[dict[str, Any]], more: list[dict[str, Any]], data: st.DataObject
) -> None:
    """As if only the live rows below the count had ever been added, whatever is sorted in."""
    count = data.draw(st.integers(0, len(items)))
    kept = sorted(data.draw(st.sets(st.integers(0, count - 1)) if count else st.just(set())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns_module, "NEW_MAX", data.draw(st.sampled_from((0, 1, 5, 1_000))))
        patch.setattr(columns_module, "_CAPACITY_MIN", data.draw(st.sampled_from((1, 4))))
        whole, at = Columns(text_names=BRAND), 0
        while at < len(items):
            size = data.draw(st.integers(1, 10))
            whole.append(at, items[at : at + size])
            at += size
        assert content(whole, count) == plain(items[:count])
        found = whole.compact(np.array(kept, np.int64), count)
        lived = [items[row] for row in kept]
        assert content(found, len(kept)) == plain(lived)
        # The next rows go behind the kept ones and change nothing of the old columns.
        found.append(len(kept), more)
        assert content(found, len(kept) + len(more)) == plain([*lived, *more])
        assert content(whole, len(items)) == plain(items)


@given(items=items_with_attributes, data=st.data())
@settings(max_examples=80, deadline=None)
def test_the_terms_of_rows_are_those_that_were_added(
    items: list[dict[str, Any]], data: st.DataObject
) -> None:
    """Whatever is sorted in, and was read before."""
    names = data.draw(st.sets(st.sampled_from(["categories", "tags", "brand", "none"])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns_module, "NEW_MAX", data.draw(st.sampled_from((0, 1, 5, 1_000))))
        patch.setattr(columns_module, "_CAPACITY_MIN", data.draw(st.sampled_from((1, 4))))
        columns = Columns(text_names=BRAND)
        for row, item in enumerate(items):
            columns.append(row, [item])
            rows = data.draw(st.lists(st.integers(0, row), max_size=4))
            found = columns.terms(np.array(rows, np.int64), names)
            assert found == [_terms(items[one], names) for one in rows]


def _terms(item: dict[str, Any], names: set[str]) -> frozenset[tuple[str, str]]:
    lists = {(name, text) for name in ("categories", "tags") for text in item[name]}
    brand = {("brand", text) for text in [item["attributes"].get("brand")] if text}
    return frozenset(term for term in lists | brand if term[0] in names)


@given(items=items_with_attributes, filters=some_filters, data=st.data())
@settings(max_examples=80, deadline=None)
def test_filters_pass_what_their_definition_passes(
    items: list[dict[str, Any]], filters: Filter, data: st.DataObject
) -> None:
    """By mask and row by row, also for a reader that counts fewer rows than are written."""
    count = data.draw(st.integers(0, len(items)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns_module, "NEW_MAX", data.draw(st.sampled_from((0, 5, 1_000))))
        patch.setattr(columns_module, "_CAPACITY_MIN", 1)
        columns = Columns(text_names=BRAND)
        for row, item in enumerate(items):
            columns.append(row, [item])
    expected = [matches(filters, "i", item) for item in items[:count]]
    assert columns.mask(filters, count).tolist() == expected
    rows = np.array(data.draw(st.permutations(range(count))), np.int64)
    assert columns.passing(filters, rows).tolist() == [expected[row] for row in rows]


@pytest.mark.parametrize(
    "filters", [Filter(ranges={"price": Range(0, 20_000)}), Filter(tags=frozenset({"t"}))]
)
def test_a_few_rows_are_checked_without_a_scan_of_the_newest(filters: Filter) -> None:
    columns, count = Columns(), 30_000
    columns.append(0, [{"tags": ["t"], "attributes": {"price": n}} for n in range(count)])
    rows = np.array([29_999, 3, 20_001, 3], np.int64)
    tracemalloc.start()
    try:
        passing = columns.passing(filters, rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert passing.tolist() == ([False, True, False, True] if filters.ranges else [True] * 4)
    assert peak < count, "bytes: fewer than one for each row"


def test_the_names_of_numbers_are_not_made_for_every_query() -> None:
    columns = Columns()
    columns.append(0, [{"attributes": {"price": 1}}])
    assert columns.number_names() == {"price"}
    columns.append(1, [{"attributes": {f"n{n}": n}} for n in range(3_000)])
    columns.append(3_001, [{"tags": ["stars"]}])
    assert columns.number_names() == {"price", *(f"n{n}" for n in range(3_000))}
    assert columns.number_names() is columns.number_names()


def calls_of(call: Callable[[], object]) -> int:
    """Number of calls, of Python and C functions, that `call` makes on this thread."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls


def many_names(count: int) -> list[dict[str, Any]]:
    """Attributes of `count` items with all of the tags, categories and numbers' names."""
    return [
        {
            "tags": [f"t{n % NAMES}", "all"],
            "categories": [f"c{n * 7 % NAMES}"],
            "attributes": {f"a{n % 5_000}": float(n)},
        }
        for n in range(count)
    ]


def test_names_cost_no_calls_of_their_own(tmp_path: Path) -> None:
    """Compaction, snapshot and restore work on whole arrays."""
    index, count = HnswIndex(2, exact_below=10**6), NAMES + 5
    vector = np.array([1, 0], np.float32)
    index.apply(
        [
            ItemRecord(f"i{n}", 0, n, n, n, vector, of_item)
            for n, of_item in enumerate(many_names(count))
        ]
    )
    columns, kept = index._version.columns, np.flatnonzero(np.arange(count) % 3 > 0)
    assert calls_of(lambda: columns.compact(kept, count)) < 3_000
    assert len(content(columns.compact(kept, count), len(kept))) > NAMES
    contents = index.contents()
    assert calls_of(index.contents) < 3_000
    path, origin = tmp_path / "snapshot", snapshot_format.Origin(**ORIGIN)
    write = snapshot_format.write
    assert calls_of(lambda: write(path, contents, origin, {}, 0)) < 3_000
    assert calls_of(lambda: snapshot_format.load(path, origin, 0)) < 3_000
    loaded, _ = snapshot_format.load(path, origin, 0)
    copy = HnswIndex(2, exact_below=10**6)
    # Each item costs its key: encode, BLAKE2b, digest.
    assert calls_of(lambda: copy.restore(loaded)) < 3_000 + 3 * count
    assert content(copy._version.columns, count) == content(columns, count)
    index.close()
    copy.close()


def test_readers_go_on_while_columns_are_compacted() -> None:
    """A reader that sleeps as for a socket is woken many times within one compaction."""
    columns, count = Columns(), 100_000
    columns.append(0, many_names(count))
    kept = np.flatnonzero(np.arange(count) % 3 > 0)
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


def test_a_reader_meets_no_entry_of_a_batch_that_is_being_written() -> None:
    """Filters of several terms and of ranges, while the writer appends behind their rows."""
    columns, items = Columns(), many_names(40)
    columns.append(0, items)
    filters = Filter(tags=frozenset({"t1", "t30", "t7000"}), ranges={"a1": Range(0, 5)})
    terms = Filter(tags=filters.tags)
    rows, stop = np.arange(40), threading.Event()
    expected = {
        "terms": [matches(terms, "i", item) for item in items],
        "both": [matches(filters, "i", item) for item in items],
    }

    def write() -> None:
        at = 40
        while not stop.is_set():
            columns.append(at, many_names(60))
            at += 60

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(1_500):
            for name, wanted in (("terms", terms), ("both", filters)):
                assert columns.mask(wanted, 40).tolist() == expected[name]
                assert columns.passing(wanted, rows).tolist() == expected[name]
    finally:
        stop.set()
        writer.join(20)
