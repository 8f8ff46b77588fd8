"""One suite over every `StateStore`."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest

from eddyline.errors import FenceMoved, StoreRefused, StoreUnavailable
from eddyline.schema.erasure import Erasure, digest
from eddyline.schema.step_ranges import FOREVER, StepRanges
from eddyline.schema.user_history import EMPTY, Entry, UserHistory, compact
from eddyline.settings.loader import Settings
from eddyline.stores import item_codec, redis_client, user_codec
from eddyline.stores.layout import Layout
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import (
    Fence,
    ItemMetadata,
    ItemMetadataWrite,
    LogId,
    Mark,
    RefusedRecord,
    Source,
    StateStore,
    UserEffects,
    UserPlace,
    UserQuery,
    UserRead,
    UserWrite,
)

LOG = LogId("cluster", "topic")
CLICKS = Source("clicks", 3)
ITEMS = Source("items", 0)


def at(offset: int) -> Fence:
    return Fence(offset, LOG)


def seen(*items: str, **stamps: int) -> UserHistory:
    entries = tuple(Entry(item, at_ms=n, kind=0, weight=1.0) for n, item in enumerate(items))
    return UserHistory(entries=entries[::-1], **stamps)


def users_of(
    store: StateStore, slot: str, user_ids: Sequence[str], generations: Sequence[str] = ()
) -> UserRead:
    [read] = store.read_many([UserQuery(slot, CLICKS, user_ids, generations)])
    return read


def accepted_ids(store: StateStore) -> dict[str, int]:
    """The event-id window of slot u3."""
    return store.read_slot("u3", CLICKS).accepted


def test_an_empty_store_knows_nothing(store: StateStore) -> None:
    store.check()
    assert store.layout() is None
    assert store.fences(CLICKS, ["u3", "i0"]) == {"u3": None, "i0": None}
    read = users_of(store, "u3", ["ana"], ["1"])
    assert (read.fence, accepted_ids(store), read.histories) == (None, {}, {})
    assert read.embeddings == {"1": {}}
    assert users_of(store, "u3", []).fence is None
    assert store.read_item_metadata(["a"], 1) == {}
    assert store.popular("i0", 10) == {}
    state = store.read_user("u3", 3, "ana", "1")
    assert (state.fence, state.history, state.applied_us) == (None, EMPTY, 0)
    assert (state.embedding, state.profile) == (None, {})


def test_the_layout_is_claimed_once(store: StateStore) -> None:
    layout = Layout(1, 8, 4, 1)
    store.claim_layout(layout)
    store.claim_layout(layout)
    assert store.layout() == layout
    with pytest.raises(StoreRefused, match="16"):
        store.claim_layout(Layout(1, 16, 4, 1))
    assert store.layout() == layout


def test_the_width_of_buckets_is_part_of_the_layout(store: StateStore) -> None:
    """Buckets are numbered by their width: those of a larger one count as old, and vanish."""
    hours = Layout(1, 8, 4, 1, popular_bucket_s=3_600)
    days = Layout(1, 8, 4, 1, popular_bucket_s=86_400)
    store.claim_layout(hours)
    store.count_clicks("i0", CLICKS, None, at(0), {472_222: {"a": 1_000}}, 28)
    with pytest.raises(StoreRefused, match=r"popular_bucket_s = 3600, or empty it"):
        store.claim_layout(days)
    assert store.layout() == hours
    store.claim_layout(hours)
    store.count_clicks("i0", CLICKS, at(0), at(1), {472_222: {"b": 500}}, 28)
    assert store.popular("i0", 9) == {472_222: {"a": 1_000, "b": 500}}


def test_a_layout_of_another_version_is_refused_with_the_way_out(store: StateStore) -> None:
    old = Layout(2, 8, 4, 1)  # before the width was part of it
    store.claim_layout(old)
    with pytest.raises(StoreRefused, match="Another version wrote it: empty it"):
        store.claim_layout(Layout(3, 8, 4, 1, popular_bucket_s=60))
    assert store.layout() == old


NFC = Layout(3, 8, 4, 1, popular_bucket_s=60, id_form="nfc")
AS_IS = replace(NFC, id_form="as_is")


def test_the_form_of_ids_is_part_of_the_layout(store: StateStore) -> None:
    store.claim_layout(NFC)
    with pytest.raises(
        StoreRefused, match=r"set id_form = 'nfc', or copy .* with id_form = 'as_is'"
    ):
        store.claim_layout(AS_IS)
    with pytest.raises(StoreRefused, match="item_slots=2"):
        store.claim_layout(replace(NFC, item_slots=2))
    store.claim_layout(NFC)
    assert store.layout() == NFC


@pytest.mark.parametrize("claimed", [NFC, AS_IS], ids=["nfc", "as_is"])
def test_state_of_before_the_form_was_known_is_kept_if_all_ids_have_it(
    store: StateStore, claimed: Layout
) -> None:
    store.claim_layout(replace(NFC, id_form=""))
    store.write_users("u3", CLICKS, None, at(0), UserEffects(histories={"zo\u00eb": EMPTY}))
    store.claim_layout(claimed)
    assert store.layout() == claimed
    with pytest.raises(StoreRefused, match="id_form"):
        store.claim_layout(AS_IS if claimed is NFC else NFC)


@pytest.mark.parametrize("spelled", ["zoe\u0308", "u1 ", "a:h:b\u2003", "line\n"])
@pytest.mark.parametrize("kind", ["history", "profile", "item"])
def test_state_of_before_the_form_was_known_is_refused_with_another_spelling(
    store: StateStore, kind: str, spelled: str
) -> None:
    """With it, the user could not be found any more, nor forgotten."""
    old = replace(NFC, id_form="")
    store.claim_layout(old)
    if kind == "history":
        store.write_users("u3", CLICKS, None, at(0), UserEffects(histories={spelled: EMPTY}))
    elif kind == "profile":
        store.write_profiles("u3", Source("users", 3), None, at(0), {spelled: {"a": 1}}, [])
    else:
        changed = {spelled: ItemMetadata(0, 5, b"{}")}
        store.write_item_metadata("i0", Source("items", 0), None, at(5), changed)
    with pytest.raises(StoreRefused, match=r"id_form = 'as_is', or copy the topics") as refused:
        store.claim_layout(NFC)
    assert repr(spelled) in str(refused.value)
    assert store.layout() == old
    store.claim_layout(AS_IS)
    assert store.layout() == AS_IS


def test_users_are_written_whole_and_read_in_one_go(store: StateStore) -> None:
    effects = UserEffects(
        accepted={"e1": 10, "e2": 11},
        histories={"ana": seen("a", "b", offset=11, partition=3), "bé": seen("c")},
        embeddings={"1": {"ana": (7, b"\x00\x01\xff\x80")}},
    )
    before_us = time.time_ns() // 1000
    applied_us = store.write_users("u3", CLICKS, None, at(11), effects)
    assert before_us - 1_000_000 < applied_us < time.time_ns() // 1000 + 1_000_000
    read = users_of(store, "u3", ["ana", "bé", "cy"], ["1"])
    assert read.fence == at(11)
    assert accepted_ids(store) == {"e1": 10, "e2": 11}
    assert read.histories == effects.histories
    assert read.embeddings == effects.embeddings
    state = store.read_user("u3", 3, "ana", "1")
    assert (state.fence, state.history) == (at(11), effects.histories["ana"])
    assert (state.applied_us, state.embedding) == (applied_us, (7, b"\x00\x01\xff\x80"))
    assert store.read_user("u3", 3, "ana", "2").embedding is None
    assert users_of(store, "u4", ["ana"], ["1"]).histories == {}


@pytest.mark.parametrize("expected", [None, Fence(9, LOG), Fence(10, LogId("other", "topic"))])
def test_a_write_against_another_fence_is_refused_whole(
    store: StateStore, expected: Fence | None
) -> None:
    store.write_users("u3", CLICKS, None, at(10), UserEffects(histories={"ana": seen("a")}))
    with pytest.raises(FenceMoved) as refused:
        late = UserEffects(accepted={"e9": 12}, histories={"ana": seen("x"), "bo": seen("y")})
        store.write_users("u3", CLICKS, expected, at(12), late)
    assert refused.value.found == str(at(10))
    read = users_of(store, "u3", ["ana", "bo"])
    assert (read.fence, accepted_ids(store), read.histories) == (at(10), {}, {"ana": seen("a")})


def test_several_users_are_read_as_one_by_one(store: StateStore) -> None:
    """Of several slots, and a user of no slot's state among them."""
    for partition, user in ((3, "ana"), (3, "bob"), (5, "cyd")):
        slot, source = f"u{partition}", Source("clicks", partition)
        expected = store.fences(source, [slot])[slot]
        offset = 0 if expected is None else expected.offset + 1
        effects = UserEffects(
            histories={user: seen("a", user)},
            embeddings={"1": {user: (offset, struct.pack("<2f", offset, 1.0))}},
        )
        store.write_users(slot, source, expected, at(offset), effects)
    users = [
        UserPlace("u3", 3, "ana"),
        UserPlace("u5", 5, "cyd"),
        UserPlace("u3", 3, "bob"),
        UserPlace("u5", 5, "nobody"),
        UserPlace("u7", 7, "nobody"),
        UserPlace("u3", 3, "ana"),
    ]
    for generation in ("1", "2", ""):
        found = store.read_users(users, generation)
        assert found == [store.read_user(*user, generation) for user in users]
    assert [state.history == EMPTY for state in found] == [False] * 3 + [True] * 2 + [False]
    assert store.read_users([], "1") == []


def test_a_write_is_refused_where_users_were_written_meanwhile(store: StateStore) -> None:
    store.write_users(
        "u3", CLICKS, None, at(1), UserEffects(histories={"ana": seen("a")}, profiles="")
    )
    users = Source("users", 3)
    store.write_profiles("u3", users, None, at(7), {"ana": None}, ["1"])
    effects = UserEffects(accepted={"e": 2}, histories={"ana": seen("a", "b")}, profiles="")
    with pytest.raises(FenceMoved) as refused:
        store.write_users("u3", CLICKS, at(1), at(2), effects)
    assert refused.value.found == str(at(7))
    assert store.read_slot("u3", CLICKS).fence == at(1)
    assert users_of(store, "u3", ["ana"]).histories == {}
    effects.profiles = store.read_slot("u3", CLICKS).profiles
    store.write_users("u3", CLICKS, at(1), at(2), effects)
    assert accepted_ids(store) == {"e": 2}


def test_writes_of_several_slots_stand_or_fail_each_for_itself(store: StateStore) -> None:
    store.write_users("u4", Source("clicks", 4), None, at(5), UserEffects())
    writes = [
        UserWrite(
            f"u{p}", Source("clicks", p), None, at(p), UserEffects(histories={"ana": seen(f"i{p}")})
        )
        for p in (3, 4, 5)
    ]
    ends = store.write_many(writes)
    assert isinstance(ends[0], int) and isinstance(ends[1], FenceMoved) and isinstance(ends[2], int)
    reads = store.read_many([UserQuery(w.slot, w.source, ["ana", "bo"], ["1"]) for w in writes])
    assert [read.fence for read in reads] == [at(3), at(5), at(5)]
    assert [list(read.histories) for read in reads] == [["ana"], [], ["ana"]]
    assert store.write_many([]) == [] and store.read_many([]) == []


def test_a_list_that_was_lent_to_a_write_may_change_afterwards(store: StateStore) -> None:
    whole = seen("a", "b")
    lent = list(whole.entries)
    mine = msgspec.structs.replace(whole, entries=lent)
    store.write_users("u3", CLICKS, None, at(1), UserEffects(histories={"ana": mine}))
    lent.clear()
    assert users_of(store, "u3", ["ana"]).histories == {"ana": whole}


def test_a_long_list_is_written_in_two_parts_and_read_as_one(store: StateStore) -> None:
    whole = seen("a", "b", "c")
    store.write_users("u3", CLICKS, None, at(1), UserEffects(histories={"ana": whole}))
    longer = seen("a", "b", "c", "d", offset=2)
    recent = {"ana": [compact(longer.entries[0])]}
    store.write_users(
        "u3", CLICKS, at(1), at(2), UserEffects(histories={"ana": longer}, recent=recent)
    )
    assert users_of(store, "u3", ["ana"]).histories == {"ana": longer}
    assert store.read_user("u3", 3, "ana", "1").history == longer
    store.write_users(
        "u3", CLICKS, at(2), at(3), UserEffects(emptied=("ana",), embeddings={"1": {}})
    )
    assert store.read_user("u3", 3, "ana", "1").history == EMPTY
    store.write_users("u3", CLICKS, at(3), at(4), UserEffects(histories={"ana": whole}))
    store.write_profiles("u3", Source("users", 3), None, at(1), {"ana": None}, ["1"])
    anew = UserEffects(histories={"ana": seen("z")}, recent={"ana": [("z", 0)]})
    store.write_users("u3", CLICKS, at(4), at(5), anew)
    assert store.read_user("u3", 3, "ana", "1").history == seen("z")


@pytest.mark.parametrize(("until_ms", "stays"), [(49, True), (50, False), (51, False)])
def test_forgetting_leaves_a_list_that_went_on_since(
    store: StateStore, until_ms: int, stays: bool
) -> None:
    effects = UserEffects(
        histories={"ana": seen("a", appended_ms=50)}, embeddings={"1": {"ana": (1, b"1234")}}
    )
    store.write_users("u3", CLICKS, None, at(1), effects)
    users = Source("users", 3)
    store.write_profiles("u3", users, None, at(1), {"ana": {"age": 3}, "bo": {"age": 4}}, ["1"])
    store.write_profiles(
        "u3",
        users,
        at(1),
        at(2),
        {"ana": None, "bo": {"age": 5}, "cy": None},
        ["1", "2"],
        {"ana": until_ms, "cy": 1},
    )
    read = users_of(store, "u3", ["ana", "bo", "cy"], ["1"])
    assert (list(read.histories), list(read.embeddings["1"])) == (
        (["ana"], ["ana"]) if stays else ([], [])
    )
    assert read.profiles == {"bo": {"age": 5}}


def test_an_erasure_is_kept_and_takes_every_generation_and_the_profile(store: StateStore) -> None:
    users, erasure = Source("users", 3), Erasure(5_000, 7, 2**41)
    profiles = {"ana": {"age": 3}, "bo": {"age": 4}}
    store.write_profiles(
        "u3", users, None, at(4), profiles, [], None, {"ana": (3, 9), "bo": (4, 9)}
    )
    vectors = {"ana": (1, b"1234"), "bo": (2, b"5678")}
    for n, generation in enumerate(("1", "2")):
        ranges = {name: StepRanges("log", ((5, 9), (12, FOREVER))) for name in ("1", "2")[: n + 1]}
        effects = UserEffects(embeddings={generation: vectors}, step_ranges=ranges)
        store.write_users("u3", CLICKS, at(n - 1) if n else None, at(n), effects)
    assert store.read_slot("u3", CLICKS).step_ranges == ranges
    assert users_of(store, "u3", ["ana"]).profile_places == {"ana": (3, 9)}
    effects = UserEffects(
        emptied=("ana",),
        embeddings={"2": {}},
        generations=("1", "2"),
        erasures={digest("ana"): erasure},
        dropped_profiles=("ana",),
        histories={"bo": seen("b")},
    )
    store.write_users("u3", CLICKS, at(1), at(2), effects)
    read = users_of(store, "u3", ["ana", "bo"], ["1", "2"])
    assert read.embeddings == {"1": {"bo": vectors["bo"]}, "2": {"bo": vectors["bo"]}}
    assert (read.profiles, read.erasures) == ({"bo": {"age": 4}}, {"ana": erasure})
    assert read.histories["bo"].entries == seen("b").entries
    assert store.read_slot("u3", CLICKS).step_ranges == ranges


@pytest.mark.parametrize(
    ("place", "stored"),
    [
        ((6, 5_000), False),
        ((7, 5_000), True),
        ((6, 5_001), True),
        ((-1, 4_999), False),
        ((-1, 5_000), True),  # it may stand after the null record
    ],
)
def test_a_profile_from_before_an_erasure_is_not_stored(
    store: StateStore, place: tuple[int, int], stored: bool
) -> None:
    effects = UserEffects(erasures={digest("ana"): Erasure(5_000, 7, 2**41)})
    store.write_users("u3", CLICKS, None, at(2), effects)
    users, profiles = Source("users", 3), {"ana": {"age": 3}, "bo": {"age": 4}}
    store.write_profiles("u3", users, None, at(8), profiles, [], None, {"ana": place})
    found = users_of(store, "u3", ["ana", "bo"]).profiles
    assert found == (profiles if stored else {"bo": {"age": 4}})


@pytest.mark.parametrize(("first_ms", "stored"), [(89, False), (90, True), (91, True)])
def test_a_replayed_profile_does_not_replace_a_newer_one(
    store: StateStore, first_ms: int, stored: bool
) -> None:
    users, old, new = Source("users", 3), {"ana": {"age": 3}}, {"ana": {"age": 4}}
    store.write_profiles("u3", users, None, at(8), old, [], None, {"ana": (8, 90)})
    store.write_profiles("u3", users, at(8), at(9), new, [], None, {"ana": (-1, first_ms)})
    assert users_of(store, "u3", ["ana"]).profiles == (new if stored else old)


def test_an_erasure_in_redis_ends_after_its_end(fresh_settings: Settings) -> None:
    store = RedisStore(fresh_settings)
    now_ms = time.time_ns() // 1_000_000
    kept_ms = fresh_settings.clicks_retention_h * 3_600_000
    ends = {"ana": now_ms + 50_000, "bo": now_ms - 50_000}
    erasures = {digest(user): Erasure(1, 1, ends_ms) for user, ends_ms in ends.items()}
    store.write_users("u3", CLICKS, None, at(2), UserEffects(erasures=erasures))
    with redis_client.client(fresh_settings) as client:
        left = {}
        for user in ends:
            [key] = user_codec.erasure_keys(f"{fresh_settings.key_prefix}{{u3}}", [user])
            left[user] = client.pttl(key) - kept_ms
            assert user.encode() not in key.encode()
    assert 40_000 < left["ana"] <= 50_000
    assert -10_000 < left["bo"] <= 0
    store.close()


@pytest.mark.parametrize("writes", [1, 999, 1_000, 1_001, 3_000])
def test_a_window_of_many_small_writes_is_read_whole_and_forgets_by_writes(
    store: StateStore, writes: int
) -> None:
    fence = None
    for n in range(writes):
        effects = UserEffects(accepted={f"e{n}": n}, window_floor=max(0, n - 1_500))
        store.write_users("u3", CLICKS, fence, at(n), effects)
        fence = at(n)
    first = max(0, writes - 1_501)
    assert accepted_ids(store) == {f"e{n}": n for n in range(first, writes)}


def test_every_write_is_fenced(store: StateStore) -> None:
    for write in (
        lambda: store.write_profiles("u3", CLICKS, at(1), at(2), {"ana": {"age": 3}}, ["1"]),
        lambda: store.count_clicks("u3", CLICKS, at(1), at(2), {1: {"a": 1000}}, 4),
        lambda: store.write_item_metadata(
            "u3", CLICKS, at(1), at(2), {"a": ItemMetadata(0, 1, b"{}")}
        ),
        lambda: store.write_users("u3", CLICKS, at(1), at(2), UserEffects()),
    ):
        with pytest.raises(FenceMoved):
            write()
    assert store.fences(CLICKS, ["u3"]) == {"u3": None}
    assert store.read_item_metadata(["a"], 1) == {} and store.popular("u3", 9) == {}


def test_metadata_writes_of_several_slots_stand_or_fail_for_themselves(store: StateStore) -> None:
    items, published = Source("items", 0), Source("items@1", 0)
    item = ItemMetadata(0, 2, b"{}")
    ends = store.write_item_metadata_many(
        [
            ItemMetadataWrite("i0", published, None, at(2), {}),
            ItemMetadataWrite("i0", items, at(1), at(2), {"refused": item}),
            ItemMetadataWrite("i0", Source("items", 1), None, at(2), {"a": item}),
        ]
    )
    assert [type(end) for end in ends] == [type(None), FenceMoved, type(None)]
    assert store.read_item_metadata(["refused", "a"], 1) == {"a": item}
    assert store.fences(published, ["i0"]) == {"i0": at(2)} and store.fences(items, ["i0"]) == {
        "i0": None
    }
    assert store.write_item_metadata_many([]) == []


def test_fences_are_kept_by_slot_source_and_partition(store: StateStore) -> None:
    store.write_users("u3", CLICKS, None, at(5), UserEffects())
    store.count_clicks("i0", CLICKS, None, at(4), {}, 4)
    store.count_clicks("i0", Source("clicks", 4), None, at(9), {}, 4)
    store.write_item_metadata("i0", Source("items@1", 0), None, at(2), {})
    assert store.fences(CLICKS, ["u3", "i0", "i1"]) == {"u3": at(5), "i0": at(4), "i1": None}
    assert store.fences(Source("items@1", 0), ["i0"]) == {"i0": at(2)}
    assert store.fences(Source("items", 0), ["i0"]) == {"i0": None}


def test_the_window_forgets_below_its_floor(store: StateStore) -> None:
    store.write_users("u3", CLICKS, None, at(2), UserEffects(accepted={"a": 0, "b": 1, "c": 2}))
    store.write_users("u3", CLICKS, at(2), at(3), UserEffects(accepted={"d": 3}, window_floor=2))
    assert accepted_ids(store) == {"c": 2, "d": 3}


@pytest.mark.parametrize("floor", [4, 5, 6, 1_000])
def test_a_chunk_whose_last_id_lies_below_the_floor_is_written_whole(
    store: StateStore, floor: int
) -> None:
    """Offsets have gaps (aborted transactions), and not every event has an id."""
    effects = UserEffects(accepted={"a": 5}, window_floor=floor, histories={"ana": seen("x")})
    store.write_users("u3", CLICKS, None, at(2_000), effects)
    read = users_of(store, "u3", ["ana"])
    assert (read.fence, read.histories) == (at(2_000), {"ana": seen("x")})
    assert accepted_ids(store) == ({"a": 5} if floor <= 5 else {})


@pytest.mark.parametrize("n", [1, 499, 500, 501, 5000])
def test_a_chunk_may_be_large(store: StateStore, n: int) -> None:
    accepted = {f"e{i}": i for i in range(n)}
    lists = {f"user {i}": seen("a") for i in range(n)}
    store.write_users("u3", CLICKS, None, at(n), UserEffects(accepted=accepted, histories=lists))
    read = users_of(store, "u3", list(lists), ["1"])
    assert accepted_ids(store) == accepted and read.histories == lists


def test_profiles_and_forgetting(store: StateStore) -> None:
    ana = UserEffects(histories={"ana": seen("a")}, embeddings={"1": {"ana": (1, b"1234")}})
    store.write_users("u3", CLICKS, None, at(1), ana)
    users = Source("users", 3)
    profiles: dict[str, dict[str, object] | None] = {"ana": {"age": 31, "job": "é"}, "bo": {}}
    store.write_profiles("u3", users, None, at(1), profiles, ["1"])
    assert store.read_user("u3", 3, "ana", "1").profile == {"age": 31, "job": "é"}
    assert users_of(store, "u3", ["ana", "bo"]).profiles == profiles
    store.write_profiles("u3", users, at(1), at(2), {"ana": None}, ["1"])
    state = store.read_user("u3", 3, "ana", "1")
    assert (state.history, state.embedding, state.profile) == (EMPTY, None, {})
    assert users_of(store, "u3", ["ana", "bo"]).profiles == {"bo": {}}


def test_counts_add_up_and_old_buckets_go(store: StateStore) -> None:
    store.count_clicks("i0", CLICKS, None, at(1), {10: {"a": 1000, "b": 500}, 9: {"a": 7}}, 3)
    store.count_clicks("i0", Source("clicks", 4), None, at(1), {10: {"a": 1000}}, 3)
    assert store.popular("i0", 10) == {10: {"a": 2000, "b": 500}, 9: {"a": 7}}
    assert store.popular("i0", 1) == {10: {"a": 2000}, 9: {"a": 7}}
    store.count_clicks("i0", CLICKS, at(1), at(2), {12: {"c": 1}}, 3)
    assert sorted(store.popular("i0", 10)) == [10, 12]
    store.count_clicks("i0", CLICKS, at(2), at(3), {5: {"late": 1}}, 3)
    assert sorted(store.popular("i0", 10)) == [10, 12]


def test_a_bucket_is_read_again_once_it_has_changed(store: StateStore) -> None:
    assert store.popular_buckets("i0", 9, {}) == {}
    store.count_clicks("i0", CLICKS, None, at(1), {9: {"a": 7}, 10: {"a": 1000, "b": 500}}, 3)
    first = store.popular_buckets("i0", 9, {})
    assert [read.counted for read in first.values()] == [([b"a"], [7]), ([b"a", b"b"], [1000, 500])]
    known = {bucket: read.version for bucket, read in first.items()}
    again = store.popular_buckets("i0", 9, known)
    assert {bucket: (read.version, read.counted) for bucket, read in again.items()} == {
        bucket: (version, None) for bucket, version in known.items()
    }
    store.count_clicks("i0", CLICKS, at(1), at(2), {10: {"a": 1}}, 3)
    later = store.popular_buckets("i0", 9, known)
    assert later[9].counted is None and later[10].counted == ([b"a", b"b"], [1001, 500])
    assert later[10].version not in {*known.values(), b""}
    # The same fence on an emptied store is another write.
    store.count_clicks("i0", CLICKS, at(2), at(1), {12: {"c": 1}}, 3)
    store.count_clicks("i0", CLICKS, at(1), at(2), {10: {"a": 1}}, 3)
    last = store.popular_buckets("i0", 9, {b: read.version for b, read in later.items()})
    assert sorted(last) == [10, 12] and last[10].counted == ([b"a", b"b"], [1002, 500])


def test_a_bucket_keeps_its_most_counted_items(store: StateStore) -> None:
    counts = {1: {"b": 5, "a": 5, "c": 9, "d": 1}, 2: {"x": 1}}
    store.count_clicks("i0", CLICKS, None, at(1), counts, 9, 4)
    assert store.popular("i0", 9) == counts
    store.count_clicks("i0", CLICKS, at(1), at(2), {1: {"e": 6, "d": 1}, 2: {"x": 1}}, 9, 3)
    assert store.popular("i0", 9) == {1: {"c": 9, "e": 6, "b": 5}, 2: {"x": 2}}


def test_emptied_users_lose_list_and_embedding_and_may_begin_anew(store: StateStore) -> None:
    both = UserEffects(
        histories={"ana": seen("a"), "bo": seen("b")},
        embeddings={"1": {"ana": (7, b"aaaa"), "bo": (8, b"bbbb")}},
    )
    store.write_users("u3", CLICKS, None, at(1), both)
    store.write_profiles("u3", Source("users", 3), None, at(1), {"ana": {"age": 1}}, ["1"])
    effects = UserEffects(emptied=("ana", "bo", "nobody"), embeddings={"1": {}})
    effects.histories = {"bo": seen("new")}
    store.write_users("u3", CLICKS, at(1), at(2), effects)
    ana, bo = (store.read_user("u3", 3, user, "1") for user in ("ana", "bo"))
    assert (ana.history, ana.embedding, ana.profile) == (EMPTY, None, {"age": 1})
    assert (bo.history, bo.embedding) == (seen("new"), None)


def test_embeddings_of_two_generations_are_written_and_emptied_together(store: StateStore) -> None:
    both = {"1": {"ana": (7, b"aaaa")}, "2": {"ana": (2, b"AAAAAA"), "bo": (3, b"BBBBBB")}}
    effects = UserEffects(histories={"ana": seen("a")}, embeddings=both)
    store.write_users("u3", CLICKS, None, at(1), effects)
    read = users_of(store, "u3", ["ana", "bo", "cy"], ["1", "2"])
    assert read.embeddings == both and list(read.histories) == ["ana"]
    assert users_of(store, "u3", ["bo", "ana"], ["2"]).embeddings == {"2": both["2"]}
    only_one = UserEffects(emptied=("ana",), embeddings={"1": {}})
    store.write_users("u3", CLICKS, at(1), at(2), only_one)
    left = users_of(store, "u3", ["ana", "bo"], ["1", "2"]).embeddings
    assert left == {"1": {}, "2": both["2"]}
    emptied = UserEffects(emptied=("ana",), embeddings={"1": {}, "2": {}})
    store.write_users("u3", CLICKS, at(2), at(3), emptied)
    left = users_of(store, "u3", ["ana", "bo"], ["1", "2"]).embeddings
    assert left == {"1": {}, "2": {"bo": (3, b"BBBBBB")}}


def test_embeddings_of_an_ended_generation_are_removed_from_some_slots(store: StateStore) -> None:
    others = {"{u3}:e:1:x": (1, b"1234"), "u:e:1:y": (1, b"1234")}
    for slot, partition in (("u3", 3), ("u4", 4), ("u33", 33)):
        users = {"ana": (1, b"1234"), "e:1:bo": (1, b"1234"), **others}
        effects = UserEffects(
            embeddings={"1": users, "11": {"ana": (1, b"1234")}, "2": {"1:ana": (1, b"1234")}},
            histories={"}:e:1:ana": seen("a")},
        )
        store.write_users(slot, Source("clicks", partition), None, at(9), effects)
    assert sum(store.remove_embeddings("1", ["u3", "u33"])) == 8

    def left(slot: str, partition: int) -> dict[str, int]:
        query = UserQuery(
            slot, Source("clicks", partition), ["ana", "e:1:bo", "1:ana", *others], ["1", "11", "2"]
        )
        [read] = store.read_many([query])
        return {name: len(of) for name, of in read.embeddings.items()}

    assert left("u3", 3) == left("u33", 33) == {"1": 0, "11": 1, "2": 1}
    assert left("u4", 4) == {"1": 4, "11": 1, "2": 1}
    assert store.read_user("u3", 3, "}:e:1:ana", "1").history == seen("a")
    assert sum(store.remove_embeddings("1", ["u3", "u33"])) == 0


def appended(offset: int, ms: int) -> Fence:
    return Fence(offset, LOG, Mark(offset, ms, 0))


IDLE_USERS = {
    "old": seen("a", "b", offset=4, idle_after_ms=1_999),
    "due": seen("a", idle_after_ms=2_000),
    "fresh": seen("a", idle_after_ms=2_001),
    "never": seen("a"),
    "}:h:x": seen("a", idle_after_ms=1),
}


def idle_in(store: StateStore, slot: str, partition: int) -> None:
    """Write the users and their embeddings of two generations; the last record is of 3,000 ms."""
    source = Source("clicks", partition)
    embeddings = {name: dict.fromkeys(IDLE_USERS, (1, b"1234")) for name in ("1", "old")}
    effects = UserEffects(
        accepted={"e": 4},
        histories=dict(IDLE_USERS),
        embeddings=embeddings,
        step_ranges={name: StepRanges("log") for name in embeddings},
    )
    store.write_users(slot, source, None, appended(4, 3_000), effects)
    profiles = {"old": {"age": 1}}
    store.write_profiles(slot, Source("users", partition), None, at(1), profiles, ["1"])


def test_an_idle_user_has_neither_history_nor_embedding_for_a_query(store: StateStore) -> None:
    idle_in(store, "u3", 3)
    for user, history in IDLE_USERS.items():
        found, kept = store.read_user("u3", 3, user, "1"), user == "never"
        assert (found.history, found.embedding) == (
            (history, (1, b"1234")) if kept else (EMPTY, None)
        )
        assert bool(found.applied_us) == kept
    assert store.read_user("u3", 3, "old", "1").profile == {"age": 1}
    store.write_users("u3", CLICKS, appended(4, 3_000), appended(5, 2_001), UserEffects())
    assert store.read_user("u3", 3, "fresh", "1").history == IDLE_USERS["fresh"]
    store.write_users("u3", CLICKS, appended(5, 2_001), appended(6, 2_002), UserEffects())
    assert store.read_user("u3", 3, "fresh", "1").history == EMPTY
    # Without the time of its last record a slot has no idle users.
    store.write_users("u3", CLICKS, appended(6, 2_002), at(7), UserEffects())
    assert store.read_user("u3", 3, "old", "1").history == IDLE_USERS["old"]


def test_idle_users_are_removed_from_some_slots(store: StateStore) -> None:
    for slot, partition in (("u3", 3), ("u4", 4), ("u33", 33)):
        idle_in(store, slot, partition)
    assert sum(store.remove_idle_users(["u3", "u33", "u5"], slack_ms=1_000)) == 4
    read = users_of(store, "u3", [*IDLE_USERS], ["1", "old"])
    left = {"due", "fresh", "never"}
    assert read.histories.keys() == left and read.profiles == {"old": {"age": 1}}
    assert {name: of.keys() for name, of in read.embeddings.items()} == {"1": left, "old": left}
    assert users_of(store, "u4", [*IDLE_USERS]).histories == IDLE_USERS
    assert (read.fence, accepted_ids(store)) == (at(4), {"e": 4})
    assert sum(store.remove_idle_users(["u3"], slack_ms=1_000)) == 0
    assert sum(store.remove_idle_users(["u3"], slack_ms=998)) == 2
    assert sum(store.remove_idle_users(["u3"], slack_ms=0)) == 0
    # A removed user begins anew, and the others go on.
    effects = UserEffects(histories={"old": seen("new")})
    store.write_users("u3", CLICKS, appended(4, 3_000), appended(5, 3_001), effects)
    assert users_of(store, "u3", ["old", "never"]).histories == {
        "old": seen("new"),
        "never": IDLE_USERS["never"],
    }


def test_a_slot_without_the_time_of_its_last_record_keeps_its_users(store: StateStore) -> None:
    idle_in(store, "u3", 3)
    store.write_users("u3", CLICKS, appended(4, 3_000), at(5), UserEffects())
    assert sum(store.remove_idle_users(["u3"], slack_ms=0)) == 0
    store.write_users("u3", CLICKS, at(5), appended(6, -1), UserEffects())
    assert sum(store.remove_idle_users(["u3"], slack_ms=0)) == 0


def test_fences_of_an_ended_generation_are_dropped(store: StateStore) -> None:
    old, new = Source("items@1", 0), Source("items@2", 0)
    for source in (old, new):
        store.write_item_metadata("i0", source, None, at(1), {})
    store.drop_fences("i0", [old, Source("items@1", 1)])
    store.drop_fences("i0", [])
    assert (store.fences(old, ["i0"]), store.fences(new, ["i0"])) == ({"i0": None}, {"i0": at(1)})
    with pytest.raises(FenceMoved):  # who still publishes for it
        store.write_item_metadata("i0", old, at(1), at(2), {})


@pytest.mark.parametrize("store", ["redis", "cluster"], indirect=True)
def test_a_slot_loses_its_profiles_and_their_fence_and_nothing_else(store: RedisStore) -> None:
    users = {slot: Source("users", int(slot[1:])) for slot in ("u3", "u4")}
    for slot, source in users.items():
        store.write_profiles(slot, source, None, at(0), {"ana": {}, "{u4}:p:x": {"age": 1}}, [])
    history = UserEffects(histories={"bo": seen("a")})
    store.write_users("u3", CLICKS, None, at(7), history)
    store.drop_profiles("u3", users["u3"])
    assert store.user_ids("u3", "p") == set() and store.user_ids("u3", "h") == {"bo"}
    assert store.user_ids("u4", "p") == {"ana", "{u4}:p:x"}
    assert store.fences(users["u3"], ["u3"]) == {"u3": None}
    assert store.fences(CLICKS, ["u3"]) == {"u3": at(7)}
    assert store.fences(users["u4"], ["u4"]) == {"u4": at(0)}


def test_an_older_metadata_never_overrides_a_newer_one(store: StateStore) -> None:
    newer, older = ItemMetadata(0, 1 << 40, b""), ItemMetadata(0, 5, b'{"item_id":"a"}')
    store.write_item_metadata("i0", ITEMS, None, at(8), {"a": newer, "b": older})
    store.write_item_metadata(
        "i0", ITEMS, at(8), at(9), {"a": older, "b": ItemMetadata(0, 6, b"{}")}
    )
    assert store.read_item_metadata(["a", "b", "c"], 1) == {
        "a": newer,
        "b": ItemMetadata(0, 6, b"{}"),
    }
    assert store.read_item_metadata(["a"], 1)["a"].deleted


def test_items_with_a_refused_record_are_listed_until_it_ends(store: StateStore) -> None:
    reasons = ["bad_field", "x" * 255, ""]
    marked = {
        f"{{i0}}:c:{n}": ItemMetadata(
            0, n, b"{}", 7, bool(n), RefusedRecord(1, 2**40, n, why, n > 1)
        )
        for n, why in enumerate(reasons)
    }
    plain = ItemMetadata(0, 5, b"{}", 7, born_ms=2**40)
    one = marked["{i0}:c:2"]
    marked["{i0}:c:2"] = replace(one, born_ms=9)

    def listed(slot: str) -> set[str]:
        return {item_id for page in store.refused_items(slot) for item_id in page}

    store.write_item_metadata("i0", ITEMS, None, at(5), {**marked, "plain": plain})
    store.write_item_metadata("i1", ITEMS, None, at(5), {"other": next(iter(marked.values()))})
    read = store.read_item_metadata([*marked, "plain"], 1)
    assert read == {**marked, "plain": plain}
    assert listed("i0") == set(marked) and listed("i2") == set()
    assert store.count_refused_items(["i0", "i1", "i2"]) == 4
    first, *_ = marked
    # An older version leaves it as it is; a newer one and a delete end it.
    store.write_item_metadata("i0", ITEMS, at(5), at(6), {"{i0}:c:2": ItemMetadata(0, 1, b"{}")})
    assert listed("i0") == set(marked)
    changes = {first: ItemMetadata(0, 6, b""), "{i0}:c:1": ItemMetadata(0, 7, b"{}")}
    store.write_item_metadata("i0", ITEMS, at(6), at(7), changes)
    assert listed("i0") == {"{i0}:c:2"} and store.count_refused_items(["i0"]) == 1
    # Its fence has moved: nothing changes.
    with pytest.raises(FenceMoved):
        store.write_item_metadata("i0", ITEMS, at(6), at(9), {first: next(iter(marked.values()))})
    assert store.count_refused_items(["i0", "i1"]) == 2


def deleted(partition: int, ends_ms: int) -> ItemMetadata:
    return ItemMetadata(partition, 5, b"", 7, ends_ms=ends_ms)


def test_deleted_items_are_removed_from_some_slots_once_they_have_ended(store: StateStore) -> None:
    refused = RefusedRecord(0, 4, 1, "bad_field")
    items = {
        "old": deleted(0, 1_999),
        "due": deleted(0, 2_000),
        "slow": deleted(1, 1_500),
        "gone": deleted(-1, 1_000),
        "gone later": deleted(-1, 1_500),
        "never": deleted(0, 0),
        "stray": replace(deleted(0, 1), stray=True),
        "}:c:x": deleted(0, 1),
        "live": ItemMetadata(0, 5, b"{}", 1),
        "born": ItemMetadata(0, 5, b"{}", 1, born_ms=1),
        # As long as a deleted one, and with all that a live one may have.
        "eight": ItemMetadata(0, 5, b'{"a": 1}', 1),
        "refused": ItemMetadata(0, 5, b"{}", 1, True, refused, 1),
    }
    for slot in ("i0", "i1", "i10"):
        store.write_item_metadata(slot, ITEMS, None, appended(5, 3_000), items)
        store.write_item_metadata(slot, Source("items", 1), None, appended(5, 2_500), {})

    def removed(slots: list[str], partitions: int, slack_ms: int) -> int:
        return sum(store.remove_deleted_items(slots, partitions, slack_ms))

    assert removed(["i0", "i10", "i7"], 2, 1_000) == 8
    left = set(store.read_item_metadata(list(items), 1))
    assert left == {*items} - {"old", "gone", "stray", "}:c:x"}
    assert removed(["i0"], 2, 1_000) == 0
    # A partition without a fence: where an item's own one is not known, it stays.
    assert removed(["i0"], 3, 999) == 2
    assert removed(["i0"], 2, 999) == 1
    left -= {"due", "slow", "gone later"}
    found = store.read_item_metadata(list(items), 1)
    assert found == {item_id: items[item_id] for item_id in left}
    assert store.fences(ITEMS, ["i0"]) == {"i0": at(5)}
    # A removed item begins anew; the fence did not move.
    store.write_item_metadata("i0", ITEMS, appended(5, 3_000), at(6), {"old": items["live"]})
    assert store.read_item_metadata(["old"], 1) == {"old": items["live"]}
    # Without the time of the last record nothing ends.
    assert removed(["i0"], 2, 0) == 0 == removed(["i0"], 2, -(10**15))


def test_deleted_items_of_older_versions_end_thirty_days_after_their_first_append(
    fresh_settings: Settings,
) -> None:
    store, first_ms = RedisStore(fresh_settings), 1_700_000_000_000
    plain = item_codec.VERSION.pack(0, 5)
    with_time = plain + b"\x02" + struct.pack("<q", first_ms)
    for name, value in {"a": plain, "b": with_time, "live": plain + b"{}"}.items():
        store._redis.set(f"{store._ns}{{i0}}:c:{name}", value)
    end_ms = first_ms + 30 * 86_400_000
    assert store.read_item_metadata(["b"], 1) == {
        "b": ItemMetadata(0, 5, b"", first_ms, True, ends_ms=end_ms)
    }
    store.write_item_metadata("i0", ITEMS, None, appended(5, end_ms), {})
    assert sum(store.remove_deleted_items(["i0"], 1, 0)) == 1
    assert set(store.read_item_metadata(["a", "b", "live"], 1)) == {"b", "live"}
    assert store.live_item_ids() == {"live"}
    store.write_item_metadata(
        "i0", ITEMS, appended(5, end_ms), appended(6, end_ms + 1), {"a": deleted(0, 9)}
    )
    assert store.live_item_ids() == {"live"}
    assert sum(store.remove_deleted_items(["i0"], 1, 0)) == 2
    store.close()


OTHER = LogId("cluster", "made anew")


def test_accepting_a_new_items_log_leaves_the_clicks_alone(store: StateStore) -> None:
    effects = UserEffects(accepted={"e": 9}, histories={"ana": seen("a")})
    store.write_users("u3", CLICKS, None, at(9), effects)
    store.write_item_metadata(
        "i0", ITEMS, None, at(9), {"a": ItemMetadata(0, 9, b"{}"), "gone": ItemMetadata(0, 8, b"")}
    )
    store.write_item_metadata("i0", Source("items@1", 0), None, at(9), {})
    assert store.accept_log({"clicks": (LOG, {3: 10}), "items": (OTHER, {0: 1})}) == 1
    assert store.fences(CLICKS, ["u3"]) == {"u3": at(9)} and store.fences(ITEMS, ["i0"]) == {
        "i0": None
    }
    assert store.fences(Source("items@1", 0), ["i0"]) == {"i0": at(9)}, (
        "only a new generation goes on"
    )
    read = users_of(store, "u3", ["ana"])
    assert accepted_ids(store) == {"e": 9} and read.histories == {"ana": seen("a")}
    assert store.read_item_metadata(["a", "gone"], 1) == {
        "a": ItemMetadata(-1, -1, b"{}"),
        "gone": ItemMetadata(-1, -1, b""),
    }
    store.write_item_metadata(
        "i0", ITEMS, None, Fence(0, OTHER), {"a": ItemMetadata(0, 0, b'{"new":1}')}
    )
    assert store.read_item_metadata(["a"], 1) == {"a": ItemMetadata(0, 0, b'{"new":1}')}


def test_accepting_a_new_clicks_log_drops_its_fences_and_windows(store: StateStore) -> None:
    store.write_users("u3", CLICKS, None, at(9), UserEffects(accepted={"e": 9}))
    store.count_clicks("i0", CLICKS, None, at(9), {}, 4)
    store.write_item_metadata("i0", ITEMS, None, at(9), {"a": ItemMetadata(0, 9, b"{}")})
    assert store.accept_log({"clicks": (OTHER, {3: 0}), "items": (LOG, {0: 10})}) == 2
    assert store.fences(CLICKS, ["u3", "i0"]) == {"u3": None, "i0": None}
    assert accepted_ids(store) == {}
    assert store.fences(ITEMS, ["i0"]) == {"i0": at(9)}
    assert store.read_item_metadata(["a"], 1) == {"a": ItemMetadata(0, 9, b"{}")}


@pytest.mark.parametrize(("end", "left"), [(11, 10), (10, 9), (9, 8), (1, 0), (0, None)])
def test_accepting_a_log_that_lost_its_tail_goes_back_to_its_end(
    store: StateStore, end: int, left: int | None
) -> None:
    store.write_users("u3", CLICKS, None, at(10), UserEffects(accepted={"a": 0, "b": 8, "c": 10}))
    store.write_item_metadata(
        "i0", ITEMS, None, at(10), {"a": ItemMetadata(0, 8, b"{}"), "b": ItemMetadata(0, 10, b"{}")}
    )
    changed = store.accept_log({"clicks": (LOG, {3: end}), "items": (LOG, {0: end})})
    assert changed == (0 if end > 10 else 2)
    fence = None if left is None else at(left)
    assert store.fences(CLICKS, ["u3"])["u3"] == store.fences(ITEMS, ["i0"])["i0"] == fence
    kept = accepted_ids(store)
    assert kept == {e: o for e, o in {"a": 0, "b": 8, "c": 10}.items() if o < end}
    metadata = store.read_item_metadata(["a", "b"], 1)
    assert [metadata["a"].offset, metadata["b"].offset] == [o if o < end else -1 for o in (8, 10)]


def test_a_user_whose_id_looks_like_a_key_is_left_alone(store: StateStore) -> None:
    names = ["bob}:window", "eve}:c:1", "{i0}:c:1", "fence:{u3}:clicks:3"]
    lists = {name: seen("a") for name in names}
    store.write_users("u3", CLICKS, None, at(9), UserEffects(histories=lists))
    store.accept_log({"clicks": (OTHER, {3: 0}), "items": (OTHER, {0: 0})})
    assert users_of(store, "u3", names).histories == lists


def test_a_closed_store_is_unavailable(store: StateStore) -> None:
    store.close()
    with pytest.raises(StoreUnavailable):
        store.read_user("u3", 3, "ana", "1")


def test_redis_that_is_away_is_unavailable_in_time() -> None:
    away = RedisStore(Settings(redis_url="redis://:s3cret@127.0.0.1:1/0", redis_timeout_ms=200))
    started = time.monotonic()
    with pytest.raises(StoreUnavailable) as refused:
        away.check()
    assert time.monotonic() - started < 20  # the socket's own limit may be minutes
    assert "127.0.0.1:1" in str(refused.value) and "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    "value", [b"", b"short", b"\xc1garbage-12345678", b"\x05" + bytes(8), b"\x91\x05" + bytes(8)]
)
def test_a_list_that_cannot_be_read_is_forgotten_all_the_same(
    fresh_settings: Settings, value: bytes
) -> None:
    store, users = RedisStore(fresh_settings), Source("users", 3)
    tag = f"{fresh_settings.namespace}:{{u3}}"
    with (
        contextlib.closing(store),
        contextlib.closing(redis_client.client(fresh_settings)) as client,
    ):
        for kind in ("h", "o", "e:1"):
            client.set(f"{tag}:{kind}:ana", value)
        store.write_profiles("u3", users, None, at(1), {"ana": None}, ["1"], {"ana": 5})
        assert client.exists(*(f"{tag}:{kind}:ana" for kind in ("h", "o", "e:1"))) == 0
        assert store.fences(users, ["u3"]) == {"u3": at(1)}


def test_redis_that_may_drop_keys_is_refused(fresh_settings: Settings) -> None:
    store = RedisStore(fresh_settings)
    store._redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(StoreRefused, match=r"allkeys-lru.*noeviction"):
            store.check()
        with pytest.raises(StoreRefused, match=r"allkeys-lru.*noeviction"):
            store.check_eviction()
    finally:
        store._redis.config_set("maxmemory-policy", "noeviction")
    store.check()
    store.check_eviction()
    store.close()
