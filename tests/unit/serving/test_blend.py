"""The fusion `blend`: the order of the blender, its parts by path, and which weights are used."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from eddyline.schema.co_visits import EMPTY, CoVisits
from eddyline.schema.item_key import keys_of
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.stores.state_store import UserState
from index.exact import ExactIndex
from index.port import Hit, IndexReader
from index.records import ItemRecord
from serving.answer.blend import Blend
from serving.answer.blend_features import CONTEXTS, feature_names
from serving.answer.blend_weights import CurrentBlender, start_blender
from serving.answer.blender import Blender
from serving.answer.deadline import Deadline
from serving.answer.fusion import PathResult, Recommendation
from serving.recall.base import AFTER, BEFORE, Candidates, QueryCoVisits, RecallPath, RecallRequest
from tests.unit.serving.test_fusion import Fixed, Never

NAMES = ["one", "two"]
FILL: tuple[RecallPath, ...] = (Fixed("popular", "p", "q"), Fixed("newest", *"abcdefghij"))


def index_of(ids: str) -> ExactIndex:
    """Items at right angles."""
    index = ExactIndex(16)
    unit = np.eye(16, dtype=np.float32)
    index.upsert([ItemRecord(i, 0, n, n, 0, unit[n]) for n, i in enumerate(ids)])
    return index


INDEX = index_of("abcdefghijpq")


def learned(**weights: float) -> Blender:
    """A blender with these weights in every context, by feature; blanks are `_`."""
    blender = start_blender(NAMES)
    blender.weights = np.zeros_like(blender.weights)
    for name, weight in weights.items():
        blender.weights[0, blender.features.index(name.replace("_", " "))] = weight
    return blender


def request_of(
    k: int, seen: Sequence[str] = (), user: UserState | None = None, now_ms: int = 0
) -> RecallRequest:
    return RecallRequest(user, k, seen, None, 0.0, Deadline(5.0), now_ms)


def blend(blender: Blender | None = None, candidates: int = 9) -> Blend:
    return Blend(NAMES, CurrentBlender(NAMES, blender), candidates=candidates)


def fuse(
    *paths: RecallPath,
    k: int,
    blender: Blender | None = None,
    seen: Sequence[str] = (),
    user: UserState | None = None,
    candidates: int = 9,
) -> tuple[list[Recommendation], list[PathResult]]:
    made = blend(blender, candidates)
    return made.fuse([*paths, *FILL], request_of(k, seen, user), INDEX)


def ids(items: Sequence[Recommendation]) -> list[str]:
    return [one.hit.item_id for one in items]


class Scored(Fixed):
    """Gives each item a score: 10, 9, …"""

    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        return Candidates([Hit(i, 10.0 - n, 0, 0, 0) for n, i in enumerate(self.ids)])


def test_without_weights_it_orders_by_the_sum_of_logarithmic_ranks() -> None:
    items, results = fuse(Fixed("one", *"abcd"), Fixed("two", *"dc"), k=4)
    assert ids(items) == ["d", "c", "a", "b"]
    first = items[0]
    assert [(s.path, s.rank) for s in first.sources] == [("one", 4), ("two", 1)]
    assert sum(s.share for s in first.sources) == pytest.approx(first.fused_score)
    assert [(r.path, r.taken, r.marginal) for r in results] == [("one", 4, 2), ("two", 2, 0)]


def test_weights_decide_and_each_path_has_its_part() -> None:
    blender = learned(two_rank=2.0, one_share=1.0, paths=-0.5)
    items, _ = fuse(Scored("one", "a", "b"), Scored("two", "b", "c"), k=3, blender=blender)
    assert ids(items) == ["b", "c", "a"]
    best = items[0]
    assert [s.score for s in best.sources] == [9.0, 10.0]
    assert (best.path, best.path_rank, best.hit.score) == ("two", 1, 10.0)
    # What belongs to no path: both paths found it.
    assert sum(s.share for s in best.sources) == pytest.approx(best.fused_score + 0.5)


def test_what_the_vectors_say_counts() -> None:
    """The last item is `c`: nothing is nearer to it than itself."""
    user = UserState(
        fence=None,
        history=UserHistory(entries=(Entry("c", 5), Entry("h", 4))),
        applied_us=0,
        embedding=None,
        profile={},
    )
    blender = learned(last=1.0, best_of_last=0.25)
    items, _ = fuse(Fixed("one", *"abhc"), k=4, blender=blender, user=user)
    assert ids(items) == ["c", "h", "a", "b"]
    assert [one.fused_score for one in items] == [1.25, 0.25, 0.0, 0.0]


def test_equal_scores_are_ordered_by_id() -> None:
    items, _ = fuse(Fixed("one", *"dbca"), k=3, blender=learned())
    assert ids(items) == ["a", "b", "c"]


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5, 12, 17])
def test_what_is_open_is_filled_and_the_fill_is_named(k: int) -> None:
    items, results = fuse(Fixed("one", "a", "p"), Fixed("two"), k=k)
    assert ids(items) == ["a", "p", "q", *"bcdefghij"][:k]
    assert sum(r.taken for r in results) == len(items)
    filled = [(one.path, one.path_rank, one.fused_score) for one in items[2:4]]
    assert filled == [("popular", 1, 0.0), ("newest", 1, 0.0)][: max(0, k - 2)]


def test_only_the_first_candidates_and_no_excluded_ones_are_scored() -> None:
    items, _ = fuse(Fixed("one", *"abcd"), Fixed("two", "e"), k=3, candidates=2, seen=["a"])
    assert ids(items) == ["b", "e", "c"] and items[2].sources[0].path == "one"


def test_a_path_that_is_not_there_is_as_one_that_found_nothing() -> None:
    made, one = blend(), Fixed("one", "a", "b")
    alone, _ = made.fuse([one, *FILL], request_of(2), INDEX)
    empty, _ = made.fuse([one, Fixed("two"), *FILL], request_of(2), INDEX)
    assert [i.fused_score for i in alone] == [i.fused_score for i in empty]


def test_k_of_zero_calls_no_path() -> None:
    assert blend().fuse([Never("one")], request_of(0), INDEX) == ([], [])


def test_newer_weights_of_the_same_paths_are_used() -> None:
    current = CurrentBlender(NAMES)
    start = current()
    current.take(None)
    assert current() is start and not current.why
    newer = learned(one_rank=3.0)
    current.take(newer.encode())
    assert current().encode() == newer.encode() and not current.why


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (start_blender(["one", "three"]).encode(), "other recall paths; not in both: three listed"),
        (start_blender(["two", "one"]).encode(), "other recall paths in another order"),
        (b"\x00", "cannot be read"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_the_last_ones_stay(
    value: bytes, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    current, good = CurrentBlender(NAMES), learned(two_rank=1.0)
    current.take(good.encode())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            current.take(value)
    assert current().encode() == good.encode() and why in current.why
    assert why in Blend(NAMES, current, candidates=9).degradation()
    assert len(caplog.records) == 1
    current.take(good.encode())
    assert not current.why


def test_the_features_are_those_of_the_names() -> None:
    made = blend()
    prepared = made.prepare([Fixed("one", "a")], request_of(1), INDEX)
    assert prepared.x.shape == (1, len(feature_names(NAMES)))
    assert start_blender(NAMES).scores(prepared.q, prepared.x).tolist() == [1.0]


@pytest.mark.parametrize("reads", [frozenset[str](), {AFTER}, {BEFORE}, {AFTER, BEFORE}])
def test_rows_that_no_path_reads_make_no_features(reads: frozenset[str]) -> None:
    """A worker reads what its paths need; evaluation may read more, and has the same features."""

    path = Fixed("one", "a", "b")
    path.reads = frozenset(reads)
    after, before = CoVisits(*visits_of("b")), CoVisits(*visits_of("a"))
    every = QueryCoVisits(["h"], [after], [before])
    needed = QueryCoVisits(
        ["h"], [after] if AFTER in reads else [EMPTY], [before] if BEFORE in reads else [EMPTY]
    )
    made = [
        blend().prepare([path], request_of(2)._replace(co_visits=rows), INDEX)
        for rows in (every, needed)
    ]
    assert made[0].x.tolist() == made[1].x.tolist() and made[0].q.tolist() == made[1].q.tolist()
    assert made[0].q[CONTEXTS.index("known")] == (math.log1p(9) / 6 if AFTER in reads else 0)
    column = feature_names(NAMES).index("visited before")
    assert made[0].x[:, column].any() == (BEFORE in reads)


def visits_of(item_id: str) -> tuple[Any, ...]:
    return keys_of([item_id]), np.ones(1, np.float32), np.ones(1, np.float32), 9.0, 9.0


class Meeting(Fixed):
    """Notes how many threads are in it at a time."""

    def __init__(self) -> None:
        super().__init__("one", *"abcd")
        self.now, self.most, self.lock = 0, 0, threading.Lock()

    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.02)
        with self.lock:
            self.now -= 1
        return super().recall(request, index)


@pytest.mark.parametrize(("is_local", "at_a_time"), [(True, 1), (False, 4)])
def test_one_thread_blends_at_a_time_unless_it_waits_for_others(
    is_local: bool, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of two fusions of one process either."""
    monkeypatch.setattr(INDEX, "is_local", is_local, raising=False)
    path, both, go = Meeting(), (blend(), blend()), threading.Barrier(4)

    def ask(number: int) -> list[Recommendation]:
        go.wait(5)
        return both[number % 2].fuse([path, *FILL], request_of(2), INDEX)[0]

    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(ask, range(4))]
    assert path.most == at_a_time
    assert all(ids(items) == ["a", "b"] for items in found)
