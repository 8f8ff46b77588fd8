"""The behaviour list: its bytes, and the order of inserted entries against a plain sort."""

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eddyline.behaviour import DISLIKE, EMPTY, Behaviour, Entry, decode, encode, insert, liked_items
from eddyline.events import KINDS

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
entries = st.builds(
    Entry,
    st.text(min_size=1, max_size=20),
    st.integers(0, 2**53),
    st.integers(0, len(KINDS) - 1),
    st.floats(0.001, 100),
)
behaviours = st.builds(
    Behaviour,
    partition=st.integers(-1, 4096),
    offset=st.integers(-1, 2**62),
    at_ms=st.integers(0, 2**53),
    produced_us=st.integers(0, 2**62),
    appended_ms=st.integers(0, 2**53),
    read_us=st.integers(0, 2**62),
    entries=st.lists(entries, max_size=12).map(tuple),
)


@patient
@given(behaviours, st.integers(-(2**63), 2**63 - 1))
def test_roundtrip(behaviour: Behaviour, applied_us: int) -> None:
    stored = encode(behaviour) + applied_us.to_bytes(8, "little", signed=True)
    assert decode(stored) == (behaviour, applied_us)


def test_golden_bytes() -> None:
    behaviour = Behaviour(partition=3, offset=7, at_ms=5, produced_us=4, appended_ms=3, read_us=2,
                          entries=(Entry("a", 5, 2, 1.0),))  # fmt: skip
    golden = "98010307050403029194a1610502cb3ff0000000000000"
    assert encode(behaviour).hex() == golden
    assert decode(bytes.fromhex(golden) + b"\x09" + bytes(7)) == (behaviour, 9)


def test_empty_has_no_coordinates() -> None:
    assert (EMPTY.partition, EMPTY.offset, EMPTY.entries) == (-1, -1, ())
    assert decode(encode(EMPTY) + bytes(8)) == (EMPTY, 0)


@patient
@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 12))
def test_insert_is_a_stable_sort_that_keeps_the_newest(times: list[int], length_max: int) -> None:
    listed: list[Entry] = []
    for offset, at_ms in enumerate(times):
        insert(listed, Entry(str(offset), at_ms), length_max)
    oracle = sorted(enumerate(times), key=lambda pair: (pair[1], pair[0]), reverse=True)[:length_max]
    assert [(entry.item_id, entry.at_ms) for entry in listed] == [(str(o), t) for o, t in oracle]


@patient
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(range(len(KINDS)))), max_size=30),
    st.integers(0, 12),
)
def test_liked_items_leaves_out_dislikes_and_keeps_repeats(pairs: list[tuple[int, int]], limit: int) -> None:
    listed = [Entry(str(item), 0, kind) for item, kind in pairs]
    expected = [str(item) for item, kind in pairs if KINDS[kind] != "dislike"][:limit]
    assert liked_items(listed, limit) == liked_items(tuple(listed), limit) == expected


def test_a_kind_is_never_renumbered() -> None:
    assert KINDS == ("click", "view", "like", "cart", "purchase", "dislike") and DISLIKE == 5
    assert msgspec.msgpack.decode(encode(Behaviour(entries=(Entry("x", 1, DISLIKE),))))[7][0][2] == 5
