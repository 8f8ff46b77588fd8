"""The live index against the oracle under any interleaving, bit for bit; States that were long replaced."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from eddyline.schema.item_record import ItemRecord
from index import live
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.filters import Filter
from index.port import Hit
from index.snapshot import format, restore
from index.snapshot.format import Origin, SnapshotRefused
from index.storage import vector_table
from index.storage.columns import Columns
from index.storage.state import IndexVersion
from index.writing import batch, placement

D = 6
# So small that every buffer is full now and then.
CAPACITY = 4
MODULES = (batch, live, placement, restore, vector_table)
KEPT_STATES = 4


def units(n: int, dimension: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


POOL = units(64, D, 1)
NAMES = st.integers(0, 24).map("i{}".format)
PLACES = st.integers(0, len(POOL) - 1)


def made() -> HnswIndex:
    return HnswIndex(D, m=8, ef_construction=50, ef=4, exact_below=5, fresh_max=1_000)


def origin(generation: int) -> Origin:
    return Origin(generation=f"g{generation}", dimension=D, bundle_ms=1, log="cluster/topic")


class LiveAgainstExact(RuleBasedStateMachine):
    """Every answer of the live index equals the oracle's; tiny limits so that all modes run."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = [mock.patch.object(module, "CAPACITY_MIN", CAPACITY) for module in MODULES]
        for patch in self.patches:
            patch.start()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "x.snapshot"
        self.exact, self.live = ExactIndex(D), made()
        self.offset, self.generation = 0, 0
        self.written: int | None = None
        # States that were replaced since, a question, and the answer of then.
        self.old: list[tuple[IndexVersion, np.ndarray, int, list[Hit]]] = []

    def teardown(self) -> None:
        self.live.close()
        for patch in self.patches:
            patch.stop()
        self.folder.cleanup()

    def both(self, records: list[ItemRecord]) -> None:
        assert self.live.apply(records) == self.exact.apply(records)

    @rule(names=st.lists(NAMES, max_size=12), place=PLACES, back=st.integers(0, 6))
    def upsert(self, names: list[str], place: int, back: int) -> None:
        records = []
        for n, name in enumerate(names):
            self.offset += 1
            vector = POOL[(place + 7 * n) % len(POOL)]
            records.append(
                ItemRecord(
                    name, n % 3, max(0, self.offset - back), self.offset, self.offset, vector
                )
            )
        self.both(records)

    @rule(name=NAMES, degrees=st.sampled_from([0.0, 0.5, 7.0, 9.0, 60.0]))
    def turn(self, name: str, degrees: float) -> None:
        found = self.exact.vectors_of([name])
        if len(found):
            self.offset += 1
            side = POOL[self.offset % len(POOL)]
            side = side - (side @ found[0]) * found[0]
            length = np.linalg.norm(side)
            if length < 0.1:
                return  # the same direction: there is no side to turn to
            angle = np.radians(degrees)
            vector = (np.cos(angle) * found[0] + np.sin(angle) / length * side).astype(np.float32)
            self.both([ItemRecord(name, 0, self.offset, 0, self.offset, vector)])

    @rule(names=st.lists(NAMES, max_size=6), back=st.integers(0, 6))
    def retire(self, names: list[str], back: int) -> None:
        self.offset += 1
        self.both([ItemRecord(name, 0, max(0, self.offset - back), 0, 0, None) for name in names])

    @rule()
    def rebuild(self) -> None:
        assert self.live.rebuild()

    @rule()
    def second_tier(self) -> None:
        assert self.live.build_tier()

    @rule()
    def snapshot(self) -> None:
        contents = self.live.contents()
        format.write(self.path, contents, origin(self.generation), {0: self.offset}, 1)
        self.written = self.generation

    @precondition(lambda self: self.written == self.generation)
    @rule()
    def restart_from_the_snapshot(self) -> None:
        """What was applied since is applied again from the log, here the oracle's records."""
        self.live.close()
        ignored = self.live._ignored
        self.live = made()
        contents, header = format.load(self.path, origin(self.generation), 0)
        self.live.restore(contents)
        assert not len(contents.vectors) or not contents.vectors.flags.writeable
        assert header.positions == {0: header.positions[0]}
        self.live.apply(list(self.exact._records.values()))
        self.live._ignored = ignored  # counters are the process's own
        self.live._state = self.live._state._replace(watermarks=self.exact.watermarks())

    @rule(shift=st.integers(1, 9))
    def switch_generation(self, shift: int) -> None:
        """All items have other vectors, in an index of their own; the old one's snapshot is refused."""
        self.generation += 1
        if self.written is not None:
            with pytest.raises(SnapshotRefused, match="generation 'g"):
                format.load(self.path, origin(self.generation), 0)
        records = [
            ItemRecord(
                r.item_id,
                r.partition,
                r.offset,
                r.at_ms,
                r.written_us,
                None if r.vector is None else POOL[(n * 5 + shift) % len(POOL)],
            )
            for n, r in enumerate(self.exact._records.values())
        ]
        self.live.close()
        self.exact, self.live = ExactIndex(D), made()
        self.both(records)

    @rule(place=PLACES, k=st.integers(-1, 30), exclude=st.frozensets(NAMES, max_size=10))
    def query(self, place: int, k: int, exclude: frozenset[str]) -> None:
        assert self.live.query(POOL[place], k, exclude) == self.exact.query(POOL[place], k, exclude)
        assert self.live.newest(k, exclude) == self.exact.newest(k, exclude)

    @rule(names=st.lists(NAMES, max_size=8))
    def look_up(self, names: list[str]) -> None:
        assert self.live.describe(names) == self.exact.describe(names)
        np.testing.assert_array_equal(self.live.vectors_of(names), self.exact.vectors_of(names))

    @rule(place=PLACES, k=st.integers(1, 30))
    def keep_the_state(self, place: int, k: int) -> None:
        self.old.append((self.live._state, POOL[place], k, self.exact.query(POOL[place], k)))
        del self.old[:-KEPT_STATES]

    @invariant()
    def a_reader_of_an_old_state_sees_what_it_saw(self) -> None:
        for state, query, k, expected in self.old:
            wanted = min(k, state.live)
            if not wanted:
                continue  # the index looks no further
            assert state.scan(query, wanted, frozenset()).hits() == expected
            if state.searchable(wanted, 4):
                found = state.search(query, wanted, frozenset(), 4)
                assert found is None or found.hits() == expected

    @invariant()
    def same_sizes(self) -> None:
        live, exact = self.live.stats(), self.exact.stats()
        assert (live.live, live.tombstones, live.ignored) == (
            exact.live,
            exact.tombstones,
            exact.ignored,
        )
        assert self.live.watermarks() == self.exact.watermarks()
        state = self.live._state
        gone = [r.item_id for r in self.exact._records.values() if r.retired]
        assert (state.rows(gone) < 0).all()
        if state.graphs:
            everyone_stands_once(state)


def everyone_stands_once(state: IndexVersion) -> None:
    """Of graphs and fresh buffer, what counts are the live rows, each once."""
    entries = [graph.rows for graph in state.graphs] + [state.fresh.rows[: state.fresh_count]]
    counting = [
        vector_table[state.table.died_at[vector_table] > state.seq] for vector_table in entries
    ]
    assert sorted(np.concatenate(counting)) == state.table.alive(state.used, state.seq).tolist()
    assert [len(vector_table) for vector_table in counting[:-1]] == list(state.standing)


TestLiveAgainstExact = LiveAgainstExact.TestCase
TestLiveAgainstExact.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


class AtEveryLine:
    """Calls `look` before every line that this thread runs in index/, but not within `look` itself."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.look, self.looking = look, False

    def __call__(self, frame: FrameType, event: str, _: Any) -> "AtEveryLine | None":
        if "/index/" not in frame.f_code.co_filename or self.looking:
            return None
        if event == "line":
            self.looking = True
            try:
                self.look()
            finally:
                self.looking = False
        return self

    def __enter__(self) -> "AtEveryLine":
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


@pytest.mark.parametrize("tiers", [0, 1])
def test_in_the_midst_of_a_batch_the_graph_answers_as_before_it(tiers: int) -> None:
    """A query between any two lines of a write: the answer from before the batch or after, never another."""
    rng = np.random.default_rng(4)
    with mock.patch.multiple(vector_table, CAPACITY_MIN=CAPACITY):
        index, oracle = HnswIndex(D, exact_below=5, fresh_max=10**6), ExactIndex(D)
        first = [ItemRecord(f"i{n}", 0, n, n, n, v) for n, v in enumerate(units(120, D, 5))]
        for each in (index, oracle):
            each.upsert(first)
        assert index.rebuild()
        for step in range(12):
            records = []
            for n in rng.choice(150, 8, replace=False).tolist():
                found = oracle.vectors_of([f"i{n}"])
                small = rng.normal(size=D).astype(np.float32) * 0.02
                moved = (
                    units(1, D, 100 * step + n)[0]
                    if rng.random() < 0.5 or not len(found)
                    else found[0] + small
                )
                vector = None if rng.random() < 0.3 else moved / np.linalg.norm(moved)
                records.append(ItemRecord(f"i{n}", 0, 1_000 + 10 * step, n, n, vector))
            query, exclude = POOL[step], [f"i{n}" for n in range(3)]
            names = [record.item_id for record in records]
            before = oracle.query(query, 20, exclude), oracle.describe(names)
            oracle.apply(records)
            after = oracle.query(query, 20, exclude), oracle.describe(names)
            seen: list[bool] = []

            def look(
                query: np.ndarray = query,
                names: list[str] = names,
                seen: list[bool] = seen,
                exclude: list[str] = exclude,
                answers: tuple[Any, Any] = (before, after),
            ) -> None:
                got = index.query(query, 20, exclude), index.describe(names)
                assert got in answers
                seen.append(got == answers[1])

            with AtEveryLine(look):
                index.apply(records)
            assert len(seen) > 50 and seen == sorted(seen) and {*seen} == {True, False}
            assert (index.query(query, 20, exclude), index.describe(names)) == after
            if tiers and step % 4 == 3:
                assert index.build_tier()
        assert index.stats().refused == 0 and index.stats().tiers == tiers
        everyone_stands_once(index._state)
        index.close()


@pytest.mark.parametrize("where", ["batch.write", "place", "standing", "append"])
def test_a_batch_that_breaks_off_leaves_all_as_it_was(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    for module in MODULES:
        monkeypatch.setattr(module, "CAPACITY_MIN", CAPACITY)
    index, oracle = HnswIndex(D, exact_below=5, fresh_max=10**6), ExactIndex(D)
    first = [
        ItemRecord(f"i{n}", 0, n, n, n, v, {"tags": ["t"]}) for n, v in enumerate(units(200, D, 5))
    ]
    for each in (index, oracle):
        each.upsert(first)
    assert index.rebuild()
    second = [
        ItemRecord(f"i{n}", 0, 500, n, n, None if n % 3 == 0 else v, {"tags": ["u"]})
        for n, v in enumerate(units(60, D, 6), 170)
    ]

    def broken(*_: object) -> None:
        raise MemoryError("no room")

    def half(columns: Columns, start: int, attributes: list[dict[str, Any]]) -> None:
        append(columns, start, attributes[:5])
        raise MemoryError("no room")

    append = Columns.append
    with monkeypatch.context() as patch:
        if where == "append":
            patch.setattr(Columns, "append", half)
        elif where == "batch.write":
            patch.setattr(batch, "write", broken)
        else:
            patch.setattr(placement.Placement, where, broken)
        # More of them first, so that what was made room for is too large the next time.
        more = [ItemRecord(f"j{n}", 0, 600 + n, n, n, v) for n, v in enumerate(units(900, D, 7))]
        with pytest.raises(MemoryError):
            index.apply([*second, *more])
    for again in ([], second):  # as if it had not been, and then once more
        assert index.apply(again) == oracle.apply(again)
        for query in POOL[:10]:
            assert index.query(query, 300) == oracle.query(query, 300)
            tagged = Filter(tags=frozenset({"u"}))
            assert index.query(query, 300, (), tagged) == oracle.query(query, 300, (), tagged)
        assert index.rebuild()
        everyone_stands_once(index._state)
    index.close()
