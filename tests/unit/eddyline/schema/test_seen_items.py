"""Seen items beyond the list: the bytes, and what they mean."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eddyline.schema import events, seen_items
from eddyline.schema.events import KINDS, TEXT_CHARS_MAX, VALUE_CHARS_MAX, Click
from eddyline.schema.item_key import item_key
from eddyline.schema.seen_items import ENTRY_BYTES, ITEMS_MAX, MINUTE_MS, MINUTES_MAX
from eddyline.schema.user_history import Entry

MS = 1_700_000_000_000 // MINUTE_MS * MINUTE_MS

entry = st.builds(
    Entry,
    st.sampled_from("abcdef"),
    st.integers(0, 4).map(lambda n: MS + n * MINUTE_MS // 2),
    st.integers(0, 2),
)


def expected(entries: list[Entry], items_max: int) -> list[tuple[int, int, int]]:
    """(key, kind, minute) by the rule, the newest first."""
    latest: dict[tuple[int, int], int] = {}
    for one in entries:
        name = item_key(one.item_id), one.kind
        latest[name] = max(one.at_ms // MINUTE_MS, latest.get(name, 0))
    order = sorted(latest, key=lambda name: (latest[name], name[1], name[0]), reverse=True)
    return [(*name, latest[name]) for name in order[:items_max]]


def meaning(value: bytes, items_max: int) -> list[tuple[int, int, int]]:
    found = seen_items.decode(seen_items.canonical(value, items_max), items_max)
    return [
        (key, kind, at_ms // MINUTE_MS)
        for key, kind, at_ms in zip(*(column.tolist() for column in found), strict=True)
    ]


@given(st.lists(entry, max_size=40), st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_newest_stay_in_any_order_and_any_pieces(
    entries: list[Entry], items_max: int, rng: random.Random
) -> None:
    wanted = expected(entries, items_max)
    for _ in range(3):
        rng.shuffle(entries)
        value, at = b"", 0
        while at < len(entries):
            size = rng.randint(1, 7)
            value = seen_items.append(value, seen_items.stored(entries[at : at + size]), items_max)
            assert len(value) < 2 * items_max * ENTRY_BYTES
            at += size
        assert meaning(value, items_max) == wanted
        # A lower limit of readers holds at once.
        assert meaning(value, max(1, items_max - 2)) == expected(entries, max(1, items_max - 2))
        read = seen_items.decode(value, items_max)
        pairs = set(zip(read.keys.tolist(), read.kinds.tolist(), strict=True))
        assert pairs == {(key, kind) for key, kind, _ in wanted}


@pytest.mark.parametrize(("entries", "left"), [(19, 19), (20, 10), (21, 10), (500, 10)])
def test_twice_as_many_entries_are_compacted(entries: int, left: int) -> None:
    more = seen_items.stored([Entry(f"i{n}", MS + n * MINUTE_MS) for n in range(entries)])
    value = seen_items.append(b"", more, 10)
    assert len(value) == left * ENTRY_BYTES
    assert value.endswith(more[-9 * ENTRY_BYTES :])


def test_no_items_are_kept_where_none_may_be() -> None:
    value = seen_items.stored([Entry("a", MS)])
    assert seen_items.canonical(value, 0) == b""
    assert seen_items.decode(value, 0) is seen_items.NONE
    assert seen_items.decode(b"", 5) is seen_items.NONE


def test_every_kind_has_its_number() -> None:
    entries = [Entry("a", MS + MINUTE_MS - 1, kind) for kind in range(len(KINDS))]
    found = seen_items.decode(seen_items.stored(entries), 9)
    assert found.kinds.tolist() == list(range(len(KINDS)))
    assert found.at_ms.tolist() == [MS] * len(KINDS)
    assert set(found.keys.tolist()) == {item_key("a")} and found.keys.dtype == np.uint64
    assert len(KINDS) <= 1 << seen_items.KIND_BITS


@pytest.mark.parametrize(("late", "minute"), [(-1, -1), (0, 0), (1, 0), (10**6, 0)])
def test_times_end_where_the_bits_do(late: int, minute: int) -> None:
    at_ms = (MINUTES_MAX + late) * MINUTE_MS
    found = seen_items.decode(seen_items.stored([Entry("a", at_ms, 5)]), 1)
    assert found.at_ms.tolist() == [(MINUTES_MAX + minute) * MINUTE_MS]
    assert found.kinds.tolist() == [5]


@pytest.mark.parametrize("size", [1, 11, 13, 12_001])
def test_a_damaged_value_is_named(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} bytes, not a multiple of 12"):
        seen_items.decode(bytes(size), 10)


def test_after_a_bound_only_whole_minutes_stay() -> None:
    value = seen_items.stored([Entry("a", MS - 1), Entry("b", MS), Entry("c", MS + MINUTE_MS)])
    assert seen_items.after(value, MS - 1) == value[ENTRY_BYTES:]
    # It may be of any time in its minute.
    assert seen_items.after(value, MS) == value[2 * ENTRY_BYTES :]
    assert seen_items.after(value, MS + MINUTE_MS) == b""


@pytest.mark.parametrize("items", [0, 1, 61, 62, 63, ITEMS_MAX])
def test_a_moved_click_carries_them(items: int) -> None:
    value = seen_items.stored([Entry(f"i{n}", MS + n * MINUTE_MS, n % 6) for n in range(items)])
    texts = seen_items.to_texts(value)
    assert len(texts) == -(-items // 62) <= seen_items.TEXTS_MAX
    assert all(len(text) <= VALUE_CHARS_MAX for text in texts)
    context = events.moved_context(3, texts)
    assert max(map(len, context)) <= TEXT_CHARS_MAX
    moved = Click(user_id="u", item_id="i", at_ms=MS, context=context)
    decoded = events.decode_click(
        events.encode(moved), appended_ms=MS, far_future_ms_max=0, id_form="nfc"
    )
    assert events.is_moved(decoded) and events.equal_before(decoded) == 3
    assert seen_items.from_texts(seen_items.moved_texts(decoded)) == value


@pytest.mark.parametrize("text", ["é", "a", "AAAA====", "AAAA", "A" * 17, True, 5, 1.5])
def test_what_is_no_text_of_entries_is_left_out(text: object) -> None:
    good = seen_items.to_texts(seen_items.stored([Entry("a", MS)]))[0]
    moved = Click(
        user_id="u",
        item_id="i",
        at_ms=MS,
        context={**events.MOVED, "eddyline.seen.0": text, "eddyline.seen.7": good},  # type: ignore[dict-item]
    )
    assert seen_items.from_texts(seen_items.moved_texts(moved)) == seen_items.stored(
        [Entry("a", MS)]
    )
    named = {
        "eddyline.seen.": good,
        "eddyline.seen.x": good,
        "eddyline.seen.²": good,
        "seen.1": good,
    }
    assert seen_items.moved_texts(Click(user_id="u", item_id="i", context=named)) == {}  # type: ignore[arg-type]
