"""The entries of visits against plain sums, and when rows are renewed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest

from eddyline.schema import co_visits
from eddyline.schema.co_visits import Visit
from eddyline.schema.item_key import item_key
from eddyline.schema.partitioning import item_slot, item_slots
from eddyline.stores.memory import MemoryStore
from streams.clicks import co_visits as writer
from streams.clicks.co_visit_rows import rows_of
from streams.clicks.co_visits import RENEWED_PART
from tests.co_visit_totals import totals
from tests.unit.streams.test_co_visits import SETTINGS, Rig, click

Rows = dict[tuple[str, str, str], dict[int, tuple[int, int]]]


def plain(visits: Sequence[Visit], done: Mapping[str, int], items: int) -> Rows:
    """(slot, kind, item) -> key of the other item -> counts, in the order of the visits."""
    found: Rows = defaultdict(dict)
    for offset, item, older in visits:
        for distance, other in enumerate(older[:items], 1):
            for kind, of, key in (("after", other, item), ("before", item, other)):
                slot = item_slot(of, len(done))
                if other != item and offset > done[slot]:
                    row = found[slot, kind, of]
                    milli, after = row.get(item_key(key), (0, 0))
                    row[item_key(key)] = milli + round(1_000 / distance), after + (distance == 1)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_entries_are_the_sums_of_the_visits(seed: int) -> None:
    draw = random.Random(seed)
    names = [f"é{n}" for n in range(draw.choice([1, 2, 40]))]
    items = draw.choice([1, 3, 10])
    done = {slot: draw.choice([-1, 20]) for slot in item_slots(draw.choice([1, 3]))}
    visits = [
        (offset, draw.choice(names), [draw.choice(names) for _ in range(draw.randint(0, items))])
        for offset in range(draw.choice([0, 1, 60]))
    ]
    found: dict[Any, list[tuple[int, tuple[int, int]]]] = {}
    for slot, rows in rows_of(visits, done, items).items():
        for kind, of_kind in (("after", rows.after), ("before", rows.before)):
            for item, entries in of_kind.items():
                counts = totals(bytes(co_visits.HEADER_BYTES) + entries)[0]
                found[slot, kind, item] = [*counts.items()]
                assert len(entries) == len(counts) * co_visits.ENTRY_BYTES, "each key once"
    assert found == {row: [*keys.items()] for row, keys in plain(visits, done, items).items()}


def test_a_visit_counts_at_no_more_items_than_set() -> None:
    """The outbox may be of a process with another setting."""
    visits: list[Visit] = [(0, "d", ["c", "b", "a"])]
    assert [*rows_of(visits, {"i0": -1}, 2)["i0"].after] == ["c", "b"]


class Seen(MemoryStore):
    """Keeps which rows were to be renewed, and the time after which they end."""

    def __init__(self) -> None:
        super().__init__()
        self.renewed: list[set[tuple[str, str]]] = []
        self.idle_ms = 0

    def append_co_visits(self, *args: Any) -> None:
        self.renewed.append({*args[-1]})
        self.idle_ms = args[-2]
        super().append_co_visits(*args)


def test_a_row_is_renewed_once_in_a_part_of_its_time() -> None:
    store, idle_s = Seen(), 16_000
    settings = msgspec.structs.replace(SETTINGS, co_visit_idle_s_max=idle_s)
    rig = Rig(settings, store)

    def written(*items: str) -> set[tuple[str, str]]:
        rig.apply([click(rig.at + n, item) for n, item in enumerate(items)])
        rig.at += len(items)
        rig.write()
        return store.renewed[-1]

    assert written("a", "b") == {("after", "a"), ("before", "b")}
    part_s = idle_s / RENEWED_PART
    assert store.idle_ms == 1_000 * (idle_s + part_s)
    rig.now_s = part_s - 1
    assert written("a", "b") == {("after", "b"), ("before", "a")}
    rig.now_s = part_s
    # Of a a moment ago, of b as long ago as a part.
    assert written("a", "b") == {("after", "a"), ("before", "b")}
    # Another process knows nothing of it.
    rig = Rig(settings, store)
    assert ("after", "a") in written("b")


@pytest.mark.parametrize(("limit", "kept"), [(3, 2), (4, 4), (5, 4)])
def test_so_many_renewals_are_known(limit: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "RENEWED_MAX", limit)
    rig = Rig(store=Seen())
    for n, item in enumerate("abc"):
        rig.apply([click(n, item, f"user {n // 2}")])
        rig.write()
    rig.apply([click(3, "d", "user 1")])
    rig.write()
    assert len(rig.clicks.co_visits._renewed) == kept


def test_rows_that_never_end_are_not_renewed() -> None:
    store = Seen()
    rig = Rig(msgspec.structs.replace(SETTINGS, co_visit_idle_s_max=0), store)
    rig.apply([click(0, "a"), click(1, "b")])
    rig.write()
    assert store.renewed == [set()] and store.idle_ms == 0
