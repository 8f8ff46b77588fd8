"""The cascade: order, duplicates, provenance, and which paths it does not call."""

from collections.abc import Collection

from index.exact import ExactIndex
from index.port import Hit, IndexReader
from serving.answer.deadline import Deadline
from serving.answer.fusion import Cascade, PathResult, Recommendation
from serving.recall.base import Candidates, RecallPath, RecallRequest

INDEX = ExactIndex(4)


def hit(item_id: str, score: float = 0.0) -> Hit:
    return Hit(item_id, score, 0, 0, 0)


class Fixed(RecallPath):
    """Names these items, in this order, as the request wants them."""

    def __init__(self, name: str, *ids: str, why: str = "") -> None:
        self.name, self.ids, self.why = name, ids, why

    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        found = [hit(i) for i in self.ids if i not in request.excluded]
        return Candidates(found[: request.k], self.why)


class Never(RecallPath):
    def __init__(self, name: str = "never") -> None:
        self.name = name

    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        raise AssertionError("called")


class Rude(RecallPath):
    """Names excluded items and too many, some twice."""

    name = "rude"

    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        return Candidates([hit(i) for i in "abcab"])


def cascade(
    paths: list[RecallPath], k: int, seen: Collection[str] = ()
) -> tuple[list[Recommendation], list[PathResult]]:
    return Cascade().fuse(paths, RecallRequest(None, k, seen, None, 0.0, Deadline(5.0)), INDEX)


def answer(
    paths: list[RecallPath], k: int, seen: Collection[str] = ()
) -> list[tuple[str, str, int]]:
    return [(item.hit.item_id, item.path, item.path_rank) for item in cascade(paths, k, seen)[0]]


def counts(results: list[PathResult]) -> list[tuple[str, int, int, str]]:
    return [(r.path, len(r.candidates.hits), r.taken, r.candidates.why) for r in results]


def test_the_next_path_fills_what_is_open() -> None:
    paths = [Fixed("towers", "a", "b"), Fixed("popular", "b", "c", "d"), Fixed("newest", "e")]
    assert answer(paths, 4) == [
        ("a", "towers", 1),
        ("b", "towers", 2),
        ("c", "popular", 1),
        ("d", "popular", 2),
    ]


def test_a_path_that_is_not_needed_is_not_called() -> None:
    items, results = cascade([Fixed("towers", "a", "b"), Never()], 2)
    assert len(items) == 2
    assert counts(results) == [("towers", 2, 2, "")]


def test_seen_items_are_left_out_on_every_path() -> None:
    paths = [Fixed("towers", "a", "b"), Fixed("popular", "a", "c"), Fixed("newest", "b", "d")]
    assert [item for item, _, _ in answer(paths, 9, {"a", "d"})] == ["b", "c"]


def test_a_path_that_ignores_the_rules_does_no_harm() -> None:
    items, results = cascade([Rude()], 2, {"a"})
    assert [item.hit.item_id for item in items] == ["b", "c"]
    assert items[0].path_rank == 2
    assert counts(results) == [("rude", 5, 2, "")]


def test_reasons_are_kept_and_an_empty_answer_is_possible() -> None:
    items, results = cascade(
        [Fixed("towers", why="nothing is known"), Fixed("newest", why="empty")], 3
    )
    assert items == []
    assert counts(results) == [("towers", 0, 0, "nothing is known"), ("newest", 0, 0, "empty")]


def test_k_of_zero_calls_no_path() -> None:
    assert cascade([Never()], 0) == ([], [])
