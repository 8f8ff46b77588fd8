"""The user history: its bytes, and the order of inserted entries against a plain sort."""

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eddyline.schema.events import KINDS, Click
from eddyline.schema.user_history import (
    DISLIKE,
    EMPTY,
    OLD_IDLE_S_MAX,
    RECENT_MAX,
    Bounds,
    CompactEntry,
    Entry,
    StoredHistory,
    UserHistory,
    compact,
    decode,
    encode_older,
    encode_recent,
    insert,
    insert_compact,
    insert_event,
    insert_moved,
    positive_items,
    strength,
)

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
entries = st.builds(
    Entry,
    st.text(min_size=1, max_size=20),
    st.integers(0, 2**53),
    st.integers(0, len(KINDS) - 1),
    st.floats(0.001, 100),
)
histories = st.builds(
    UserHistory,
    partition=st.integers(-1, 4096),
    offset=st.integers(-1, 2**62),
    at_ms=st.integers(0, 2**53),
    produced_us=st.integers(0, 2**62),
    appended_ms=st.integers(0, 2**53),
    read_us=st.integers(0, 2**62),
    entries=st.lists(entries, max_size=12).map(tuple),
)


@patient
@given(histories, st.integers(-(2**63), 2**63 - 1))
def test_roundtrip_whole(history: UserHistory, applied_us: int) -> None:
    recent = encode_recent(history, []) + applied_us.to_bytes(8, "little", signed=True)
    newest_first = tuple(sorted(history.entries, key=lambda e: -e.at_ms))
    ordered = msgspec.structs.replace(history, entries=newest_first)
    stored = decode(recent, encode_older(ordered.entries))
    assert (stored.history, stored.applied_us, stored.recent) == (ordered, applied_us, [])


@patient
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 2), st.sampled_from([1.0, 0.5])), max_size=60
    ),
    st.integers(1, 12),
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(1, 7),
)
def test_the_newest_few_beside_the_older_ones_are_the_list(
    events: list[tuple[int, int, float]],
    length_max: int,
    age_max: int,
    lateness_max: int,
    chunk: int,
) -> None:
    """As ingest writes it: what is new since the whole list was written, until that is too much."""
    bounds = Bounds(length_max, age_max, lateness_max)
    listed: list[Entry] = []
    recent: list[CompactEntry] = []
    older, newest = None, 0
    for offset, (at_ms, kind, weight) in enumerate(events):
        entry = Entry(str(offset), at_ms, kind, weight)
        if insert_event(listed, newest, entry, bounds):
            insert_compact(recent, compact(entry))
        newest = max(newest, at_ms)
        if offset % chunk:
            continue
        if len(recent) > RECENT_MAX:
            older, recent = encode_older(listed), []
        whole = UserHistory(offset=offset, at_ms=newest, entries=tuple(listed))
        stored = decode(encode_recent(whole, recent) + bytes(8), older)
        assert stored.history == whole
        assert [compact(e) for e in stored.recent] == recent


def test_golden_bytes() -> None:
    history = UserHistory(
        partition=3,
        offset=7,
        at_ms=5,
        produced_us=4,
        appended_ms=3,
        read_us=2,
        entries=(Entry("a", 5, 2), Entry("b", 4), Entry("c", 1, 0, 0.5)),
        idle_after_ms=11,
    )
    recent = bytes.fromhex("9a020307050403020391" + "93a1610502" + "0b" + "0900000000000000")
    older = bytes.fromhex("92" + "92a16204" + "94a1630100cb3fe0000000000000")
    assert encode_recent(history, [("a", 5, 2)]) == recent[:-8]
    assert encode_older(history.entries[1:]) == older
    assert decode(recent, older) == StoredHistory(history, 9, [Entry("a", 5, 2)])


def test_bytes_of_before_idle_users_ended_are_read() -> None:
    recent = bytes.fromhex("99020307050403020191" + "93a1610502" + "0900000000000000")
    read = decode(recent).history
    assert (read.entries, read.idle_after_ms) == ((Entry("a", 5, 2),), 3 + 1_000 * OLD_IDLE_S_MAX)


def test_another_layout_is_named() -> None:
    with pytest.raises(ValueError, match="layout 3, not 2"):
        decode(bytes.fromhex("99030307050403020090") + bytes(8))


def test_empty_has_no_coordinates() -> None:
    assert (EMPTY.partition, EMPTY.offset, EMPTY.entries) == (-1, -1, ())
    assert decode(encode_recent(EMPTY, []) + bytes(8)) == StoredHistory(EMPTY, 0, [])


@patient
@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 12))
def test_insert_is_a_stable_sort_that_keeps_the_newest(times: list[int], length_max: int) -> None:
    listed: list[Entry] = []
    for offset, at_ms in enumerate(times):
        insert(listed, Entry(str(offset), at_ms), length_max)
    oracle = sorted(enumerate(times), key=lambda pair: (pair[1], pair[0]), reverse=True)[
        :length_max
    ]
    assert [(entry.item_id, entry.at_ms) for entry in listed] == [(str(o), t) for o, t in oracle]


@patient
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(range(len(KINDS)))), max_size=30),
    st.integers(0, 12),
)
def test_liked_items_leaves_out_dislikes_and_keeps_repeats(
    pairs: list[tuple[int, int]], limit: int
) -> None:
    listed = [Entry(str(item), 0, kind) for item, kind in pairs]
    expected = [
        str(item)
        for n, (item, kind) in enumerate(pairs)
        if KINDS[kind] != "dislike" and (item, DISLIKE) not in pairs[:n]
    ][:limit]
    assert positive_items(listed, limit) == positive_items(tuple(listed), limit) == expected


@patient
@given(
    st.lists(st.integers(0, 60), max_size=40),
    st.integers(1, 12),
    st.integers(0, 30),
    st.integers(0, 30),
)
def test_a_list_is_bounded_by_count_age_and_lateness(
    times: list[int], length_max: int, age_max: int, lateness_max: int
) -> None:
    listed: list[Entry] = []
    oracle: list[tuple[int, int]] = []
    newest = 0
    for offset, at_ms in enumerate(times):
        placed = insert_event(
            listed, newest, Entry(str(offset), at_ms), Bounds(length_max, age_max, lateness_max)
        )
        assert placed == (not lateness_max or newest - at_ms <= lateness_max)
        newest = max(newest, at_ms)
        if placed:
            oracle = sorted([*oracle, (at_ms, offset)], reverse=True)[:length_max]
            oracle = [(t, o) for t, o in oracle if not age_max or newest - t <= age_max]
        assert [(entry.at_ms, int(entry.item_id)) for entry in listed] == oracle


@pytest.mark.parametrize(("ahead", "kept"), [(9, ["old"]), (10, ["old"]), (11, [])])
def test_the_age_and_the_lateness_limits_are_inclusive(ahead: int, kept: list[str]) -> None:
    entries = [Entry("old", 100)]
    insert_event(entries, 100, Entry("new", 100 + ahead), Bounds(9, age_ms_max=10))
    assert [e.item_id for e in entries] == ["new", *kept]
    assert insert_event([], 100 + ahead, Entry("late", 100), Bounds(9, lateness_ms_max=10)) == bool(
        kept
    )


def test_a_moved_entry_is_never_late_and_never_there_twice() -> None:
    entries, bounds = [Entry("b", 50), Entry("a", 50)], Bounds(3, lateness_ms_max=5)
    for _ in range(2):
        assert insert_moved(entries, 90, Entry("c", 50), bounds)
    assert [e.item_id for e in entries] == ["c", "b", "a"]
    insert_moved(entries, 90, Entry("a", 50, DISLIKE), bounds)  # another kind
    assert [e.item_id for e in entries] == ["a", "c", "b"]
    insert_moved(entries, 90, Entry("a", 50), Bounds(4, age_ms_max=10))
    assert entries == []  # too old, also for a moved entry


@pytest.mark.parametrize(
    ("dwell", "full", "weight"),
    [
        (500, 2_000, 0.5),
        (2_000, 2_000, 2),
        (9_999, 2_000, 2),
        (0, 2_000, 0.002),
        (-1, 2_000, 0.002),
        (0, 0, 2),
        ("long", 2_000, 2),
        (True, 2_000, 2),
    ],
)
def test_dwell_time_weighs_where_it_is_asked_for(dwell: object, full: int, weight: float) -> None:
    click = Click(user_id="u", item_id="i", at_ms=0, weight=2, context={"dwell_ms": dwell})  # type: ignore[dict-item]
    assert strength(click, full) == pytest.approx(weight)
    assert strength(Click(user_id="u", item_id="i", at_ms=0), full) == 1


def test_a_kind_is_never_renumbered() -> None:
    assert KINDS == ("click", "view", "like", "cart", "purchase", "dislike") and DISLIKE == 5
    assert msgspec.msgpack.decode(encode_older([Entry("x", 1, DISLIKE)]))[0][2] == 5
