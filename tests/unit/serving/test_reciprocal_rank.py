"""Reciprocal rank fusion: scores, sources, fills; paths that fail, are slow, empty or wrong."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import get_args, get_type_hints

import msgspec
import pytest

from eddyline.settings.worker import WorkerSettings
from index.port import Hit, IndexReader
from serving.answer.blend import Blend
from serving.answer.blend_weights import CurrentBlender
from serving.answer.deadline import Deadline, DeadlinePassed
from serving.answer.fusion import Cascade, Fusion, PathResult, Recommendation, Source
from serving.answer.fusions import make_fusion
from serving.answer.reciprocal_rank import K, ReciprocalRank
from serving.recall.base import Candidates, RecallPath, RecallRequest
from serving.rpc.client import Client
from serving.rpc.retrieval_service import RetrievalService
from tests.unit.serving.test_fusion import INDEX, Fixed, Never, Rude, hit
from tests.unit.serving.test_retriever import SETTINGS, World


class Fails(Fixed):
    """Raises an error, as a bug would."""

    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        raise RuntimeError("its table is gone")


class Slow(Fixed):
    """Takes its time."""

    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        time.sleep(0.03)
        return super().recall(request, index)


class Late(Fixed):
    """Finds that the query's deadline has passed."""

    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        raise DeadlinePassed("the deadline passed before the index was searched")


FILL: tuple[RecallPath, ...] = (Fixed("popular", "p", "q"), Fixed("newest", *"abcdefghijpqxyz"))


def request_of(k: int, seen: Sequence[str] = (), seconds: float = 5.0) -> RecallRequest:
    return RecallRequest(None, k, seen, None, 0.0, Deadline(seconds))


def fuse(
    *paths: RecallPath, k: int, seen: Sequence[str] = (), candidates: int = 100, **weights: float
) -> tuple[list[Recommendation], list[PathResult]]:
    names = [path.name for path in paths]
    fusion = ReciprocalRank(names, weights, candidates=candidates)
    return fusion.fuse([*paths, *FILL], request_of(k, seen), INDEX)


def ids(items: Sequence[Recommendation]) -> list[str]:
    return [one.hit.item_id for one in items]


def test_an_item_that_two_paths_return_comes_before_one_that_one_returns_higher() -> None:
    items, results = fuse(Fixed("one", "a", "b", "c"), Fixed("two", "d", "c"), k=4)
    assert ids(items) == ["c", "a", "d", "b"]
    first = items[0]
    shares = [1 / (K + 3), 1 / (K + 2)]
    assert first.sources == [Source("one", 3, 0.0, shares[0]), Source("two", 2, 0.0, shares[1])]
    assert first.fused_score == sum(shares) and (first.path, first.path_rank) == ("two", 2)
    assert [(r.path, r.taken, r.marginal) for r in results] == [("one", 3, 2), ("two", 2, 1)]


def test_equal_scores_are_ordered_by_id() -> None:
    items, _ = fuse(Fixed("one", "b", "x"), Fixed("two", "a", "c"), k=4)
    assert ids(items) == ["a", "b", "c", "x"]
    assert items[0].fused_score == items[1].fused_score > items[2].fused_score


def test_weights_decide() -> None:
    items, _ = fuse(Fixed("one", "a"), Fixed("two", "b"), k=2, two=1.5)
    assert ids(items) == ["b", "a"]
    assert [one.fused_score for one in items] == [1.5 / (K + 1), 1 / (K + 1)]
    assert items[0].sources == [Source("two", 1, 0.0, 1.5 / (K + 1))]


def test_the_score_is_that_of_the_path_with_the_largest_share() -> None:
    class Scored(Fixed):
        def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
            return Candidates([hit(item, score=len(self.ids)) for item in self.ids])

    items, _ = fuse(Scored("one", "b", "a"), Scored("two", "a"), k=1)
    assert (items[0].hit, items[0].path) == (Hit("a", 1.0, 0, 0, 0), "two")
    assert [source.score for source in items[0].sources] == [2.0, 1.0]


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 5, 17])
def test_what_is_open_is_filled_and_the_fill_is_named(k: int) -> None:
    items, results = fuse(Fixed("one", "a", "p"), k=k)
    assert ids(items) == ["a", "p", "q", *"bcdefghijxyz"][:k]
    filled = [(one.path, one.path_rank, one.fused_score) for one in items[2:4]]
    assert filled == [("popular", 1, 0.0), ("newest", 1, 0.0)][: max(0, k - 2)]
    called = ["one", "popular", "newest"]
    assert [r.path for r in results] == called[: 0 if not k else 1 if k < 3 else 2 if k < 4 else 3]
    assert sum(r.taken for r in results) == len(items)


def test_a_path_that_is_fused_and_fills_has_one_entry() -> None:
    popular = Fixed("popular", *"abcd")
    fusion = ReciprocalRank(["popular"], {}, candidates=2)
    items, results = fusion.fuse([popular, FILL[1]], request_of(6), INDEX)
    assert [(i.hit.item_id, i.path, i.path_rank) for i in items][:5] == [
        ("a", "popular", 1),
        ("b", "popular", 2),
        ("c", "popular", 3),
        ("d", "popular", 4),
        ("e", "newest", 1),
    ]
    assert [(r.path, len(r.candidates.hits), r.taken) for r in results] == [
        ("popular", 4, 4),
        ("newest", 2, 2),
    ]


def test_only_the_first_candidates_of_a_path_have_ranks() -> None:
    items, results = fuse(Fixed("one", *"abc"), Fixed("two", "c"), k=3, candidates=2)
    assert ids(items) == ["a", "c", "b"]
    assert [one.sources[0].path for one in items] == ["one", "two", "one"]
    assert [len(r.candidates.hits) for r in results] == [2, 1]


def test_excluded_and_repeated_items_of_a_path_do_no_harm() -> None:
    items, _ = fuse(Rude(), Fixed("one", "z"), k=5, seen=["a"])
    assert ids(items) == ["z", "b", "c", "p", "q"]
    assert [(s.path, s.rank) for s in items[1].sources] == [("rude", 2)]


def fusions(budget_ms: int) -> list[Fusion]:
    names = ["one", "two"]
    return [
        Cascade(budget_ms=budget_ms),
        ReciprocalRank(names, {}, candidates=9, budget_ms=budget_ms),
        Blend(names, CurrentBlender(names), candidates=9, budget_ms=budget_ms),
    ]


@pytest.mark.parametrize("fusion", fusions(60_000), ids=lambda fusion: fusion.name)
def test_a_path_that_fails_is_named_and_the_answer_has_k(fusion: Fusion) -> None:
    paths = [Fails("one"), Fixed("two", "a", "b"), *FILL]
    items, results = fusion.fuse(paths, request_of(5), INDEX)
    assert ids(items) == ["a", "b", "p", "q", "c"]
    failed = results[0].candidates
    assert failed.why == "failed: RuntimeError; the worker's log has more" and not failed.hits
    assert failed.degradation == f"worker: recall path one {failed.why}"


@pytest.mark.parametrize("fusion", fusions(20), ids=lambda fusion: fusion.name)
def test_a_path_beyond_the_budget_is_named_and_the_answer_has_k(fusion: Fusion) -> None:
    paths = [Slow("one", "a"), Fixed("two", "b"), *FILL]
    items, results = fusion.fuse(paths, request_of(4), INDEX)
    assert ids(items) == ["a", "p", "q", "b"]
    why = {r.path: r.candidates.why for r in results}["two"]
    assert why == "was not called: recall had taken 20 ms"
    degradation = {r.path: r.candidates.degradation for r in results}["two"]
    assert degradation == "worker: recall path two was not called: recall had taken 20 ms"
    assert results[0].took_us >= 30_000


def test_half_of_the_time_left_is_a_budget_too() -> None:
    fusion = ReciprocalRank(["one", "two"], {}, candidates=9, budget_ms=60_000)
    paths = [Slow("one", "a"), Never("two"), *FILL]
    items, results = fusion.fuse(paths, request_of(3, seconds=0.05), INDEX)
    assert ids(items) == ["a", "p", "q"]
    assert results[1].candidates.why.startswith("was not called: recall had taken 2")


@pytest.mark.parametrize("fusion", fusions(60_000), ids=lambda fusion: fusion.name)
def test_empty_paths_and_a_passed_deadline(fusion: Fusion) -> None:
    items, _ = fusion.fuse([Fixed("one"), Fixed("two"), *FILL], request_of(3), INDEX)
    assert ids(items) == ["p", "q", "a"]
    with pytest.raises(DeadlinePassed):
        fusion.fuse([Late("one"), *FILL], request_of(3), INDEX)


def test_every_fusion_of_the_settings_can_be_made() -> None:
    names = get_args(get_type_hints(WorkerSettings)["fusion"])
    assert len(names) >= 3
    for name in names:
        made = make_fusion(msgspec.structs.replace(SETTINGS, fusion=name))
        assert made.name == name


def test_the_response_names_every_path_of_an_item(
    service: RetrievalService, client: Client
) -> None:
    world = World("rrf")
    world.user("ana", "i3")
    world.clicked({5: {"i4": 3000}})
    service.serve(world.backend)
    answer = client.retrieve("ana", 4)
    first = answer.items[0]
    assert [(p.path, p.rank) for p in first.paths] == [("towers", 2), ("popular", 1), ("newest", 8)]
    assert first.fused_score == sum(path.share for path in first.paths)
    assert (first.item_id, first.path, first.path_rank) == ("i4", "popular", 1)
    scores = [item.fused_score for item in answer.items]
    assert scores == sorted(scores, reverse=True) and scores[-1] > 0
    taken = {path.path: (path.candidates, path.taken, path.marginal) for path in answer.paths}
    assert taken == {"towers": (11, 4, 0), "popular": (1, 1, 0), "newest": (11, 4, 0)}
    [found] = client.explain("ana", ["i4"], 4).items
    assert (found.rank, found.fused_score) == (1, first.fused_score)
    assert [path.share for path in found.paths] == [path.share for path in first.paths]
