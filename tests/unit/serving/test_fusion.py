"""The cascade: order, dedupe, provenance, and what is never asked."""

from collections.abc import Collection

from index.port import Hit
from serving.answer.fusion import PathSummary, cascade
from serving.recall.base import Candidates, RecallPath


def hit(item_id: str, score: float = 0.0) -> Hit:
    return Hit(item_id, score, 0, 0, 0)


def path(name: str, *ids: str, why: str = "") -> RecallPath:
    def ask(k: int, exclude: Collection[str]) -> Candidates:
        return Candidates([hit(i) for i in ids if i not in exclude][:k], why)

    return RecallPath(name, ask)


def answer(
    paths: list[RecallPath], k: int, seen: Collection[str] = ()
) -> list[tuple[str, str, int]]:
    return [(f.hit.item_id, f.path, f.path_rank) for f in cascade(paths, k, seen)[0]]


def test_the_next_path_fills_what_is_open() -> None:
    paths = [path("towers", "a", "b"), path("popular", "b", "c", "d"), path("newest", "e")]
    assert answer(paths, 4) == [
        ("a", "towers", 1),
        ("b", "towers", 2),
        ("c", "popular", 1),
        ("d", "popular", 2),
    ]


def test_a_path_that_is_not_needed_is_not_asked() -> None:
    def never(k: int, exclude: Collection[str]) -> Candidates:
        raise AssertionError("asked")

    fused, summaries = cascade([path("towers", "a", "b"), RecallPath("popular", never)], 2, ())
    assert len(fused) == 2
    assert summaries == [PathSummary("towers", 2, 2, "")]


def test_seen_items_are_left_out_on_every_path() -> None:
    paths = [path("towers", "a", "b"), path("popular", "a", "c"), path("newest", "b", "d")]
    assert [item for item, _, _ in answer(paths, 9, {"a", "d"})] == ["b", "c"]


def test_a_path_that_ignores_the_rules_does_no_harm() -> None:
    rude = RecallPath("rude", lambda k, exclude: Candidates([hit(i) for i in "abcab"]))
    fused, summaries = cascade([rude], 2, {"a"})
    assert [f.hit.item_id for f in fused] == ["b", "c"]
    assert fused[0].path_rank == 2
    assert summaries == [PathSummary("rude", 5, 2, "")]


def test_reasons_are_kept_and_an_empty_answer_is_possible() -> None:
    fused, summaries = cascade(
        [path("towers", why="nothing is known"), path("newest", why="empty")], 3, ()
    )
    assert fused == []
    assert [(s.path, s.candidates, s.taken, s.why) for s in summaries] == [
        ("towers", 0, 0, "nothing is known"),
        ("newest", 0, 0, "empty"),
    ]


def test_k_of_zero_asks_nobody() -> None:
    assert cascade([path("towers", "a")], 0, ()) == ([], [])
