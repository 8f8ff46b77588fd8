"""One suite over all indexes: the oracle, the live index in its modes, on every ANN backend."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from eddyline.errors import VectorRejected
from eddyline.schema.item_key import item_key, keys_of
from eddyline.schema.item_record import ItemRecord
from index import port
from index.backends.registry import NAMES, make_backend
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.filters import Filter
from index.live import LiveIndex
from index.port import Hit, Index, SearchResult, Watermark
from index.ranked import RankedItems

D = 8


def unit(*numbers: float) -> np.ndarray:
    vector = np.zeros(D, np.float32)
    vector[: len(numbers)] = numbers
    return vector / np.float32(np.linalg.norm(vector))


def put(
    item_id: str, offset: int, *numbers: float, partition: int = 0, at_ms: int = 0
) -> ItemRecord:
    return ItemRecord(item_id, partition, offset, at_ms, 1_000 + offset, unit(*numbers))


def gone(item_id: str, offset: int, *, partition: int = 0) -> ItemRecord:
    return ItemRecord(item_id, partition, offset, 0, 1_000 + offset, None)


class Built(LiveIndex):
    """Rebuilds after every write, so that the main segment answers all that it can."""

    def __init__(self, name: str) -> None:
        super().__init__(D, make_backend(name), breadth=200, exact_below=0, fresh_max=4_096)

    def apply(self, records):  # type: ignore[no-untyped-def]
        counted = super().apply(records)
        assert self.rebuild()
        return counted


MAKERS: dict[str, Callable[[], Index]] = {
    "exact": lambda: ExactIndex(D),
    "hnsw-scan": lambda: HnswIndex(D),
    "hnsw-fresh": lambda: HnswIndex(D, exact_below=0, fresh_max=1_000_000),
    **{f"{name}-main": lambda name=name: Built(name) for name in NAMES},
}


@pytest.fixture(params=list(MAKERS))
def index(request: pytest.FixtureRequest) -> Iterator[Index]:
    made = MAKERS[request.param]()
    yield made
    made.close()


def ids(hits: list[Hit]) -> list[str]:
    return [hit.item_id for hit in hits]


def test_an_empty_index_answers_with_nothing(index: Index) -> None:
    assert index.query(unit(1), 5) == []
    assert index.newest(5) == []
    assert index.vectors_of(["a"]).shape == (0, D)
    assert index.describe(["a"]) == [None]
    assert index.watermarks() == {}
    assert index.apply([]) == 0
    assert index.stats().live == 0


def test_hits_come_best_first_with_all_fields(index: Index) -> None:
    index.upsert([put("a", 3, 1, at_ms=50), put("b", 4, 1, 1), put("c", 5, 0, 1)])
    hits = index.query(unit(1), 2)
    assert ids(hits) == ["a", "b"]
    assert hits[0] == Hit("a", 1.0, 50, 1_003, 3)
    assert hits[1].score == pytest.approx(2**-0.5, abs=1e-6)


@pytest.mark.parametrize("k", [-(10**9), -1, 0, 1, 6, 7, 8, 10**9])
def test_k_is_clamped_to_the_live_items(index: Index, k: int) -> None:
    index.upsert([put(f"i{n}", n, 1, n) for n in range(8)])
    index.retire([gone("i3", 9)])
    expected = [f"i{n}" for n in range(8) if n != 3][: max(k, 0)]
    assert ids(index.query(unit(1), k)) == expected
    assert len(index.newest(k)) == len(expected)


def test_find_is_the_same_answer_as_columns(index: Index) -> None:
    index.upsert([put(f"i{n}", n, 1, n, at_ms=5 * n) for n in range(8)])
    for k, exclude in ((0, ()), (3, ()), (9, ("i1", "i2"))):
        found = index.find(unit(1, 1), k, exclude)
        assert found.hits() == index.query(unit(1, 1), k, exclude)
        assert len(found) == len(found.ids) == len(found.scores) == len(found.facts)
        assert found.scores.dtype == np.float64 and found.facts.shape == (len(found), 3)
    assert SearchResult.of(found.hits()).hits() == found.hits()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18, 1e30, 3e38])
def test_queries_of_any_length_give_the_same_order(index: Index, scale: float) -> None:
    index.upsert([put(f"i{n}", n, 1, n) for n in range(20)])
    expected = ids(index.query(unit(1), 7))
    assert ids(index.query(unit(1) * np.float32(scale), 7)) == expected


def test_equal_scores_are_ordered_by_id(index: Index) -> None:
    names = [f"i{n:03}" for n in range(60)]
    order = np.random.default_rng(3).permutation(60)
    index.upsert([put(names[n], int(n), 1, 2) for n in order])
    assert ids(index.query(unit(1, 2), 7)) == names[:7]
    assert ids(index.query(unit(1, 2), 7, names[:5])) == names[5:12]
    assert ids(index.newest(7, names[:5])) == names[5:12]


def test_excluded_items_are_replaced_by_the_next(index: Index) -> None:
    index.upsert([put(f"i{n}", n, 10, n) for n in range(10)])
    seen = ["i0", "i1", "i2", "i5", "unknown"]
    assert ids(index.query(unit(1), 3, seen)) == ["i3", "i4", "i6"]
    assert ids(index.query(unit(1), 99, frozenset(seen))) == ["i3", "i4", "i6", "i7", "i8", "i9"]
    assert index.query(unit(1), 5, [f"i{n}" for n in range(10)]) == []


def test_an_older_or_equal_write_is_a_no_op(index: Index) -> None:
    assert index.upsert([put("a", 5, 1)]) == 1
    assert index.upsert([put("a", 5, 0, 1)]) == 0
    assert index.upsert([put("a", 4, 0, 1)]) == 0
    assert index.query(unit(1), 1)[0].score == 1.0
    assert index.upsert([put("a", 6, 0, 1)]) == 1
    assert index.query(unit(1), 1)[0].score == 0.0
    assert index.stats().applied == 2 and index.stats().ignored == 2


def test_a_delete_wins_over_every_older_write(index: Index) -> None:
    index.upsert([put("a", 1, 1), put("b", 2, 1, 1)])
    assert index.retire([gone("a", 7)]) == 1
    for offset in (-1, 1, 6, 7):
        assert index.upsert([put("a", offset, 1)]) == 0
    assert ids(index.query(unit(1), 5)) == ["b"]
    assert index.describe(["a", "b"])[0] is None
    assert index.stats().tombstones == 1
    assert index.upsert([put("a", 8, 1)]) == 1
    assert ids(index.query(unit(1), 5)) == ["a", "b"]


def test_a_delete_that_comes_before_its_item(index: Index) -> None:
    assert index.retire([gone("a", 7)]) == 1
    assert index.upsert([put("a", 6, 1)]) == 0
    assert index.query(unit(1), 5) == []


def test_within_a_batch_the_highest_offset_wins_in_any_order(index: Index) -> None:
    batch = [gone("a", 3), put("a", 2, 1), put("b", 9, 1), gone("b", 8), put("b", 9, 0, 1)]
    assert index.apply(batch) == 2
    assert ids(index.query(unit(1), 5)) == ["b"]
    assert index.query(unit(1), 5)[0].score == 1.0


def test_the_bundle_is_older_than_any_record(index: Index) -> None:
    index.upsert([put("a", -1, 1)])
    assert index.upsert([put("a", -1, 0, 1)]) == 0
    assert index.upsert([put("a", 0, 0, 1)]) == 1
    assert index.query(unit(1), 1)[0].score == 0.0


@pytest.mark.parametrize(
    ("vector", "what"),
    [
        (np.zeros(D - 1, np.float32), "shape"),
        (np.zeros(D + 1, np.float32), "shape"),
        (np.zeros((1, D), np.float32), "shape"),
        (np.zeros(D, np.float32), "norm 0"),
        (unit(1) * 1.01, "norm 1.01"),
        (unit(1) * 0.99, "norm 0.99"),
        (unit(1) * 1e30, "norm|infinity"),
        (np.full(D, np.nan, np.float32), "NaN"),
        (np.array([np.inf] + [0] * (D - 1), np.float32), "infinity"),
    ],
)
def test_a_bad_vector_is_refused_by_name_and_nothing_is_written(
    index: Index, vector: np.ndarray, what: str
) -> None:
    bad = ItemRecord("the bad one", 0, 2, 0, 0, vector)
    with pytest.raises(VectorRejected, match=f"'the bad one'.*({what})"):
        index.upsert([put("good", 1, 1), bad])
    assert index.query(unit(1), 5) == []
    assert index.watermarks() == {}
    assert index.stats().rejected == 1
    assert index.upsert([put("good", 1, 1), put("the bad one", 2, 1)]) == 2


def test_a_vector_within_rounding_of_unit_norm_is_accepted(index: Index) -> None:
    assert index.upsert([ItemRecord("a", 0, 1, 0, 0, unit(1, 2, 3) * np.float32(1.0005))]) == 1


@pytest.mark.parametrize(
    "vector", [np.zeros(D + 1), np.zeros((1, D)), np.full(D, np.nan), np.full(D, np.inf)]
)
def test_a_bad_query_is_refused(index: Index, vector: np.ndarray) -> None:
    with pytest.raises(VectorRejected, match="query vector"):
        index.query(vector.astype(np.float32), 1)


def test_upsert_and_retire_take_their_own_kind_only(index: Index) -> None:
    with pytest.raises(ValueError, match="'a' is a delete"):
        index.upsert([gone("a", 1)])
    with pytest.raises(ValueError, match="'a' carries a vector"):
        index.retire([put("a", 1, 1)])


def test_vectors_of_keeps_order_and_repeats_and_skips_items_that_are_not_live(index: Index) -> None:
    index.upsert([put("a", 1, 1), put("b", 2, 0, 1), put("c", 3, 0, 0, 1)])
    index.retire([gone("c", 4)])
    found = index.vectors_of(["b", "x", "a", "c", "b"])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.stack([unit(0, 1), unit(1), unit(0, 1)]))


def test_newest_goes_by_event_time(index: Index) -> None:
    index.upsert(
        [put("old", 1, 1, at_ms=10), put("new", 2, 1, at_ms=30), put("mid", 3, 1, at_ms=20)]
    )
    assert ids(index.newest(2)) == ["new", "mid"]
    assert ids(index.newest(5, ["new"])) == ["mid", "old"]


def test_watermarks_are_per_partition_and_never_go_back(index: Index) -> None:
    index.apply(
        [
            put("a", 5, 1, partition=0, at_ms=9),
            put("b", 2, 1, partition=3),
            gone("c", 6, partition=3),
        ]
    )
    assert index.watermarks() == {0: Watermark(5, 9, 1_005), 3: Watermark(6, 0, 1_006)}
    index.apply([put("z", 1, 1, partition=0, at_ms=4)])
    assert index.watermarks()[0] == Watermark(5, 9, 1_005)


def test_the_same_vectors_give_the_same_bits_in_any_order_of_arrival() -> None:
    rng = np.random.default_rng(7)
    vectors = rng.normal(size=(500, D)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    records = [ItemRecord(f"i{n}", 0, n, 0, 0, v) for n, v in enumerate(vectors)]
    answers = []
    for order in (range(500), range(499, -1, -1), rng.permutation(500)):
        for make in MAKERS.values():
            index = make()
            index.upsert([records[n] for n in order])
            answers.append(index.query(vectors[0], 20))
            index.close()
    assert all(answer == answers[0] for answer in answers)


def test_items_are_found_by_their_keys(index: Index) -> None:
    names = [f"i{n}" for n in range(70)]
    assert index.find_keys(keys_of(names)) == [None] * len(names)
    index.upsert([put(name, n, 1, n, at_ms=n) for n, name in enumerate(names)])
    index.retire([gone("i3", 100), gone("never", 101)])
    index.upsert([put("i5", 102, 3, 1), put("i6", 50, 1)])
    index.retire([gone("i7", 103)])
    index.upsert([put("i7", 104, 1, 7)])
    wanted = [*names, "unknown", "never", "i5", "i5"]
    found = index.find_keys(keys_of(wanted))
    assert found == index.describe(wanted) and found[5] == Hit("i5", 0.0, 0, 1_102, 102)
    assert [n for n, hit in enumerate(found) if hit is None] == [3, 70, 71]
    assert index.find_keys(np.empty(0, np.uint64)) == []
    assert index.find_keys(np.array([0, 2**64 - 1, item_key("i1")], np.uint64))[:2] == [None] * 2


# ---------------------------------------------------------------- in an order of the caller's


def filled(index: Index, count: int = 40) -> list[str]:
    """i0 …, of which every fifth was deleted again."""
    index.apply([put(f"i{n}", n, 1, n) for n in range(count)])
    index.apply([gone(f"i{n}", count + n) for n in range(0, count, 5)])
    return [f"i{n}" for n in range(count) if n % 5]


@pytest.mark.parametrize("piece", [1, 3, 16])
@pytest.mark.parametrize("k", [-1, 0, 1, 2, 23, 24, 25, 99])
def test_the_first_listed_items_that_are_live(
    index: Index, k: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port, "PIECE_MIN", piece)
    alive = filled(index)
    listed = ["unknown", *(f"i{n}" for n in range(39, -1, -1))]
    ranked = RankedItems.of([(item_id, float(90 - n)) for n, item_id in enumerate(listed)])
    exclude = {f"i{n}" for n in range(1, 40, 4)} | {"unknown"}
    found = index.first_listed(ranked, k, exclude)
    score = dict(zip(ranked.ids, ranked.scores.tolist(), strict=True))
    wanted = [i for i in listed if i in alive and i not in exclude][: max(k, 0)]
    assert [hit.item_id for hit in found] == wanted
    assert [hit.score for hit in found] == [score[item_id] for item_id in wanted]
    assert [hit._replace(score=0.0) for hit in found] == index.describe(wanted)
    some = Filter(deny=frozenset(wanted[:1]))
    assert [h.item_id for h in index.first_listed(ranked, 3, exclude, some)] == [
        i for i in listed if i in alive and i not in exclude and i not in wanted[:1]
    ][:3]


@pytest.mark.parametrize("piece", [1, 3, 16])
@pytest.mark.parametrize("k", [-1, 0, 1, 2, 31, 32, 33, 99])
def test_the_first_by_scores_of_keys(
    index: Index, k: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a few scores each is that of many items: equal ones come by id."""
    monkeypatch.setattr(port, "PIECE_MIN", piece)
    alive = filled(index)
    ids = [f"i{n}" for n in range(40)] + [f"unknown-{n}" for n in range(60)]
    scores = np.array([float(n * 7 % 4) for n in range(100)])
    found = index.first_by_key(keys_of(ids), scores, k)
    score = dict(zip(ids, scores.tolist(), strict=True))
    wanted = sorted(alive, key=lambda item_id: (-score[item_id], item_id))
    assert [hit.item_id for hit in found] == wanted[: max(k, 0)]
    assert [hit.score for hit in found] == [score[hit.item_id] for hit in found]
    assert [hit._replace(score=0.0) for hit in found] == index.describe([h.item_id for h in found])
    some = Filter(allow=frozenset(wanted[5:9]))
    assert [h.item_id for h in index.first_by_key(keys_of(ids), scores, 3, some)] == wanted[5:8]


def test_an_empty_order_finds_nothing(index: Index) -> None:
    filled(index)
    assert not index.first_listed(RankedItems.of([]), 5)
    assert not index.first_by_key(keys_of([]), np.empty(0), 5)
    assert not index.first_by_key(keys_of(["x"]), np.ones(1), 5)


def test_hits_in_columns_are_a_sequence_of_hits(index: Index) -> None:
    filled(index)
    found = index.query(unit(1, 1), 6)
    hits = [*found]
    assert found == hits and len(found) == 6 and all(type(hit) is Hit for hit in hits)
    again = index.query(unit(1, 1), 6)
    assert [again[n] for n in (0, 5, -1)] == [hits[0], hits[5], hits[-1]]
    assert again[1:3] == hits[1:3] and list(again) == hits
