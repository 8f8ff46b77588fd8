"""Two generations in one ingest process: each has its towers, embeddings, item vectors, fence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from eddyline.errors import EddylineError, KafkaUnavailable, Rejected, VectorRejected
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema import events
from eddyline.schema.events import Click, Forget, Item
from eddyline.schema.item_record import ItemRecord
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import LogId
from streams.generation import Generation
from streams.handlers import Handlers, Outputs
from streams.ports import Outcome, RecordPublisher
from tests.applying import ingest
from tests.simulation.test_ingest_faults import Rec

LOG = LogId("cluster", "topic")
MS = 1_700_000_000_000
ANA = "ana"
SETTINGS = Settings(clicks_partitions=1, items_partitions=1, dedupe_window_events=512)


class Towers:
    """Towers of vectors with `dimension` numbers; `shift` makes their results differ."""

    def __init__(self, generation: str, dimension: int, shift: float) -> None:
        self.generation, self.dimension = generation, dimension
        self.item_tower = self.user_tower = self.micro = self
        self.item_vectors = np.full((3, dimension), shift, np.float32)
        self.rows = {f"i{n}": n for n in range(3)}
        self.history_max, self.min_steps_before = 4, 1
        self.refused: set[str] = set()
        self._shift = np.float32(shift)

    def encode(self, *arguments: Any) -> Any:
        if len(arguments) == 3:  # the user tower
            return np.full((len(arguments[1]), self.dimension), self._shift, np.float32)
        [items] = arguments
        if self.refused & {item.item_id for item in items}:
            raise VectorRejected("no vector")
        vectors = np.zeros((len(items), self.dimension), np.float32)
        vectors[:, int(self._shift)] = 1
        return vectors

    def step(self, forward: Any, embedding: Any, targets: Any, event_keys: Sequence[str]) -> Any:
        return (embedding + forward + np.float32(1)).astype(np.float32)


class Topic(RecordPublisher):
    """The topic of item vectors of one generation."""

    def __init__(self) -> None:
        self.records: list[ItemRecord] = []
        self.away = self.closed = False

    def open(self, partition: int) -> None:
        pass

    def publish(self, records: Mapping[int, Sequence[ItemRecord]]) -> dict[int, EddylineError]:
        if self.away or self.closed:
            return {partition: KafkaUnavailable("away") for partition in records}
        for some in records.values():
            self.records += some
        return {}

    def close(self) -> None:
        self.closed = True


class Letters:
    def __init__(self) -> None:
        self.letters: list[tuple[int, str]] = []

    def put(self, record: Any, rejected: Rejected) -> None:
        self.letters.append((record.offset, rejected.reason))

    def forward(self, record: Any, key: bytes, value: bytes | None, partition: int) -> None:
        pass

    def flush(self) -> None:
        pass


class Process:
    """The handlers of one process, opened on a store."""

    def __init__(self, store: MemoryStore, *towers: Towers) -> None:
        self.store, self.letters = store, Letters()
        self.topics = [Topic() for _ in towers]
        self.generations = [
            Generation(one, topic) for one, topic in zip(towers, self.topics, strict=True)
        ]
        self.handlers = Handlers(
            SETTINGS,
            store,
            {CLICKS: LOG, USERS: LOG, ITEMS: LOG},
            self.generations,
            Outputs.to_sink(self.letters),
            [one.generation for one in towers],
            items_wait_s=0.0,
        )
        self.next = {topic: self.open(topic) for topic in (CLICKS, USERS, ITEMS)}

    def open(self, topic: str) -> int:
        handler = self.handlers.of(topic)
        handler.open(0)
        return handler.fences.open({0: (0, 1_000)})[0]

    def click(self, *items: str, user: str = ANA) -> Outcome:
        records = []
        for item_id in items:
            offset = self.next[CLICKS]
            self.next[CLICKS] += 1
            click = Click(user_id=user, item_id=item_id, at_ms=MS + offset)
            records.append(Rec(CLICKS, 0, offset, MS, user.encode(), events.encode(click)))
        return ingest(self.handlers.clicks, 0, records)

    def forget(self, user: str = ANA) -> None:
        offset = self.next[CLICKS]
        self.next[CLICKS] += 1
        value = events.encode(Forget(user_id=user, forget_until_ms=MS + offset))
        ingest(self.handlers.clicks, 0, [Rec(CLICKS, 0, offset, MS, user.encode(), value)])

    def change(self, *items: str) -> Outcome:
        records = []
        for item_id in items:
            value = events.encode(Item(item_id=item_id, at_ms=MS))
            records.append(Rec(ITEMS, 0, self.next[ITEMS], MS, item_id.encode(), value))
            self.next[ITEMS] += 1
        return ingest(self.handlers.items, 0, records)

    def embedding(self, generation: str, user: str = ANA) -> tuple[int, list[float]] | None:
        found = self.store.read_user("u0", 0, user, generation).embedding
        return None if found is None else (found[0], np.frombuffer(found[1], "<f4").tolist())

    def published(self) -> list[list[tuple[str, int, list[float]]]]:
        return [
            [(r.item_id, r.offset, np.asarray(r.vector).tolist()) for r in topic.records]
            for topic in self.topics
        ]


def two() -> tuple[Towers, Towers]:
    assert partition_of(ANA, 1) == 0
    return Towers("old", 2, 1.0), Towers("new", 3, 2.0)


def test_a_click_moves_the_embeddings_of_both_by_their_own_towers() -> None:
    both = Process(MemoryStore(), *two())
    outcome = both.click("i0", "i1", "i2", "unknown")
    # The first event is only counted; a step adds the forward, 1 or 2, and 1.
    assert both.embedding("old") == (3, [4.0, 4.0])
    assert both.embedding("new") == (3, [6.0, 6.0, 6.0])
    assert (outcome.applied, outcome.steps) == (4, 4)
    both.click("i0")  # from the cache
    assert both.embedding("old") == (4, [6.0, 6.0]) and both.embedding("new") == (4, [9.0] * 3)
    both.handlers.clicks.flush()
    again = Process(both.store, *two())  # from the store
    again.click("i0")
    assert again.embedding("old") == (5, [8.0, 8.0]) and again.embedding("new") == (5, [12.0] * 3)


def test_each_generation_counts_the_items_that_it_has() -> None:
    old, new = two()
    old.rows = {"i0": 0}
    both = Process(MemoryStore(), old, new)
    both.click("i0", "i1", "i0", "i1")
    assert both.embedding("old") == (2, [2.0, 2.0]) and both.embedding("new") == (4, [9.0] * 3)


def test_two_generations_give_each_what_it_would_have_alone() -> None:
    both, alone = Process(MemoryStore(), *two()), [Process(MemoryStore(), one) for one in two()]
    for process in (both, *alone):
        process.change("i0", "i1")
        process.click("i0", "i1", user="bo")
        process.click("i2", "i0", "i1")
    for number, name in enumerate(("old", "new")):
        for user in (ANA, "bo"):
            assert both.embedding(name, user) == alone[number].embedding(name, user) is not None
        assert both.published()[number] == alone[number].published()[0] != []
    histories = both.store.snapshot().histories
    assert histories.keys() == alone[0].store.snapshot().histories.keys()


def test_forgetting_takes_the_embeddings_of_both() -> None:
    both = Process(MemoryStore(), *two())
    both.click("i0", "i1")
    both.forget()
    assert both.embedding("old") is None and both.embedding("new") is None
    both.click("i0", "i1")
    assert both.embedding("old") == (2, [2.0, 2.0]) and both.embedding("new") == (2, [3.0] * 3)


def test_an_item_is_published_to_both_topics_by_its_own_tower() -> None:
    both = Process(MemoryStore(), *two())
    assert both.change("i0", "i1").applied == 2
    old, new = both.published()
    assert old == [("i0", 0, [0.0, 1.0]), ("i1", 1, [0.0, 1.0])]
    assert new == [("i0", 0, [0.0, 0.0, 1.0]), ("i1", 1, [0.0, 0.0, 1.0])]
    assert set(both.store.read_item_metadata(["i0", "i1"], 1)) == {"i0", "i1"}


def test_a_new_generation_is_filled_from_the_beginning_and_the_old_one_gets_nothing_twice() -> None:
    store = MemoryStore()
    Process(store, two()[0]).change("i0", "i1")
    both = Process(store, *two())
    assert both.next[ITEMS] == 0
    both.change("i0", "i1", "i2")
    old, new = both.published()
    assert [item for item, _, _ in old] == ["i2"]
    assert [item for item, _, _ in new] == ["i0", "i1", "i2"]
    assert both.open(ITEMS) == 3


def test_while_one_topic_is_away_no_fence_moves_beyond_it() -> None:
    both = Process(MemoryStore(), *two())
    both.topics[1].away = True
    with pytest.raises(KafkaUnavailable):
        both.change("i0")
    both.topics[1].away = False
    both.next[ITEMS] = both.open(ITEMS)
    assert both.next[ITEMS] == 0
    both.change("i0")
    assert [item for item, _, _ in both.published()[1]] == ["i0"] and both.open(ITEMS) == 1


def test_an_item_that_one_tower_cannot_place_is_published_by_the_other() -> None:
    old, new = two()
    new.refused = {"i1"}
    both = Process(MemoryStore(), old, new)
    outcome = both.change("i0", "i1")
    assert [[item for item, _, _ in some] for some in both.published()] == [["i0", "i1"], ["i0"]]
    assert both.letters.letters == [(1, "bad_vector")]
    assert (outcome.applied, outcome.rejected) == (2, 0)
    old.refused = {"i2"}
    new.refused = {"i2"}
    outcome = both.change("i2")
    assert (outcome.applied, outcome.rejected) == (0, 1)
    assert both.letters.letters[1:] == [(2, "bad_vector")]
    assert set(both.store.read_item_metadata(["i0", "i1", "i2"], 1)) == {"i0", "i1"}


def test_closing_one_leaves_the_other_untouched() -> None:
    both = Process(MemoryStore(), *two())
    both.change("i0")
    both.click("i0", "i1")
    both.handlers.clicks.flush()
    old, new = both.generations
    before = both.store.snapshot()
    old.close()
    assert (both.topics[0].closed, both.topics[1].closed) == (True, False)
    assert both.store.snapshot().embeddings == before.embeddings
    rest = Process(both.store, two()[1])
    rest.change("i1")
    rest.click("i0")
    assert rest.embedding("new") == (3, [6.0] * 3) and rest.embedding("old") == (2, [2.0, 2.0])
    assert [item for item, _, _ in rest.published()[0]] == ["i1"]
    new.close()
    assert both.topics[1].closed
