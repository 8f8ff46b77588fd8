"""The rules of the handlers, one by one, on the memory store."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import msgspec
import numpy as np
import pytest
from kafka.errors import KafkaTimeoutError, MessageSizeTooLargeError

from eddyline.errors import (
    EddylineError,
    FenceMoved,
    KafkaUnavailable,
    LogMismatch,
    Rejected,
    StoreUnavailable,
    VectorRejected,
)
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema import events, user_history
from eddyline.schema.events import MOVED, Click, Item, Merge, UserProfile
from eddyline.schema.item_record import ItemRecord
from eddyline.schema.partitioning import partition_of
from eddyline.schema.user_history import compact
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, LogId, Source
from streams import dead_letters, static_membership
from streams.clicks.handler import ClickHandler
from streams.clicks.user_cache import CachedUser
from streams.clicks.user_updates import UserUpdates
from streams.dead_letters import KafkaDeadLetters, KafkaForwarder
from streams.fences import PartitionFences
from streams.generation import Generation
from streams.handlers import Handlers, Outputs
from streams.items.handler import ItemHandler
from streams.ports import Outcome
from streams.users import UserHandler
from tests.applying import ingest

LOG = LogId("cluster-a", "topic-1")
MS = 1_700_000_000_000
SETTINGS = Settings(
    at_ms_min=0,
    clicks_partitions=2,
    items_partitions=2,
    history_length_max=3,
    dedupe_window_events=10,
)
ANA = "ana"
HERE = partition_of(ANA, 2)
THERE = next(f"u{n}" for n in range(50) if partition_of(f"u{n}", 2) != HERE)


def rec(
    offset: int, value: bytes | None, key: bytes | None = b"k", topic: str = "clicks", **more: Any
) -> Any:
    fields = {"partition": HERE, "timestamp": MS, "headers": ()} | more
    return SimpleNamespace(topic=topic, offset=offset, key=key, value=value, **fields)


def click(offset: int, item_id: str = "i1", **more: Any) -> Any:
    fields: dict[str, Any] = {"user_id": ANA, "item_id": item_id, "at_ms": MS + offset} | more
    return rec(offset, events.encode(Click(**fields)), fields["user_id"].encode())


class FakeOutputs:
    def __init__(self) -> None:
        self.letters: list[tuple[int, str]] = []
        self.forwarded: list[tuple[bytes, bytes, int]] = []
        self.published: list[ItemRecord] = []
        self.flushes = 0

    def put(self, record: Any, rejected: Rejected) -> None:
        self.letters.append((record.offset, rejected.reason))

    def forward(self, record: Any, key: bytes, value: bytes | None, partition: int) -> None:
        self.forwarded.append((key, value, partition))

    def flush(self) -> None:
        self.flushes += 1

    def open(self, partition: int) -> None:
        pass

    def publish(self, records: Mapping[int, Sequence[ItemRecord]]) -> dict[int, EddylineError]:
        for some in records.values():
            self.published += some
        return {}

    def close(self) -> None:
        pass


class OneTower:
    def encode(self, items: Sequence[Item]) -> Any:
        return np.full((len(items), 2), np.sqrt(0.5), np.float32)


class Rig:
    """A store, the outputs, and the three handlers, opened at offset 0."""

    def __init__(self, end: int = 1_000, **more: Any) -> None:
        settings = msgspec.structs.replace(SETTINGS, **more)
        self.store, self.out = MemoryStore(), FakeOutputs()
        self.end = end
        self.now_s = 0.0
        logs = {CLICKS: LOG, USERS: LOG, ITEMS: LOG}
        towers: Any = SimpleNamespace(
            generation="g",
            dimension=2,
            item_tower=OneTower(),
            micro=SimpleNamespace(min_steps_before=0),
            rows={},
        )
        self.generation = Generation(towers, self.out)
        to_sink = Outputs.to_sink(self.out)
        outputs = replace(to_sink, user_forwarder=self.out, item_forwarder=self.out)
        handlers = Handlers(
            settings, self.store, logs, [self.generation], outputs, ["g"], 0.0, lambda: 9
        )
        self.users, self.items = handlers.users, handlers.items
        # Without micro-steps: of clicks, only lists and counts are looked at here.
        self.clicks = ClickHandler(
            settings,
            self.store,
            PartitionFences(settings, self.store, CLICKS, logs),
            self.out,
            self.out,
            [],
            lambda: self.now_s,
        )
        for handler in (self.clicks, self.users, self.items):
            handler.fences.open({HERE: (0, self.end)})

    def entries(self, user: str = ANA) -> list[str]:
        state = self.store.read_user(f"u{HERE}", HERE, user, "g")
        return [e.item_id for e in state.history.entries]


def test_a_list_is_by_time_bounded_and_keeps_the_last_events_stamps() -> None:
    rig = Rig()
    late = click(3, "late", at_ms=MS + 1)
    late.headers = (("produced_us", b"55"),)
    ingest(rig.clicks, HERE, [click(1, "a"), click(2, "b"), late], 77)
    assert rig.entries() == ["b", "late", "a"]
    state = rig.store.read_user(f"u{HERE}", HERE, ANA, "")
    seen = state.history
    assert (seen.partition, seen.offset, seen.at_ms) == (HERE, 3, MS + 2)
    assert (seen.produced_us, seen.appended_ms, seen.read_us) == (55, MS, 77)
    assert state.fence == Fence(3, LOG)
    ingest(rig.clicks, HERE, [click(4, "c"), click(5, "d")], 0)
    assert rig.entries() == ["d", "c", "b"]


@pytest.mark.parametrize(("distance", "counts"), [(9, False), (10, False), (11, True), (500, True)])
def test_a_re_send_is_dropped_inside_the_window_only(distance: int, counts: bool) -> None:
    for chunks in ([0, 2], [0, 1, 2]):
        rig, outcome = Rig(), Outcome()
        log = [click(5, event_id="e"), click(5 + distance, event_id="e")]
        for a, b in pairwise(chunks):
            outcome.add(ingest(rig.clicks, HERE, log[a:b], 0))
        assert len(rig.entries()) == 1 + counts
        assert (outcome.applied, outcome.duplicates) == (1 + counts, 1 - counts)


def test_clicks_without_an_event_id_are_never_re_sends() -> None:
    rig = Rig()
    ingest(rig.clicks, HERE, [click(1), click(2)], 0)
    assert rig.entries() == ["i1", "i1"]


def test_popularity_counts_thousandths_and_no_dislikes() -> None:
    rig = Rig()
    ingest(
        rig.clicks,
        HERE,
        [click(0, weight=0.0005), click(1, weight=2.5), click(2, kind="dislike"), click(3, "x")],
        0,
    )
    assert rig.store.popular("i0", 9) == {}
    rig.now_s = 0.3
    assert rig.clicks.popularity.due() == [HERE]
    rig.clicks.popularity.write(HERE)
    bucket = MS // (SETTINGS.popular_bucket_s * 1_000)
    assert rig.store.popular("i0", 9) == {bucket: {"i1": 2_500, "x": 1_000}}


def test_kinds_and_dwell_time_weigh_for_popularity_and_zero_counts_nothing() -> None:
    rig = Rig(dwell_ms_full=1_000, weight_cart=0.0)
    log = [
        click(0, "a", kind="view"),
        click(1, "a", kind="like"),
        click(2, "a", kind="purchase", weight=2),
        click(3, "b", context={"dwell_ms": 250}),
        click(4, "c", kind="cart"),
        click(5, "d", kind="dislike"),
    ]
    ingest(rig.clicks, HERE, log, 0)
    rig.clicks.popularity.write(HERE)
    (counted,) = rig.store.popular("i0", 9).values()
    assert counted == {"a": 500 + 2_000 + 2 * 5_000, "b": 250}


def test_an_event_beyond_the_lateness_is_counted_and_not_listed() -> None:
    rig = Rig(lateness_s_max=10)
    log = [
        click(0, "new", at_ms=MS),
        click(1, "late", at_ms=MS - 10_000),
        click(2, at_ms=MS - 10_001),
    ]
    resent = click(3, "late", at_ms=MS - 60_000, event_id="e")
    outcome = ingest(rig.clicks, HERE, [*log, resent], 0)
    assert rig.entries() == ["new", "late"]
    assert (outcome.applied, outcome.late, outcome.duplicates) == (4, 2, 0)
    again = click(4, "late", at_ms=MS - 60_000, event_id="e")
    assert ingest(rig.clicks, HERE, [again], 0).duplicates == 1
    rig.clicks.popularity.write(HERE)
    (counted,) = rig.store.popular("i0", 9).values()
    assert counted == {"new": 1_000, "late": 2_000, "i1": 1_000}
    seen = rig.store.read_user(f"u{HERE}", HERE, ANA, "g").history
    assert (seen.offset, seen.at_ms) == (3, MS)  # a query may wait for it like for any other


def test_behaviours_leave_a_list_by_age_against_the_users_own_newest_event() -> None:
    rig = Rig(history_age_s_max=10, lateness_s_max=0)
    ingest(rig.clicks, HERE, [click(0, "a", at_ms=5_000), click(1, "b", at_ms=9_000)], 0)
    assert rig.entries() == ["b", "a"]  # 1970: no clock is read
    ingest(rig.clicks, HERE, [click(2, "c", at_ms=16_000), click(3, "old", at_ms=5_999)], 0)
    assert rig.entries() == ["c", "b"]


def merge(offset: int, user: str = ANA, into: str = THERE) -> Any:
    return rec(offset, events.encode(Merge(user_id=user, merge_into=into, at_ms=MS)), user.encode())


@pytest.mark.parametrize("chunks", [[0, 5], [0, 2, 3, 5], [0, 1, 2, 3, 4, 5]])
def test_a_merge_forwards_the_list_and_empties_it(chunks: list[int]) -> None:
    rig = Rig()
    other = next(u for u in map(str, range(99)) if partition_of(u, 2) == HERE)
    log = [
        click(1, "a", kind="like", weight=2.0),
        click(2, "b", kind="dislike"),
        merge(3),
        click(4, "c"),
        click(5, "d", user_id=other),
    ]
    for a, b in pairwise(chunks):
        ingest(rig.clicks, HERE, log[a:b], 0)
    rig.clicks.popularity.write(HERE)
    assert rig.entries() == ["c"]
    sent = [
        events.decode_click(v, appended_ms=MS, far_future_ms_max=9_000, id_form="nfc")
        for _, v, _ in rig.out.forwarded
    ]
    assert [(key, partition) for key, _, partition in rig.out.forwarded] == [
        (THERE.encode(), 1 - HERE)
    ] * 2
    assert [
        (c.user_id, c.item_id, c.at_ms, c.kind, c.weight, c.event_id, c.context) for c in sent
    ] == [
        (THERE, "a", MS + 1, "like", 2.0, f"merge/{HERE}/3/0", MOVED),
        (THERE, "b", MS + 2, "dislike", 1.0, f"merge/{HERE}/3/1", MOVED),
    ]


@pytest.mark.parametrize("own", [0, 1])
def test_equal_events_of_a_visitor_are_all_moved_and_moved_once(own: int) -> None:
    """Clocks in seconds make equal events; their number survives, also where Redis was emptied."""
    visitor, user = Rig(history_length_max=9), Rig(history_length_max=9)
    equal = [click(n, "a", at_ms=MS, event_id=f"e{n}") for n in range(3)]
    ingest(visitor.clicks, HERE, [*equal, click(3, "b", at_ms=MS), merge(4)], 0)
    sent = [value for _, value, _ in visitor.out.forwarded]
    assert len(sent) == 4
    contexts = [
        events.decode_click(v, appended_ms=MS, far_future_ms_max=9_000, id_form="nfc").context
        for v in sent
    ]
    assert contexts == [MOVED, MOVED | {"eddyline.equal": 1}, MOVED | {"eddyline.equal": 2}, MOVED]
    there = 1 - HERE
    log = [rec(n, v, THERE.encode(), partition=there) for n, v in enumerate(sent, 1)]
    again = [rec(100 + n, v, THERE.encode(), partition=there) for n, v in enumerate(sent)]
    mine = [click(0, "a", at_ms=MS, user_id=THERE, event_id="own")][:own]
    user.clicks.fences.open({there: (0, 1_000)})
    ingest(user.clicks, there, [*mine, *log, *again], 0)
    state = user.store.read_user(f"u{there}", there, THERE, "g")
    assert [e.item_id for e in state.history.entries] == ["b", "a", "a", "a"]


def test_a_weight_never_becomes_zero_so_that_its_entry_can_be_moved() -> None:
    rig = Rig(dwell_ms_full=1_000)
    log = [click(1, "a", weight=5e-324, context={"dwell_ms": 1}), merge(2)]
    ingest(rig.clicks, HERE, log, 0)
    ((_, value, _),) = rig.out.forwarded
    moved = events.decode_click(value, appended_ms=MS, far_future_ms_max=9_000, id_form="nfc")
    assert moved.weight == 5e-324


@pytest.mark.parametrize(
    ("strict", "loose"),
    [({"history_length_max": 3}, {"history_length_max": 9}), ({"history_age_s_max": 2}, {})],
)
def test_an_entry_that_left_stays_away_under_looser_limits(
    strict: dict[str, int], loose: dict[str, int]
) -> None:
    """What is stored, on both settings of one list: an older event, then a late one."""
    defaults = {"history_length_max": 9, "history_age_s_max": 0}
    user, head, older = CachedUser([], [], 0), b"", None
    seconds = [8, 9, 10, 11, 7]
    for offset, (second, limits) in enumerate(
        zip(seconds, [strict] * 4 + [loose], strict=True), start=1
    ):
        settings = msgspec.structs.replace(SETTINGS, **(defaults | limits))
        record = click(offset, f"i{second}", at_ms=MS + 1_000 * second)
        updates = UserUpdates(settings, [], [], {ANA: user})
        updates.apply(
            record,
            events.decode_click(record.value, appended_ms=MS, far_future_ms_max=MS, id_form="nfc"),
        )
        effects = updates.effects(0, [])
        history = effects.histories[ANA]
        head = user_history.encode_recent(history, effects.recent.get(ANA, ())) + bytes(8)
        if ANA not in effects.recent:
            older = user_history.encode_older(history.entries)
        stored = user_history.decode(head, older)
        assert list(stored.history.entries) == list(history.entries)
        user = CachedUser(
            list(stored.history.entries), list(map(compact, stored.recent)), history.at_ms
        )
    assert [entry.item_id for entry in history.entries] == ["i11", "i10", "i9", "i7"]


@pytest.mark.parametrize("far_future_ms_max", [4_999, 5_000])
def test_a_lower_far_future_limit_loses_no_moved_entry(far_future_ms_max: int) -> None:
    rig = Rig(far_future_ms_max=far_future_ms_max)
    log = [
        click(1, "moved", at_ms=MS + 5_000, context=dict(MOVED)),
        click(2, "own", at_ms=MS + 5_001),  # the limit holds for every other event
    ]
    ingest(rig.clicks, HERE, log, 0)
    assert rig.entries() == ["moved"]
    assert rig.out.letters == [(2, "far_future")]


def test_moved_clicks_enter_the_list_by_time_once_and_count_nowhere_again() -> None:
    rig = Rig(lateness_s_max=1)
    own = [click(1, "own", at_ms=MS), click(2, "newer", at_ms=MS + 9_000)]
    moved = [
        click(n, "moved", at_ms=MS + 5, kind="like", event_id="merge/0/3/0", context=dict(MOVED))
        for n in (3, 4, 4 + 50)
    ]  # inside the window, and far outside of it: the list of a merge that was done again
    ingest(rig.clicks, HERE, [*own, *moved], 0)
    rig.clicks.popularity.write(HERE)
    assert rig.entries() == ["newer", "moved", "own"]
    (counted,) = rig.store.popular("i0", 9).values()
    assert counted == {"own": 1_000, "newer": 1_000}


def test_a_merge_into_the_same_user_is_refused_and_a_stray_one_is_forwarded() -> None:
    rig = Rig()
    outcome = ingest(
        rig.clicks, HERE, [merge(1, into=ANA), merge(2, THERE, ANA), rec(3, b'"merge_into"')], 0
    )
    assert rig.out.letters == [(1, "same_user"), (3, "bad_field")]
    assert rig.out.forwarded == [(THERE.encode(), merge(2, THERE, ANA).value, 1 - HERE)]
    assert (outcome.applied, outcome.forwarded) == (0, 1)


def test_a_user_with_ten_thousand_events_takes_no_more_than_many_users() -> None:
    """A batch of one user against a batch of as many users: calls made, and what is kept.

    Calls, not seconds: they are the same on every machine. `make bench-costs` has the times.
    """

    def rec_of(user: int, n: int) -> Any:
        return click(n, f"i{n % 2_000}", user_id=ANA if user == 0 else f"u{user}", event_id=f"e{n}")

    here = [n for n in range(1, 4_000) if partition_of(f"u{n}", 2) == HERE]
    calls = []
    for many in (False, True):
        rig = Rig(
            end=1 << 20, history_length_max=100, dedupe_window_events=1_000, popular_items_max=50
        )
        log = [rec_of(here[n % len(here)] if many else 0, n) for n in range(10_000)]
        with counted_calls() as count:
            for first in range(0, len(log), 250):
                ingest(rig.clicks, HERE, log[first : first + 250], 0)
            rig.clicks.popularity.write(HERE)
        calls.append(count[0])
        state = rig.store.snapshot()
        assert len(state.window[f"u{HERE}"]) == 1_000
        assert all(len(counted) <= 50 for counted in state.buckets["i0"].values())
        assert max(len(seen.entries) for seen, _ in state.histories.values()) <= 100
        assert len(state.histories) == (len(here) if many else 1)
    assert 10_000 < calls[0] < 1.5 * calls[1], calls


@contextlib.contextmanager
def counted_calls() -> Iterator[list[int]]:
    """[calls of Python functions and of built-ins by this thread] in the block."""
    count = [0]

    def on_event(_frame: Any, event: str, _value: Any) -> None:
        if event in ("call", "c_call"):
            count[0] += 1

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        yield count
    finally:
        sys.setprofile(before)


def test_rubbish_is_delivered_before_the_fence_moves() -> None:
    rig = Rig()
    away = rig.out.flush

    def fail() -> None:
        raise KafkaUnavailable("away")

    rig.out.flush = fail  # type: ignore[method-assign]
    log = [rec(1, b"{"), rec(2, None), click(3), rec(4, b'{"user_id":"ana"}')]
    with pytest.raises(KafkaUnavailable):
        ingest(rig.clicks, HERE, log, 0)
    assert rig.store.fences(Source("clicks", HERE), [f"u{HERE}"]) == {f"u{HERE}": None}
    rig.out.flush = away  # type: ignore[method-assign]
    rig.out.letters.clear()
    rig.clicks.fences.open({HERE: (0, 9)})
    outcome = ingest(rig.clicks, HERE, log, 0)
    assert rig.out.letters == [(1, "malformed_json"), (2, "no_value"), (4, "bad_field")]
    assert (outcome.rejected, outcome.applied) == (3, 1)
    ingest(rig.clicks, HERE, [rec(5, b"{")], 0)  # nothing but rubbish moves the fences as well
    rig.clicks.popularity.write(HERE)
    assert rig.clicks.fences.lowest(HERE) == 5


def test_a_stray_click_is_forwarded_under_its_origin_and_not_applied() -> None:
    rig = Rig()
    stray = [click(1, user_id=THERE), click(2, user_id=THERE, event_id="e")]
    outcome = ingest(rig.clicks, HERE, stray, 0)
    assert outcome.forwarded == 2 and outcome.applied == 0 and rig.out.flushes
    first, second = rig.out.forwarded
    assert first[0] == THERE.encode() and first[2] == 1 - HERE
    sent = events.decode_click(first[1], appended_ms=MS, far_future_ms_max=10_000, id_form="nfc")
    assert (sent.event_id, sent.user_id, sent.at_ms) == (f"clicks/{HERE}/1", THERE, MS + 1)
    assert second[1] == stray[1].value
    assert rig.entries(THERE) == [] and rig.store.popular("i0", 9) == {}


def test_a_click_without_a_key_in_its_own_partition_is_applied() -> None:
    rig = Rig()
    lost = click(1)
    lost.key = None
    assert ingest(rig.clicks, HERE, [lost], 0).applied == 1


def test_a_batch_at_or_below_the_fences_is_refused_not_skipped() -> None:
    rig = Rig()
    ingest(rig.clicks, HERE, [click(1), click(2)], 0)
    with pytest.raises(FenceMoved, match="record 2"):
        ingest(rig.clicks, HERE, [click(2), click(3)], 0)


def test_a_store_that_went_back_is_noticed_by_read_write_and_when_idle() -> None:
    rig = Rig()
    before = rig.store.snapshot()
    ingest(rig.clicks, HERE, [click(1)], 0)
    assert rig.clicks.fences.find_diverged([HERE]) == []
    rig.store.restore(before)
    assert rig.clicks.fences.find_diverged([HERE]) == [HERE]
    with pytest.raises(FenceMoved):
        ingest(rig.clicks, HERE, [click(2)], 0)
    assert rig.clicks.fences.open({HERE: (0, 10)}) == {HERE: 0}
    ingest(rig.clicks, HERE, [click(1), click(2)], 0)
    assert len(rig.entries()) == 2


def profile(offset: int, attributes: dict[str, Any] | None, user: str = ANA) -> Any:
    value = (
        None
        if attributes is None
        else events.encode(UserProfile(user_id=user, attributes=attributes))
    )
    return rec(offset, value, user.encode(), "users")


def test_the_last_profile_stands_and_null_forgets() -> None:
    rig = Rig()
    ingest(rig.clicks, HERE, [click(1)], 0)
    ingest(rig.users, HERE, [profile(1, {"age": 1}), profile(2, {"age": 2})], 0)
    assert rig.store.read_user(f"u{HERE}", HERE, ANA, "g").profile == {"age": 2}
    ingest(rig.users, HERE, [profile(3, None)], 0)
    assert rig.store.read_user(f"u{HERE}", HERE, ANA, "g").profile == {}
    assert rig.entries() == []


def test_forgotten_and_set_again_in_one_batch_forgets_the_list() -> None:
    rig = Rig()
    ingest(rig.clicks, HERE, [click(1)], 0)
    outcome = ingest(
        rig.users, HERE, [profile(1, None), rec(2, b"{", ANA.encode()), profile(3, {"age": 3})], 0
    )
    assert rig.entries() == [] and rig.out.letters == [(2, "malformed_json")]
    assert rig.store.read_user(f"u{HERE}", HERE, ANA, "g").profile == {"age": 3}
    assert (outcome.applied, outcome.rejected, rig.users.fences.lowest(HERE)) == (2, 1, 3)


def test_a_forgetting_whose_answer_was_lost_is_not_undone_by_the_cache() -> None:
    rig = Rig()
    rig.users = UserHandler(SETTINGS, rig.store, rig.users.fences, rig.out, ["g"], rig.clicks.cache)
    bo = next(f"b{n}" for n in range(50) if partition_of(f"b{n}", 2) == HERE)
    ingest(rig.clicks, HERE, [click(1, "before")], 0)
    # Redis has forgotten the user, but the connection broke: the clicks did not learn of it.
    profiles, slot = {ANA: None}, f"u{HERE}"
    rig.store.write_profiles(slot, Source("users", HERE), None, Fence(0, LOG), profiles, ["g"])
    with pytest.raises(FenceMoved):
        ingest(rig.users, HERE, [rec(0, None, ANA.encode(), "users")], 0)
    rig.users.fences.open({HERE: (0, 9)})
    bos = events.encode(UserProfile(user_id=bo))
    ingest(rig.users, HERE, [rec(1, bos, bo.encode(), "users")], 0)
    ingest(rig.clicks, HERE, [click(2, "after")], 0)
    assert rig.entries() == ["after"]


def test_counts_that_could_not_be_written_are_not_skipped_by_the_next_batch() -> None:
    rig = Rig(dedupe_window_events=20)
    ingest(rig.clicks, HERE, [click(0, "a")], 0)
    rig.now_s = 0.3
    write, away = rig.store.count_clicks, StoreUnavailable("away")
    rig.store.count_clicks = Mock(side_effect=away)  # type: ignore[method-assign]
    assert rig.clicks.flush_due({HERE}) == HERE
    rig.store.count_clicks = write  # type: ignore[method-assign]
    more = [click(n, "b") for n in range(1, 12)]  # so many that they are counted at once
    with pytest.raises(FenceMoved):
        ingest(rig.clicks, HERE, more, 0)
    rig.clicks.open(HERE)
    assert rig.clicks.fences.open({HERE: (0, 99)}) == {HERE: 0}
    ingest(rig.clicks, HERE, [click(0, "a"), *more], 0)
    rig.clicks.popularity.write(HERE)
    assert list(rig.store.popular("i0", 9).values()) == [{"a": 1_000, "b": 11_000}]


@pytest.mark.parametrize("last", [21, 22, 23, 60])
@pytest.mark.parametrize("batches", [[3, 1], [4]])
def test_a_gap_wider_than_the_window_and_a_crash_lose_no_counts(
    batches: list[int], last: int
) -> None:
    """The crash is after the write to the users, before that of the counts."""
    rig = Rig(dedupe_window_events=20)
    log = [click(n, "a", event_id=f"e{n}") for n in range(3)]
    log.append(click(last, "b", event_id="b"))
    write = rig.store.write_many

    def crash(writes: Any) -> Any:
        answers = write(writes)
        if writes[0].new.offset == last:
            raise RuntimeError("killed")
        return answers

    rig.store.write_many = crash  # type: ignore[method-assign]
    rest = list(log)
    with pytest.raises(RuntimeError, match="killed"):
        for count in batches:
            ingest(rig.clicks, HERE, rest[:count], 0)
            del rest[:count]
    rig.store.write_many = write  # type: ignore[method-assign]
    rig.clicks.open(HERE)
    position = rig.clicks.fences.open({HERE: (0, 99)})[HERE]
    again = [record for record in log if record.offset >= position]
    assert ingest(rig.clicks, HERE, again, 0).records == len(again)
    rig.clicks.popularity.write(HERE)
    assert list(rig.store.popular("i0", 9).values()) == [{"a": 3_000, "b": 1_000}]


def test_profiles_need_a_key_and_their_own_partition() -> None:
    rig = Rig()
    log = [rec(1, b"{}", None, "users"), profile(2, {}, THERE), rec(3, b"{}", b"\xff", "users")]
    ingest(rig.users, HERE, log, 0)
    assert rig.out.letters == [(1, "no_key"), (3, "malformed_key")]
    [(key, value, partition)] = rig.out.forwarded
    assert (key, value, partition) == (THERE.encode(), log[1].value, 1 - HERE)


FILM = next(f"f{n}" for n in range(50) if partition_of(f"f{n}", 2) == HERE)


def item(offset: int, available: bool = True, **more: Any) -> Any:
    value = events.encode(Item(item_id=FILM, available=available, at_ms=5, **more))
    return rec(offset, value, FILM.encode(), "items")


def test_an_item_is_published_once_a_batch_with_its_source_offset() -> None:
    rig = Rig()
    ingest(
        rig.items,
        HERE,
        [item(1, tags=["old"]), item(2, tags=["new"], attributes={"year": 1999})],
        0,
    )
    (record,) = rig.out.published
    assert (record.item_id, record.partition, record.offset, record.at_ms, record.written_us) == (
        FILM,
        HERE,
        2,
        5,
        9,
    )
    assert record.attributes == {"tags": ["new"], "attributes": {"year": 1999}}
    card = rig.store.read_item_metadata([FILM], 1)[FILM]
    assert (card.offset, events._item.decode(card.body).tags) == (2, ["new"])


def test_unavailable_is_retired_but_keeps_its_metadata_and_null_deletes() -> None:
    rig = Rig()
    ingest(rig.items, HERE, [item(1, available=False)], 0)
    assert (
        rig.out.published[0].retired and not rig.store.read_item_metadata([FILM], 1)[FILM].deleted
    )
    ingest(rig.items, HERE, [rec(2, None, FILM.encode(), "items")], 0)
    assert rig.out.published[1].retired and rig.store.read_item_metadata([FILM], 1)[FILM].deleted
    assert rig.out.published[1].at_ms == MS


def test_what_is_published_but_has_no_metadata_yet_is_not_published_again() -> None:
    rig = Rig()
    write, calls = rig.store.write_item_metadata, []

    def dies(*args: Any) -> None:
        calls.append(args[1].name)
        if args[1].name == "items":
            raise RuntimeError("killed")
        write(*args)

    rig.store.write_item_metadata = dies  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        ingest(rig.items, HERE, [item(1)], 0)
    assert calls == ["items@g", "items"]
    rig.store.write_item_metadata = write  # type: ignore[method-assign]
    fences = PartitionFences(SETTINGS, rig.store, ITEMS, {ITEMS: LOG}, ["g"])
    assert fences.open({HERE: (0, 10)}) == {HERE: 0}
    after = ItemHandler(SETTINGS, rig.store, fences, rig.out, [rig.generation], 0.0)
    ingest(after, HERE, [item(1)], 0)
    assert len(rig.out.published) == 1 and FILM in rig.store.read_item_metadata([FILM], 1)


def test_items_of_wrong_keys_are_refused_and_strays_are_forwarded() -> None:
    rig = Rig()
    other = next(f"f{n}" for n in range(50) if partition_of(f"f{n}", 2) != HERE)
    log = [
        rec(1, b"{}", None, "items"),
        rec(2, None, other.encode(), "items"),
        rec(3, events.encode(Item(item_id="x")), FILM.encode(), "items"),
    ]
    ingest(rig.items, HERE, log, 0)
    assert [reason for _, reason in rig.out.letters] == ["no_key", "wrong_key"]
    assert rig.out.forwarded == [(other.encode(), None, 1 - HERE)]
    assert rig.out.published == [] and rig.items.fences.lowest(HERE) == 3


# --- positions


def opened(store: MemoryStore, begin: int, end: int, log: LogId = LOG) -> int:
    fences = PartitionFences(SETTINGS, store, CLICKS, {CLICKS: log})
    return fences.open({0: (begin, end)})[0]


def test_the_position_is_the_lowest_fence_plus_one() -> None:
    store, source = MemoryStore(), Source("clicks", 0)
    assert opened(store, 0, 9) == 0
    store.write_item_metadata("u0", source, None, Fence(7, LOG), {})
    assert opened(store, 0, 9) == 0
    store.write_item_metadata("i0", source, None, Fence(5, LOG), {})
    assert opened(store, 0, 9) == 6
    assert opened(store, 0, 8) == 6
    assert opened(store, 6, 20) == 6


@pytest.mark.parametrize("applied", [None, 0, 5])
def test_clicks_that_retention_took_are_refused_with_the_ways_out(applied: int | None) -> None:
    store, source = MemoryStore(), Source("clicks", 0)
    if applied is not None:
        for slot in ("u0", "i0"):
            store.write_item_metadata(slot, source, None, Fence(applied, LOG), {})
    first = 0 if applied is None else applied + 1
    for begin in (0, first):
        assert opened(store, begin, 2**40) == first
    for begin in (first + 1, first + 2, first + 2**39):
        with pytest.raises(LogMismatch) as refused:
            opened(store, begin, 2**40)
        message = str(refused.value)
        assert (
            "topic clicks, partition 0" in message and f"offsets {first} to {begin - 1} " in message
        )
        assert "`eddyline refill`" in message and "`eddyline accept-log --skip-lost`" in message


def test_compacted_topics_are_read_from_their_beginning() -> None:
    store = MemoryStore()
    for name in (ITEMS, USERS):
        fences = PartitionFences(SETTINGS, store, name, {name: LOG}, ["1"])
        assert fences.open({0: (7, 9)}) == {0: 7}


def test_another_log_is_refused_with_both_ids_and_the_way_out() -> None:
    store = MemoryStore()
    store.write_item_metadata("u0", Source("clicks", 0), None, Fence(7, LOG), {})
    for other in (LogId("cluster-b", "topic-1"), LogId("cluster-a", "topic-2")):
        with pytest.raises(LogMismatch) as refused:
            opened(store, 0, 100, other)
        message = str(refused.value)
        assert all(
            part in message for part in ("topic clicks, partition 0", "cluster-a", "topic-1")
        )
        assert (
            other.cluster_id in message
            and other.topic_id in message
            and "eddyline accept-log" in message
        )
    with pytest.raises(LogMismatch, match="up to offset 7, but the log ends before 7"):
        opened(store, 0, 7)


# --- towards Kafka


class Future:
    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def get(self, timeout: float) -> None:
        assert timeout > 0
        if self.error:
            raise self.error


class FakeProducer:
    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.sent, self.calls = error, [], []  # type: ignore[var-annotated]

    def send(self, topic: str, value: Any, **more: Any) -> Future:
        self.sent.append((topic, value, more))
        return Future(self.error)

    def flush(self, timeout: float) -> None:
        self.calls.append("flush")

    def begin_transaction(self) -> None:
        self.calls.append("begin")

    def commit_transaction(self) -> None:
        self.calls.append("commit")
        if self.error:
            raise self.error

    def close(self, timeout: float) -> None:
        self.calls.append("close")


def test_a_dead_letter_carries_bytes_reason_and_coordinates() -> None:
    producer: Any = FakeProducer()
    sink = KafkaDeadLetters(SETTINGS, producer)
    sink.put(rec(4, b"\xff{", b"\x00k"), Rejected("malformed_json", "", "no"))
    sink.put(rec(5, None, None), Rejected("no_value", "", "none"))
    sink.flush()
    (topic, value, more), (_, empty, none) = producer.sent
    assert (topic, value, more["key"]) == ("dead-letters", b"\xff{", f"clicks/{HERE}/4".encode())
    headers = dict(more["headers"])
    assert headers["reason"] == b"malformed_json" and headers["key"] == b"\x00k"
    assert headers["timestamp_ms"] == str(MS).encode()
    assert empty == b"" and dict(none["headers"])["no_value"] == b"1"


def test_a_forwarded_record_names_its_origin_and_keeps_its_stamp() -> None:
    producer: Any = FakeProducer()
    forwarder = KafkaForwarder(SETTINGS, producer)
    forwarder.forward(
        rec(4, b"v", headers=(("produced_us", b"1"), ("origin", b"old"))), b"ana", b"v2", 1
    )
    forwarder.flush()
    ((topic, value, more),) = producer.sent
    assert (topic, value, more["key"], more["partition"]) == ("clicks", b"v2", b"ana", 1)
    assert more["headers"] == [
        ("produced_us", b"1"),
        ("origin", f"clicks/{HERE}/4".encode()),
        ("origin_ms", str(MS).encode()),
    ]
    again = rec(9, b"v", timestamp=MS + 50, headers=more["headers"])
    forwarder.forward(again, b"ana", b"v2", 1)
    assert ("origin_ms", str(MS).encode()) in producer.sent[-1][2]["headers"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KafkaTimeoutError("t"), KafkaUnavailable),
        (MessageSizeTooLargeError("m"), MessageSizeTooLargeError),
    ],
)
def test_errors_that_a_retry_may_resolve_are_unavailable_others_are_not(
    error: Exception, raised: type[Exception]
) -> None:
    producer: Any = FakeProducer(error)
    sink = KafkaDeadLetters(SETTINGS, producer)
    sink.put(rec(4, b"x"), Rejected("r", "", "d"))
    with pytest.raises(raised):
        sink.flush()
    sink.flush()  # nothing is left for the next batch


def test_a_name_outlives_its_process_and_is_never_shared(tmp_path: Path) -> None:
    first, second = static_membership.take(tmp_path), static_membership.take(tmp_path)
    assert first.name != second.name
    first.close()
    again = static_membership.take(tmp_path)
    assert again.name == first.name
    second.close()
    again.close()


def test_a_header_without_a_value_is_no_stamp() -> None:
    assert events.produced_us([("produced_us", None), ("other", b"1")]) == 0
    assert events.produced_us([("produced_us", None), ("produced_us", b"17")]) == 17


@pytest.mark.parametrize("more", [-1, 0, 1, 3_000_000])
def test_a_dead_letter_above_the_limit_is_cut_and_says_so(more: int) -> None:
    sent: list[Any] = []

    class Producer:
        def send(self, topic: str, value: bytes, **kept: Any) -> Any:
            sent.append((value, dict(kept["headers"])))

    sink = dead_letters.KafkaDeadLetters(Settings(), Producer())  # type: ignore[arg-type]
    value = b"x" * (dead_letters.VALUE_BYTES_MAX + more)
    sink.put(rec(1, value, b"k", "clicks"), Rejected("malformed_json", "", "no"))
    kept, headers = sent[0]
    assert len(kept) == min(len(value), dead_letters.VALUE_BYTES_MAX)
    cut = more > 0
    assert (headers.get("truncated_from_bytes") == str(len(value)).encode()) is cut
    assert (headers.get("sha256") == hashlib.sha256(value).hexdigest().encode()) is cut


def test_an_item_that_the_tower_cannot_place_is_a_dead_letter_and_the_others_go_on() -> None:
    rig = Rig()
    good, bad, strange = (
        next(f"{name}{n}" for n in range(99) if partition_of(f"{name}{n}", 2) == HERE)
        for name in ("good", "bad", "strange")
    )

    class Tower:
        def encode(self, items: Sequence[Item]) -> Any:
            if any(item.item_id == bad for item in items):
                raise VectorRejected("no vector")
            return np.array(
                [[np.nan, 0] if i.item_id == strange else [1, 0] for i in items], np.float32
            )

    rig.generation.towers.item_tower = Tower()  # type: ignore[misc]
    log = [
        rec(n, events.encode(Item(item_id=item_id)), item_id.encode(), "items")
        for n, item_id in enumerate((good, bad, strange))
    ]
    outcome = ingest(rig.items, HERE, log, 0)
    assert (outcome.applied, outcome.rejected) == (1, 2)
    assert [record.item_id for record in rig.out.published] == [good]
    assert [reason for _, reason in rig.out.letters] == ["bad_vector", "bad_vector"]
    assert set(rig.store.read_item_metadata([good, bad, strange], 1)) == {good}
