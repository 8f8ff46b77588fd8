"""What the blender knows of candidates: each column against its formula, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import pytest

from eddyline.schema.item_key import keys_of
from eddyline.schema.item_record import ItemRecord
from index.factory import HnswIndex
from index.hits import HitColumns
from index.port import Hit
from serving.answer import blend_features
from serving.answer.blend_features import (
    CONTEXTS,
    DAY_MS,
    OTHERS,
    VALUES,
    Known,
    Listed,
    Table,
    context,
    feature_names,
    features,
    rank_features,
)

LENGTH = 100
NOW_MS = 1_700_000_000_000


def hits(*found: tuple[str, float]) -> list[Hit]:
    return [Hit(item_id, score, NOW_MS - DAY_MS, 0, 0) for item_id, score in found]


def known(**changes: object) -> Known:
    fields: dict[str, object] = {
        "values": {},
        "now_ms": NOW_MS,
        "events": 0,
        "last_ms": 0,
        "visits_sum": 0.0,
    }
    return Known(**{**fields, **changes})  # type: ignore[arg-type]


def table() -> Table:
    return Table.of(
        [
            Listed("towers", hits(("a", 0.9), ("b", 0.8)), cosines=True),
            Listed("popular", hits(("b", 30.0), ("c", 10.0), ("d", 0.0))),
            Listed("newest", []),
        ]
    )


def column(name: str, found: np.ndarray) -> list[float]:
    names = feature_names(["towers", "popular", "newest"])
    return found[:, names.index(name)].tolist()


def test_each_candidate_is_there_once_with_its_ranks_and_shares() -> None:
    found = table()
    assert [hit.item_id for hit in found.hits] == ["a", "b", "c", "d"]
    assert found.ranks.tolist() == [[0, 1, -1, -1], [-1, 0, 1, 2], [-1, -1, -1, -1]]
    share = 1 / (1 + math.exp(-0.1 / blend_features.TEMPERATURE))
    assert found.shares[0].tolist() == pytest.approx([share, 1 - share, 0, 0])
    assert found.shares[1].tolist() == [0, 0.75, 0.25, 0]


def test_the_columns_of_paths() -> None:
    found, scale = features(table(), known(), LENGTH), math.log(LENGTH + 1)
    assert column("popular listed", found) == [0, 1, 1, 1]
    assert column("popular rank", found) == pytest.approx(
        [0, 1, math.log((LENGTH + 1) / 2) / scale, math.log((LENGTH + 1) / 3) / scale]
    )
    assert column("popular share", found) == pytest.approx(
        [0, math.log1p(75) / scale, math.log1p(25) / scale, 0]
    )
    assert column("newest listed", found) == [0, 0, 0, 0]
    assert column("paths", found) == pytest.approx([1 / 3, 2 / 3, 1 / 3, 1 / 3])
    assert column("age", found) == pytest.approx([math.log(2) / 9] * 4)


def test_every_value_has_its_column() -> None:
    values = {name: np.arange(4.0) for name in VALUES}
    found = features(table(), known(values=values), LENGTH)
    for name, (factor, divisor) in VALUES.items():
        assert column(name, found) == pytest.approx(
            [math.log1p(factor * n) / divisor for n in range(4)]
        )


def test_vectors_are_compared_with_the_user_and_the_last_items() -> None:
    unit = np.eye(4, dtype=np.float32)
    found = features(
        table(), known(vectors=unit, user_vector=unit[0], last_vectors=unit[[1, 2]]), LENGTH
    )
    assert column("tower", found) == [1, 0, 0, 0]
    assert column("last", found) == [0, 1, 0, 0]
    assert column("best of last", found) == [0, 1, 1, 0]
    assert column("mean of last", found) == [0, 0.5, 0.5, 0]


@pytest.mark.parametrize(("items", "compared"), [(4, 4), (5, 5), (6, 5), (100, 5)])
def test_only_the_last_five_items_are_compared(items: int, compared: int) -> None:
    last = np.zeros((items, 4), np.float32)
    last[compared:, 0] = 1.0
    last[compared - 1, 1] = 1.0
    vectors = np.eye(4, dtype=np.float32)
    found = features(table(), known(vectors=vectors, last_vectors=last), LENGTH)
    assert column("best of last", found) == [0, 1, 0, 0]


def test_what_is_not_known_is_the_same_for_all() -> None:
    found = features(table(), known(), LENGTH)
    for name in (*VALUES, *OTHERS[2:]):
        assert column(name, found) == [0, 0, 0, 0]
    assert found.shape == (4, len(feature_names(["towers", "popular", "newest"])))
    assert not Table.of([Listed("towers", [])]).hits
    assert features(Table.of([Listed("towers", [])]), known(), LENGTH).shape[0] == 0


@pytest.mark.parametrize(
    ("events", "stage"), [(0, 1), (1, 2), (4, 2), (5, 3), (19, 3), (20, 4), (100, 4)]
)
def test_the_context_has_one_stage(events: int, stage: int) -> None:
    found = context(known(events=events))
    assert found[1:5].tolist() == [float(n == stage) for n in range(1, 5)]
    assert len(found) == len(CONTEXTS)


def test_the_context_of_a_known_user() -> None:
    user = known(events=3, last_ms=NOW_MS - 60_000, visits_sum=9.0, user_vector=np.zeros(4))
    assert context(user)[5:].tolist() == pytest.approx(
        [math.log1p(9) / 6, math.log1p(60) / 18, 1.0]
    )
    assert context(known())[5:].tolist() == [0.0, 1.0, 0.0]


def test_a_clock_that_goes_back_gives_no_negative_age() -> None:
    late = known(last_ms=NOW_MS + 5_000)
    assert context(late)[6] == 0.0
    before = Table.of([Listed("newest", [Hit("a", 0.0, NOW_MS + DAY_MS, 0, 0)])])
    assert features(before, known(), LENGTH)[0, feature_names(["newest"]).index("age")] == 0.0


def test_names_are_distinct_and_ranks_are_among_them() -> None:
    names = feature_names(["towers", "popular"])
    assert len(set(names)) == len(names)
    assert set(rank_features(["towers", "popular"])) <= set(names)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 0.0])
def test_scores_that_say_nothing_have_no_shares(bad: float) -> None:
    found = Table.of([Listed("popular", hits(("a", bad), ("b", bad)))])
    assert found.shares.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("excluded", [(), {"i3", "i8"}])
def test_a_table_of_columns_is_that_of_objects(excluded: Collection[str]) -> None:
    """The same lists as one index returns them and as plain hits, to the bit."""
    rng = np.random.default_rng(4)
    index = HnswIndex(4)
    vectors = rng.normal(size=(60, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index.apply([ItemRecord(f"i{n}", 0, n, n, n, vectors[n]) for n in range(60)])
    lists = [
        Listed("towers", index.query(vectors[0], 20), cosines=True),
        Listed("nothing", []),
        Listed("interests", index.query(vectors[1], 30)),
        Listed("newest", index.newest(25)),
    ]
    assert all(isinstance(one.hits, HitColumns) for one in (lists[0], *lists[2:]))
    found = Table.of(lists, excluded)
    wanted = Table.of([one._replace(hits=[*one.hits]) for one in lists], excluded)
    assert found.ids == wanted.ids and [*found.hits] == [*wanted.hits]
    assert found.at_ms.tolist() == wanted.at_ms.tolist()
    assert found.ranks.tolist() == wanted.ranks.tolist()
    assert found.scores.tolist() == wanted.scores.tolist()
    assert found.shares.tolist() == wanted.shares.tolist()
    assert features(found, known(), 30).tolist() == features(wanted, known(), 30).tolist()
    assert index.vectors_of_hits(found.hits).tolist() == index.vectors_of(found.ids).tolist()
    assert index.keys_of_hits(found.hits).tolist() == keys_of(found.ids).tolist()
    index.close()


@pytest.mark.parametrize("length", [1, 2, 100])
def test_every_rank_has_its_feature(length: int) -> None:
    some = Table.of([Listed("newest", hits(*((f"i{n}", 0.0) for n in range(length))))])
    ranks = features(some, known(), length)[:, 1].tolist()
    scale = math.log(length + 1)
    assert ranks == [math.log((length + 1) / (n + 1)) / scale for n in range(length)]
