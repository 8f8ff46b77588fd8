"""What users had beyond their lists: which events enter, what merges move and Forgets leave."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from eddyline.kafka.topics import CLICKS, SOURCES
from eddyline.schema import events, seen_items
from eddyline.schema.events import KINDS, Click, Forget, Merge
from eddyline.schema.item_key import item_key
from eddyline.schema.seen_items import MINUTE_MS
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import LogId
from streams.handlers import Handlers, Outputs
from tests.applying import ingest

LOG = LogId("cluster", "topic")
MS = 1_700_000_000_000 // MINUTE_MS * MINUTE_MS
SETTINGS = Settings(
    clicks_partitions=1,
    items_partitions=1,
    history_length_max=3,
    lateness_s_max=3_600,
    seen_items_max=50,
    co_visit_items=0,
)
ITEMS = [f"i{n}" for n in range(300)]
NAMES = {item_key(item): item for item in ITEMS}


def record(offset: int, event: Any, minute: int | None = None) -> Any:
    """A record of `clicks`, appended at that minute."""
    at = MS + MINUTE_MS * (offset if minute is None else minute)
    fields = {"partition": 0, "timestamp": at, "headers": (), "topic": CLICKS}
    key = event.user_id.encode()
    return SimpleNamespace(offset=offset, key=key, value=events.encode(event), **fields)


def click(offset: int, item: str, minute: int | None = None, user: str = "ana", **more: Any) -> Any:
    minute = offset if minute is None else minute
    event = Click(user_id=user, item_id=item, at_ms=MS + minute * MINUTE_MS, **more)
    return record(offset, event)


class Rig:
    """A handler of clicks on a store in memory; what it forwards is appended to the same log."""

    def __init__(self, settings: Settings = SETTINGS, store: MemoryStore | None = None) -> None:
        self.settings, self.store = settings, store or MemoryStore()
        self.sent: list[Click] = []
        logs = dict.fromkeys(SOURCES, LOG)
        self.clicks = Handlers(
            settings,
            self.store,
            logs,
            [],
            Outputs.to_sink(self),
            [],  # type: ignore[arg-type]
        ).clicks
        self.clicks.open(0)
        self.clicks.fences.open({0: (0, 10_000)})

    def put(self, record: Any, rejected: Any) -> None:
        raise AssertionError(rejected)

    def forward(self, record: Any, key: bytes, value: bytes | None, partition: int) -> None:
        assert value is not None
        self.sent.append(msgspec.json.decode(value, type=Click))

    def flush(self) -> None:
        pass

    def open(self, partition: int) -> None:
        pass

    def apply(self, records: Sequence[Any], size: int = 10_000) -> Rig:
        for first in range(0, len(records), size):
            ingest(self.clicks, 0, records[first : first + size])
        return self

    def listed(self, user: str = "ana") -> list[str]:
        history = self.store.read_user("u0", 0, user, "").history
        return [entry.item_id for entry in history.entries]

    def seen(self, user: str = "ana") -> list[tuple[str, str, int]]:
        """(item, kind, minute), the newest first; equal minutes by kind."""
        value = self.store.read_user("u0", 0, user, "").seen
        return shown(value, self.settings.seen_items_max)


def shown(value: bytes, items_max: int = 50) -> list[tuple[str, str, int]]:
    found = seen_items.decode(seen_items.canonical(value, items_max), items_max)
    columns = (column.tolist() for column in found)
    return [
        (NAMES[key], KINDS[kind], (at_ms - MS) // MINUTE_MS)
        for key, kind, at_ms in zip(*columns, strict=True)
    ]


def after_all(records: Sequence[Any], **settings: Any) -> Rig:
    """The state after these records, which is that of batches of one."""
    settings_ = msgspec.structs.replace(SETTINGS, **settings)
    whole, single = Rig(settings_).apply(records), Rig(settings_).apply(records, 1)
    assert whole.listed() == single.listed() and whole.seen() == single.seen()
    assert whole.sent == single.sent
    return whole


@pytest.mark.parametrize(
    ("clicks", "beyond"), [(2, 0), (3, 0), (4, 1), (53, 50), (54, 50), (200, 50)]
)
def test_what_leaves_the_full_list_is_kept_up_to_the_limit(clicks: int, beyond: int) -> None:
    found = after_all([click(n, ITEMS[n]) for n in range(clicks)])
    assert len(found.listed()) == min(3, clicks)
    last = clicks - 4
    assert found.seen() == [(ITEMS[n], "click", n) for n in range(last, last - beyond, -1)]


def test_an_item_is_kept_once_for_each_kind_by_its_latest_event() -> None:
    kinds = ["click", "view", "click", "purchase", "click"]
    records = [click(n, "i1", kind=kind) for n, kind in enumerate(kinds)]
    records += [click(10 + n, item) for n, item in enumerate(["i5", "i6", "i7"])]
    assert after_all(records).seen() == [
        ("i1", "click", 4),
        ("i1", "purchase", 3),
        ("i1", "view", 1),
    ]


def test_an_item_in_the_list_may_be_there_too() -> None:
    records = [click(n, item) for n, item in enumerate(["i1", "i2", "i3", "i1"])]
    found = after_all(records)
    assert (found.listed(), found.seen()) == (["i1", "i3", "i2"], [("i1", "click", 0)])


def test_what_comes_too_late_for_the_list_is_kept() -> None:
    records = [click(100, "i1"), click(101, "i2", 39), click(102, "i3", 40)]
    found = after_all(records)
    assert (found.listed(), found.seen()) == (["i1", "i3"], [("i2", "click", 39)])


def test_what_is_too_old_for_the_list_is_kept() -> None:
    records = [click(0, "i1"), click(5, "i2"), click(20, "i3")]
    found = after_all(records, history_age_s_max=900)
    assert (found.listed(), found.seen()) == (["i3", "i2"], [("i1", "click", 0)])


def test_a_shorter_list_gives_up_all_that_it_loses() -> None:
    rig = Rig(msgspec.structs.replace(SETTINGS, history_length_max=9))
    rig.apply([click(n, ITEMS[n]) for n in range(9)])
    rig = Rig(SETTINGS, rig.store).apply([click(9, "i9")])
    assert rig.listed() == ["i9", "i8", "i7"]
    assert rig.seen() == [(ITEMS[n], "click", n) for n in range(6, -1, -1)]


def test_none_are_kept_where_the_setting_is_0() -> None:
    found = after_all([click(n, ITEMS[n]) for n in range(9)], seen_items_max=0)
    assert found.seen() == [] and found.store.snapshot().seen == {}


def test_a_merge_with_the_setting_at_0_leaves_nothing_behind() -> None:
    rig = Rig().apply([click(n, ITEMS[n]) for n in range(9)])
    rig = Rig(msgspec.structs.replace(SETTINGS, seen_items_max=0), rig.store)
    rig.apply([record(9, Merge(user_id="ana", merge_into="bo", at_ms=MS))])
    assert rig.store.snapshot().seen == {} and len(rig.sent) == 3
    assert all(one.context == events.MOVED for one in rig.sent)


def merged(n: int, **settings: Any) -> tuple[Rig, list[Any]]:
    """A visitor of n clicks was merged into bo, who had i200 … i204. Returns the moved records."""
    records = [click(k, f"i{200 + k}", user="bo") for k in range(5)]
    records += [click(10 + k, ITEMS[k]) for k in range(n)]
    records.append(record(300, Merge(user_id="ana", merge_into="bo", at_ms=MS)))
    rig = after_all(records, **settings)
    moved = [record(310 + k, one, 300) for k, one in enumerate(rig.sent)]
    return rig, moved


@pytest.mark.parametrize("clicks", [3, 4, 60, 200])
def test_a_merge_moves_them_with_the_last_click(clicks: int) -> None:
    rig, moved = merged(clicks, seen_items_max=70)
    assert rig.seen() == [] and rig.listed() == []
    assert [one.item_id for one in rig.sent] == ITEMS[clicks - 3 : clicks]
    carried = [seen_items.moved_texts(one) for one in rig.sent]
    assert carried[:2] == [{}, {}] and len(carried[2]) == -(-min(70, clicks - 3) // 62)
    rig.apply(moved)
    assert rig.listed("bo") == ITEMS[clicks - 3 : clicks][::-1]
    own = [(f"i{200 + k}", "click", k) for k in range(4, -1, -1)]
    of_ana = [(ITEMS[k], "click", 10 + k) for k in range(clicks - 4, -1, -1)]
    assert rig.seen("bo") == (of_ana + own)[:70]


def test_a_merge_in_the_batch_of_the_clicks_moves_what_is_not_written_yet() -> None:
    rig = Rig().apply([click(n, ITEMS[n]) for n in range(6)])
    more = [click(6 + n, ITEMS[6 + n]) for n in range(3)]
    rig.apply([*more, record(9, Merge(user_id="ana", merge_into="bo", at_ms=MS)), click(10, "i50")])
    last = rig.sent[-1]
    assert shown(seen_items.from_texts(seen_items.moved_texts(last))) == [
        (ITEMS[n], "click", n) for n in range(5, -1, -1)
    ]
    assert (rig.listed(), rig.seen()) == (["i50"], [])


def test_moved_ones_that_come_again_change_nothing() -> None:
    rig, moved = merged(60)
    rig.apply(moved)
    before = rig.seen("bo"), rig.listed("bo")
    again = [SimpleNamespace(**{**vars(one), "offset": one.offset + 100_000}) for one in moved]
    rig = Rig(msgspec.structs.replace(rig.settings, dedupe_window_events=512), rig.store)
    rig.clicks.fences.open({0: (0, 200_000)})
    rig.apply(again)
    assert (rig.seen("bo"), rig.listed("bo")) == before


def test_a_forget_leaves_what_is_later_than_its_bound() -> None:
    """Entries of a user who came back before ingest read the request."""
    records = [click(n, ITEMS[n]) for n in range(10)]
    forget = Forget(
        user_id="ana", forget_until_ms=MS + 2 * MINUTE_MS, keep_after_ms=MS + 4 * MINUTE_MS
    )
    found = after_all([*records, record(10, forget)])
    assert found.listed() == ["i9", "i8", "i7"]
    assert found.seen() == [("i6", "click", 6), ("i5", "click", 5)]
    every = msgspec.structs.replace(forget, keep_after_ms=MS + 9 * MINUTE_MS)
    gone = after_all([*records, record(10, every)])
    assert gone.listed() == [] and gone.seen() == [] and gone.store.snapshot().seen == {}


def test_what_comes_after_the_forget_begins_anew() -> None:
    forget = Forget(user_id="ana", forget_until_ms=MS + 9 * MINUTE_MS)
    records = [click(n, ITEMS[n]) for n in range(10)]
    records += [record(10, forget), *(click(11 + n, ITEMS[n]) for n in range(5))]
    found = after_all(records)
    assert found.seen() == [("i1", "click", 12), ("i0", "click", 11)]


def test_moved_ones_of_before_a_forget_are_dropped_one_by_one() -> None:
    """The visitor's last click is later than the erasure; not all that it carries is."""
    rig, moved = merged(60)
    forget = Forget(user_id="bo", forget_until_ms=MS + 40 * MINUTE_MS)
    rig.apply([record(305, forget, 290), *moved])
    assert rig.listed("bo") == ["i59", "i58", "i57"]
    assert rig.seen("bo") == [(ITEMS[k], "click", 10 + k) for k in range(56, 30, -1)]


def test_an_idle_user_begins_anew() -> None:
    records = [click(n, ITEMS[n]) for n in range(6)]
    records += [click(200 + n, ITEMS[100 + n]) for n in range(4)]
    found = after_all(records, user_idle_s_max=3_600)
    assert found.seen() == [("i100", "click", 200)]
