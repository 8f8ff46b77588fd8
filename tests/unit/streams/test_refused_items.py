"""Item changes that a tower refuses: the state does not depend on the batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eddyline.errors import KafkaUnavailable, VectorRejected
from eddyline.kafka.topics import ITEMS
from eddyline.schema import events
from eddyline.schema.events import Item
from eddyline.stores.memory import MemoryStore
from tests.applying import ingest
from tests.simulation.test_ingest_faults import Rec
from tests.unit.streams.test_generations import MS, Process, Towers

# item, kind: None deletes it, a title is a version of it. "hidden" is not available.
Change = tuple[str, str | None]
# Titles that both towers refuse, and that only the new one refuses.
BOTH, NEW = "refused", "refused by new"


class TitleTowers(Towers):
    """Towers that refuse items by their title."""

    def __init__(self, generation: str, shift: float, *refused: str) -> None:
        super().__init__(generation, 2, shift)
        self.titles = set(refused)

    def encode(self, *arguments: Any) -> Any:
        if len(arguments) == 1 and any(item.title in self.titles for item in arguments[0]):
            raise VectorRejected("no vector")
        return super().encode(*arguments)


def process(store: MemoryStore) -> Process:
    return Process(store, TitleTowers("old", 0, BOTH), TitleTowers("new", 1, BOTH, NEW))


def records(log: Sequence[Change]) -> list[Rec]:
    made = []
    for offset, (item_id, title) in enumerate(log):
        item = Item(item_id=item_id, title=title or "", available=title != "hidden", at_ms=MS)
        value = None if title is None else events.encode(item)
        made.append(Rec(ITEMS, 0, offset, MS, item_id.encode(), value))
    return made


def state(p: Process) -> tuple[Any, Any]:
    """(metadata by item, by generation the last record of each item)."""
    metadata = p.store.read_item_metadata(["a", "b"], 1)
    last = [{r.item_id: (r.offset, r.vector is None) for r in topic.records} for topic in p.topics]
    return metadata, last


def applied(log: Sequence[Change], sizes: Sequence[int]) -> tuple[Any, list[tuple[int, str]]]:
    p, rest, at = process(MemoryStore()), records(log), 0
    for size in sizes:
        ingest(p.handlers.items, 0, rest[at : at + size])
        at += size
    return state(p), sorted(p.letters.letters)


def test_a_delete_holds_where_a_later_version_is_refused() -> None:
    log: list[Change] = [("a", "first"), ("a", None), ("a", BOTH)]
    (metadata, published), letters = applied(log, [3])
    assert metadata["a"].deleted and metadata["a"].offset == 1
    assert [some["a"] for some in published] == [(1, True), (1, True)]
    assert letters == [(2, "bad_vector")]


titles = st.sampled_from([None, "first", "second", "hidden", BOTH, NEW])
logs = st.lists(st.tuples(st.sampled_from("ab"), titles), min_size=1, max_size=8)


@settings(deadline=None)
@given(logs, st.data())
def test_the_state_does_not_depend_on_the_batches(log: list[Change], data: st.DataObject) -> None:
    sizes: list[int] = []
    while sum(sizes) < len(log):
        sizes.append(data.draw(st.integers(1, len(log) - sum(sizes))))
    assert applied(log, sizes) == applied(log, [1] * len(log))


@pytest.mark.parametrize("title", [BOTH, NEW])
def test_a_version_that_was_refused_before_a_crash_is_refused_again(title: str) -> None:
    """The fence of publishing may be ahead of that of the metadata."""
    log: list[Change] = [("a", "first"), ("a", title)]
    p = process(MemoryStore())
    write = p.store.write_item_metadata_many
    p.store.write_item_metadata_many = lambda writes: (
        write(  # type: ignore[method-assign]
            [one for one in writes if one.source.name != ITEMS]
        )
        + [KafkaUnavailable("died") for one in writes if one.source.name == ITEMS]
    )
    with pytest.raises(KafkaUnavailable):
        ingest(p.handlers.items, 0, records(log))
    p.store.write_item_metadata_many = write  # type: ignore[method-assign]
    again = process(p.store)
    assert again.next[ITEMS] == 0
    ingest(again.handlers.items, 0, records(log))
    assert p.store.read_item_metadata(["a"], 1) == applied(log, [1, 1])[0][0]
