"""Co-visits: which pairs a click gives, and that each is counted once, whatever fails."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from eddyline.errors import FenceMoved, StoreUnavailable
from eddyline.kafka.topics import CLICKS, SOURCES
from eddyline.schema import events
from eddyline.schema.events import Click, Forget, Merge
from eddyline.schema.item_key import item_key
from eddyline.schema.partitioning import item_slot
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, LogId, Source, UserEffects
from streams.clicks.co_visits import VISITS_MAX
from streams.clicks.handler import ClickHandler
from streams.clicks.item_slot_writes import WAIT_S
from streams.fences import co_visit_sources
from streams.handlers import Handlers, Outputs
from streams.operations.state_replay import _ReplaySinks
from tests.applying import ingest
from tests.co_visit_totals import totals

LOG = LogId("cluster", "topic")
MS = 1_700_000_000_000
PAIRS = Source("co-visits", 0)
SETTINGS = Settings(clicks_partitions=1, items_partitions=1, path_state="all", co_visit_items=3)
ITEMS = list("abcdefgh")


def record(offset: int, event: Any) -> Any:
    key = event.user_id.encode()
    fields = {"partition": 0, "timestamp": MS + offset, "headers": (), "topic": CLICKS}
    return SimpleNamespace(offset=offset, key=key, value=events.encode(event), **fields)


def click(offset: int, item: str, user: str = "ana", **more: Any) -> Any:
    fields = {"at_ms": MS + offset} | more
    return record(offset, Click(user_id=user, item_id=item, **fields))


class Rig:
    """A handler of clicks on a store in memory. at: the next offset to read; now_s: its clock."""

    def __init__(
        self,
        settings: Settings = SETTINGS,
        store: MemoryStore | None = None,
        follows: Callable[[str], bool] | None = None,
    ) -> None:
        self.settings, self.store = settings, store or MemoryStore()
        self.now_s = 0.0
        sinks = _ReplaySinks({})
        logs = dict.fromkeys(SOURCES, LOG)
        self.clicks: ClickHandler = Handlers(
            settings, self.store, logs, [], Outputs.to_sink(sinks), [], follows=follows
        ).clicks
        for part in (self.clicks.popularity, self.clicks.co_visits):
            part._clock_s = lambda: self.now_s
        self.open()

    def open(self) -> None:
        self.clicks.open(0)
        self.at = self.clicks.fences.open({0: (0, 10_000)})[0]
        self.clicks.prepare([0])

    def apply(self, records: Sequence[Any]) -> None:
        ingest(self.clicks, 0, records)

    def write(self) -> None:
        self.clicks.write_behind.write(0)

    def rows(self) -> dict[tuple[str, str], dict[str, tuple[int, int]]]:
        """(kind, item) -> other item -> (thousandths of visits, next visits)."""
        names, found = {item_key(item): item for item in ITEMS}, {}
        for (_, kind, item), row in self.store.snapshot().rows.items():
            others = totals(row)[0]
            found[kind, item] = {names[key]: counts for key, counts in others.items()}
        return found

    def pairs(self) -> dict[str, tuple[int, int]]:
        """`a>b` -> the counts of visits of b after a, which both rows have."""
        rows = self.rows()
        after = {
            f"{item}>{other}": counts
            for (kind, item), others in rows.items()
            for other, counts in others.items()
            if kind == "after"
        }
        before = {
            f"{other}>{item}": counts
            for (kind, item), others in rows.items()
            for other, counts in others.items()
            if kind == "before"
        }
        assert after == before
        return after

    def outbox(self) -> list[int]:
        return [visit[0] for visit in self.store.read_slot("u0", Source(CLICKS, 0)).visits]


def paired(records: Sequence[Any], **settings: Any) -> dict[str, tuple[int, int]]:
    """The pairs of these records, the same in one batch and in batches of one."""
    found = []
    for size in (len(records), 1):
        rig = Rig(msgspec.structs.replace(SETTINGS, **settings))
        for first in range(0, len(records), size):
            rig.apply(records[first : first + size])
        rig.write()
        found.append(rig.pairs())
    assert found[0] == found[1]
    return found[0]


def test_a_click_is_paired_with_the_older_items_by_their_distance() -> None:
    clicks = [click(n, item) for n, item in enumerate("abcde")]
    assert paired(clicks) == {
        "a>b": (1_000, 1),
        "b>c": (1_000, 1),
        "a>c": (500, 0),
        "c>d": (1_000, 1),
        "b>d": (500, 0),
        "a>d": (333, 0),
        "d>e": (1_000, 1),
        "c>e": (500, 0),
        "b>e": (333, 0),
    }


@pytest.mark.parametrize("items", [1, 2, 3])
def test_so_many_older_items_are_paired_as_the_setting_says(items: int) -> None:
    clicks = [click(n, item) for n, item in enumerate("abcd")]
    pairs = paired(clicks, co_visit_items=items)
    assert [pair for pair in ("c>d", "b>d", "a>d") if pair in pairs] == (
        ["c>d", "b>d", "a>d"][:items]
    )


def test_the_same_item_is_skipped_and_counts_for_the_distance() -> None:
    clicks = [click(n, item) for n, item in enumerate("abb")]
    assert paired(clicks) == {"a>b": (1_500, 1)}
    assert paired([click(0, "a"), click(1, "a")]) == {}


def test_dislikes_neither_pair_nor_count_for_the_distance() -> None:
    clicks = [click(0, "a"), click(1, "b", kind="dislike"), click(2, "c")]
    assert paired(clicks) == {"a>c": (1_000, 1)}


def test_a_late_click_is_paired_with_what_is_older_than_it() -> None:
    late = click(3, "c", at_ms=MS + 1)
    clicks = [click(0, "a"), click(1, "b", at_ms=MS + 5), late, click(4, "d", at_ms=MS + 9)]
    assert paired(clicks) == {
        "a>b": (1_000, 1),
        "a>c": (1_000, 1),
        "b>d": (1_000, 1),
        "c>d": (500, 0),
        "a>d": (333, 0),
    }


def test_a_click_at_the_same_time_is_newer_than_those_before_it() -> None:
    clicks = [click(n, item, at_ms=MS) for n, item in enumerate("ab")]
    assert paired(clicks) == {"a>b": (1_000, 1)}


def test_a_click_that_does_not_enter_the_list_gives_no_pair() -> None:
    bounds = {"lateness_s_max": 10, "history_length_max": 3}
    clicks = [click(n, item, at_ms=MS + 20_000 + n) for n, item in enumerate("abc")]
    known = paired(clicks, **bounds)
    assert paired([*clicks, click(4, "d", at_ms=MS)], **bounds) == known
    # Older than every entry of a full list: it leaves at once.
    assert paired([*clicks, click(4, "d", at_ms=MS + 19_999)], **bounds) == known
    assert paired([*clicks, click(4, "d", at_ms=MS + 20_001)], **bounds) != known


def test_each_user_has_pairs_of_their_own() -> None:
    clicks = [click(0, "a"), click(1, "b", "bo"), click(2, "c"), click(3, "d", "bo")]
    assert paired(clicks) == {"a>c": (1_000, 1), "b>d": (1_000, 1)}


def test_moved_entries_give_no_pairs_and_are_paired_with() -> None:
    moved = click(1, "b", at_ms=MS + 1, context=events.moved_context(0))
    clicks = [click(0, "a"), moved, click(2, "c")]
    assert paired(clicks) == {"b>c": (1_000, 1), "a>c": (500, 0)}


def test_a_user_starts_afresh_after_a_merge_a_forget_and_idle_time() -> None:
    merge = record(1, Merge(user_id="ana", merge_into="bo"))
    forget = record(1, Forget(user_id="ana", forget_until_ms=MS + 1))
    for between in ([merge], [forget], []):
        last = click(2, "b", at_ms=MS + 5_000)
        last.timestamp = MS + 5_000
        assert paired([click(0, "a"), *between, last], user_idle_s_max=3) == {}


def test_a_duplicate_gives_no_pairs() -> None:
    clicks = [click(0, "a"), click(1, "b", event_id="e"), click(2, "b", event_id="e")]
    assert paired(clicks) == {"a>b": (1_000, 1)}


def test_users_that_are_not_followed_make_no_pairs() -> None:
    rig = Rig(follows=lambda user: user == "ana")
    rig.apply([click(0, "a"), click(1, "c", "bo"), click(2, "b"), click(3, "d", "bo")])
    rig.write()
    assert rig.pairs() == {"a>b": (1_000, 1)}


@pytest.mark.parametrize("off", [{"co_visit_items": 0}, {"path_state": "used"}])
def test_without_co_visits_nothing_is_kept(off: dict[str, Any]) -> None:
    settings = msgspec.structs.replace(SETTINGS, **off)
    rig = Rig(settings)
    rig.apply([click(n, item) for n, item in enumerate("abc")])
    rig.write()
    state = rig.store.snapshot()
    assert state.rows == {} == state.visits and co_visit_sources(settings, 0) == {}
    assert rig.store.fences(PAIRS, ["i0"]) == {"i0": None}
    # Switched on, they begin there; switched off and on again, none is lost or doubled.
    on = Rig(SETTINGS, rig.store)
    assert on.at == 3
    on.apply([click(3, "d")])
    off = Rig(settings, rig.store)
    off.apply([click(4, "e")])
    off.write()
    on = Rig(SETTINGS, rig.store)
    on.apply([click(5, "f")])
    on.write()
    assert on.pairs().keys() == {"c>d", "b>d", "a>d", "e>f", "d>f", "c>f"}
    assert on.clicks.co_visits.lost == 0


def test_pending_visits_outlive_the_process() -> None:
    rig = Rig()
    rig.apply([click(0, "a"), click(1, "b")])
    assert rig.pairs() == {} and rig.outbox() == [1]
    rig = Rig(store=rig.store)
    assert rig.at == 0  # the popularity counts are pending too
    rig.apply([click(0, "a"), click(1, "b"), click(2, "c")])
    rig.write()
    assert rig.pairs() == {"a>b": (1_000, 1), "b>c": (1_000, 1), "a>c": (500, 0)}
    rig = Rig(store=rig.store)
    assert rig.at == 3 and rig.clicks.co_visits.pending() == []
    assert rig.store.fences(PAIRS, ["i0"])["i0"] == Fence(2, LOG)


def test_visits_of_the_outbox_are_written_without_a_further_click() -> None:
    rig = Rig()
    rig.apply([click(0, "a"), click(1, "b")])
    rig.clicks.popularity.write(0)
    rig = Rig(store=rig.store)
    assert rig.at == 2 and rig.clicks.write_behind.due() == []
    rig.now_s = WAIT_S
    assert rig.clicks.write_behind.due() == [0]
    assert rig.clicks.flush_due({0}) is None
    assert rig.pairs() == {"a>b": (1_000, 1)}


def test_the_outbox_shrinks_behind_the_rows() -> None:
    rig = Rig()
    for n in range(30):
        rig.apply([click(n, ITEMS[n % 8])])
        rig.now_s += WAIT_S / 3
    assert len(rig.outbox()) <= 9
    rig.write()
    assert Rig(store=rig.store).pairs() == rig.pairs()
    assert sum(count for _, count in rig.pairs().values()) == 29


class Failing(MemoryStore):
    """fail: item slots whose rows cannot be written; lose: whether the answers are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.fail: set[str] = set()
        self.lose = False

    def append_co_visits(self, slot: str, *args: Any) -> None:  # type: ignore[override]
        if slot in self.fail:
            raise StoreUnavailable("away")
        super().append_co_visits(slot, *args)
        if self.lose:
            raise StoreUnavailable("the answer was lost")


def test_while_the_rows_cannot_be_written_the_outbox_is_limited() -> None:
    store = Failing()
    store.fail = {"i0"}
    rig = Rig(store=store)
    refused = 0
    for n in range(VISITS_MAX + 20):
        try:
            rig.apply([click(rig.at, ITEMS[rig.at % 8])])
            rig.at += 1
        except StoreUnavailable:
            refused += 1
            rig.clicks.popularity.write(0)
            rig.open()
    assert refused == 19 and len(rig.outbox()) == VISITS_MAX
    store.fail = set()
    end = rig.at
    while rig.at < end + 10:
        rig.apply([click(rig.at, ITEMS[rig.at % 8])])
        rig.at += 1
    rig.write()
    assert sum(count for _, count in rig.pairs().values()) == rig.at - 1


@pytest.mark.parametrize("lose", [False, True])
def test_a_write_to_some_item_slots_is_completed_after_a_restart(lose: bool) -> None:
    settings = msgspec.structs.replace(SETTINGS, item_slots=2)
    assert {item_slot(item, 2) for item in ITEMS} == {"i0", "i1"}
    clicks = [click(n, item) for n, item in enumerate("abcdefgh")]
    store = Failing()
    rig = Rig(settings, store)
    rig.apply(clicks[:4])
    store.fail, store.lose = ({"i1"}, False) if not lose else (set(), True)
    with pytest.raises(StoreUnavailable):
        rig.clicks.co_visits.write(0)
    store.fail, store.lose = set(), False
    assert store.fences(PAIRS, ["i0", "i1"]) == {"i0": Fence(3, LOG), "i1": None}
    rig.open()
    rig.apply([one for one in clicks if one.offset >= rig.at])
    rig.write()
    whole = Rig(settings)
    whole.apply(clicks)
    whole.write()
    assert rig.pairs() == whole.pairs() and rig.rows() == whole.rows()
    fences = rig.store.fences(PAIRS, ["i0", "i1"])
    assert fences == {"i0": Fence(7, LOG), "i1": Fence(7, LOG)}


def test_a_refused_write_in_the_background_sends_the_partition_back() -> None:
    store = Failing()
    rig = Rig(store=store)
    rig.apply([click(0, "a"), click(1, "b")])
    rig.now_s, store.fail = WAIT_S, {"i0"}
    assert rig.clicks.flush_due({0}) == 0
    with pytest.raises(FenceMoved):
        rig.apply([click(2, "c")])
    store.fail = set()
    rig.open()
    rig.apply([click(2, "c")])
    rig.write()
    assert rig.pairs() == {"a>b": (1_000, 1), "b>c": (1_000, 1), "a>c": (500, 0)}


def test_visits_are_not_lost_where_the_fences_pass_offsets_without_a_record() -> None:
    rig = Rig()
    rig.apply([click(0, "a"), click(1, "b")])
    rig.clicks.popularity.write(0)
    rig = Rig(store=rig.store)
    rig.clicks.move_fences(0, 7)
    assert rig.pairs() == {"a>b": (1_000, 1)}
    assert rig.store.fences(PAIRS, ["i0"]) == {"i0": Fence(7, LOG)}


def test_two_owners_count_once() -> None:
    """The former owner of a partition writes what the new one has found in the outbox."""
    old = Rig()
    old.apply([click(0, "a"), click(1, "b")])
    new = Rig(store=old.store)
    old.clicks.co_visits.write(0)
    with pytest.raises(FenceMoved, match="co-visits"):
        new.clicks.co_visits.write(0)
    new.open()
    new.apply([click(0, "a"), click(1, "b"), click(2, "c")])
    new.write()
    assert new.pairs() == {"a>b": (1_000, 1), "b>c": (1_000, 1), "a>c": (500, 0)}
    assert old.clicks.fences.find_diverged([0]) == [0] and not new.clicks.fences.find_diverged([0])


@pytest.mark.parametrize(("back", "lost"), [(5, 0), (4, 0), (3, 1), (0, 4), (None, 5)])
def test_an_item_slot_that_goes_back_too_far_loses_visits_visibly(
    back: int | None, lost: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Its server lost more than the outbox, on another server, still has."""
    rig = Rig()
    for first, last in ((0, 5), (5, 9), (9, 10)):
        rig.apply([click(n, ITEMS[n % 8]) for n in range(first, last)])
        rig.write()
    assert rig.store.read_slot("u0", Source(CLICKS, 0)).visits_floor == 5
    state = rig.store.snapshot()
    state.fences.pop(("i0", PAIRS))
    if back is not None:
        state.fences["i0", PAIRS] = Fence(back, LOG)
    rig.store.restore(state)
    with caplog.at_level(logging.WARNING):
        after = Rig(store=rig.store)
    assert after.at == 10 and after.clicks.co_visits.lost == lost
    assert ("co-visits are lost" in caplog.text) == bool(lost)
    after.write()
    assert after.store.fences(PAIRS, ["i0"]) == {"i0": Fence(9, LOG)}
    assert Rig(store=rig.store).clicks.co_visits.lost == 0


@pytest.mark.parametrize("restart", [False, True])
def test_a_store_that_loses_the_last_rows_alone_gets_them_again(restart: bool) -> None:
    """The fence of the users is the expected one: only a later write to the rows shows it."""
    rig, clicks = Rig(), [click(n, ITEMS[n % 8]) for n in range(12)]
    rig.apply(clicks[:4])
    rig.write()
    rig.apply(clicks[4:6])
    state = rig.store.snapshot()
    rig.write()
    if restart:
        rig = Rig(store=rig.store)
    rig.store.restore(state)
    rig.apply(clicks[6:8])
    with pytest.raises(FenceMoved):
        rig.write()
    rig.open()
    rig.apply([one for one in clicks if one.offset >= rig.at])
    rig.write()
    whole = Rig()
    whole.apply(clicks)
    whole.write()
    assert rig.pairs() == whole.pairs() and rig.clicks.co_visits.lost == 0


def test_a_store_that_goes_back_as_a_whole_loses_nothing() -> None:
    rig, clicks = Rig(), [click(n, ITEMS[n % 8]) for n in range(12)]
    rig.apply(clicks[:5])
    rig.write()
    state = rig.store.snapshot()
    rig.apply(clicks[5:9])
    rig.write()
    pairs = rig.pairs()
    rig.store.restore(state)
    assert rig.clicks.fences.find_diverged([0]) == [0]
    rig.open()
    assert rig.at == 5
    rig.apply(clicks[5:9])
    rig.write()
    assert rig.pairs() == pairs and rig.clicks.co_visits.lost == 0


def test_a_slot_of_an_older_version_begins_at_its_fence() -> None:
    store = MemoryStore()
    store.write_users("u0", Source(CLICKS, 0), None, Fence(4, LOG), UserEffects())
    store.count_clicks("i0", Source(CLICKS, 0), None, Fence(4, LOG), {}, 9)
    rig = Rig(store=store)
    assert rig.at == 5 and rig.clicks.co_visits.lost == 0
    rig.write()
    assert store.fences(PAIRS, ["i0"]) == {"i0": Fence(4, LOG)}


def test_a_forgotten_user_who_is_kept_out_leaves_the_visits_of_others() -> None:
    rig = Rig()
    rig.apply([click(0, "a"), click(1, "b")])
    rig.clicks.keep_erasures(0, {}, 5)
    rig.write()
    assert rig.pairs() == {"a>b": (1_000, 1)}
    assert rig.store.fences(PAIRS, ["i0"]) == {"i0": Fence(5, LOG)}


@contextlib.contextmanager
def counting_calls(store: MemoryStore) -> Iterator[list[int]]:
    calls, write = [0], store.append_co_visits

    def counted(*args: Any) -> None:
        calls[0] += 1
        write(*args)

    store.append_co_visits = counted  # type: ignore[method-assign]
    yield calls
    store.append_co_visits = write  # type: ignore[method-assign]


@pytest.mark.parametrize(("visits", "writes"), [(-1, 0), (0, 1), (1, 1)])
def test_so_many_pending_visits_are_written_before_the_next_batch(visits: int, writes: int) -> None:
    rig = Rig()
    rig.apply([click(0, "a")])
    rig.apply([click(n, ITEMS[n % 8]) for n in range(1, VISITS_MAX + visits + 1)])
    with counting_calls(rig.store) as calls:
        rig.apply([click(5_000, "a")])
        assert calls == [writes]


def test_the_rows_of_a_batch_are_limited_by_the_settings() -> None:
    rig = Rig(msgspec.structs.replace(SETTINGS, co_visit_row_max=4))
    rig.apply([click(n, ITEMS[n % 8]) for n in range(200)])
    rig.write()
    for row in rig.store.snapshot().rows.values():
        others, milli, after = totals(row)
        assert len(others) <= 4 and milli > 4_000 and after >= 24
