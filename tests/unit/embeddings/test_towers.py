"""The towers in numpy: unit norm, bits independent of the batch, features equal in any process."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eddyline.errors import VectorRejected
from eddyline.schema.events import Item
from embeddings.towers import features
from embeddings.towers.features import TRIGRAM_ROWS, TRIGRAMS_MAX, trigrams
from embeddings.towers.item_tower import STAND_IN_NORM, ItemTower, stand_in
from embeddings.towers.numerics import row_products, unit
from embeddings.towers.user_tower import UserTower, query_vector

D, H, LENGTH = 64, 128, 20
ITEMS = [
    Item(
        item_id=f"i{n}",
        title=f"Film number {n} of {n % 7}",
        categories=[("Drama", "Comedy", "War")[n % 3]],
        tags=["quirky"] if n % 4 == 0 else [],
        attributes={"year": 1950 + n, "language": ("en", "fr")[n % 2]},
        vector=[n / 10, -1.0, 2.0] if n % 5 else None,
    )
    for n in range(70)
]
PROFILES = [{"age": 15 + n, "gender": "FM"[n % 2]} if n % 3 else {} for n in range(200)]


def draw(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(0, 0.1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def item_tower() -> ItemTower:
    space = features.learn_items(ITEMS, dense=3)
    arrays = {
        "identity": draw(60, D),
        "features": draw(space.rows, D),
        "projection": draw(3, D),
        "projection_bias": draw(D),
        "w1": draw(D, H),
        "b1": draw(H),
        "w2": draw(H, D),
        "b2": draw(D),
    }
    return ItemTower(space, {f"i{n}": n for n in range(60)}, arrays)


@pytest.fixture(scope="module")
def user_tower() -> UserTower:
    space = features.learn_profiles(PROFILES)
    arrays = {
        "query": draw(D, 2 * D),
        "query_bias": draw(2 * D),
        "bias": draw(2, LENGTH),
        "value": draw(2 * D, D),
        "start": draw(D),
        "profile": draw(space.rows, D),
        "w1": draw(D, H),
        "b1": draw(H),
        "w2": draw(H, D),
        "b2": draw(D),
    }
    return UserTower(space, arrays)


TABLE = unit(draw(500, D))


def histories(n: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 500, int(length)).tolist() for length in rng.integers(0, LENGTH + 5, n)]


def norms(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows, axis=1)


def test_an_event_has_the_same_bits_in_any_batch(user_tower: UserTower) -> None:
    some = histories(len(PROFILES))
    together = user_tower.encode(TABLE, some, PROFILES)
    for size in (1, 7, 32, 33, 64):
        for at in range(0, len(some) - size, 11):
            part = user_tower.encode(TABLE, some[at : at + size], PROFILES[at : at + size])
            assert part.tobytes() == together[at : at + size].tobytes(), (size, at)


def test_a_row_product_does_not_depend_on_the_row_s_place() -> None:
    """AMD Zen and Intel Haswell kernels sum the rows of one matrix product in different orders."""
    matrix, row = draw(64, 128), draw(1, 64)
    alone = row_products(row, matrix)[0].tobytes()
    for rows in (2, 11, 12, 13, 32, 64, 257):
        for place in (0, rows // 2, rows - 1):
            batch = draw(rows, 64)
            batch[place] = row
            assert row_products(batch, matrix)[place].tobytes() == alone, (rows, place)


def test_an_item_has_the_same_bits_in_any_batch(item_tower: ItemTower) -> None:
    together = item_tower.encode(ITEMS)
    for size in (1, 7, 33, 64):
        for at in range(0, len(ITEMS) - size + 1, 3):
            assert (
                item_tower.encode(ITEMS[at : at + size]).tobytes()
                == together[at : at + size].tobytes()
            )


def test_every_answer_is_a_finite_unit_vector(item_tower: ItemTower, user_tower: UserTower) -> None:
    nothing = Item(item_id="nothing known")
    for rows in (
        item_tower.encode([*ITEMS, nothing]),
        user_tower.encode(TABLE, histories(40), PROFILES[:40]),
        user_tower.encode(TABLE, [[], ()], [{}, {"age": 30}]),
    ):
        assert rows.dtype == np.float32
        assert np.isfinite(rows).all()
        np.testing.assert_allclose(norms(rows), 1.0, atol=1e-6)


def test_nothing_in_nothing_out(item_tower: ItemTower, user_tower: UserTower) -> None:
    assert item_tower.encode([]).shape == (0, D)
    assert user_tower.encode(TABLE, [], []).shape == (0, D)


def test_one_user_alone_agrees_with_the_batch(user_tower: UserTower) -> None:
    some = histories(60)
    together = user_tower.encode(TABLE, some, PROFILES[:60])
    alone = [user_tower.encode_one(TABLE[h], p) for h, p in zip(some, PROFILES, strict=False)]
    np.testing.assert_allclose(np.array(alone), together, atol=2e-6)


def test_history_beyond_the_limit_does_not_count(user_tower: UserTower) -> None:
    rows = list(range(LENGTH + 10))
    vectors = TABLE[rows]
    at_limit = user_tower.encode(TABLE, [rows[:LENGTH]], [{}])
    for beyond in (1, 2, 10):
        assert (
            user_tower.encode(TABLE, [rows[: LENGTH + beyond]], [{}]).tobytes()
            == at_limit.tobytes()
        )
    assert user_tower.encode(TABLE, [rows[: LENGTH - 1]], [{}]).tobytes() != at_limit.tobytes()
    assert (
        user_tower.encode_one(vectors, {}).tobytes()
        == user_tower.encode_one(vectors[:LENGTH], {}).tobytes()
    )


def test_order_and_profile_count(user_tower: UserTower) -> None:
    vectors = unit(draw(5, D))
    plain = user_tower.encode_one(vectors, {})
    assert not np.allclose(plain, user_tower.encode_one(vectors[::-1], {}), atol=1e-3)
    assert not np.allclose(plain, user_tower.encode_one(vectors, {"gender": "F"}), atol=1e-3)
    assert np.array_equal(plain, user_tower.encode_one(vectors, {"shoe size": 44}))


def test_unknown_items_never_share_a_vector(item_tower: ItemTower) -> None:
    twins = [Item(item_id=f"new-{n}", title="Heat", categories=["Drama"]) for n in range(50)]
    vectors = item_tower.encode(twins + [Item(item_id=f"bare-{n}") for n in range(50)])
    assert len({row.tobytes() for row in vectors}) == 100
    assert (vectors[:50] @ vectors[0]).min() > 0.99
    assert np.linalg.norm(stand_in("x", D)) == pytest.approx(STAND_IN_NORM, rel=1e-5)


def test_a_dense_vector_of_another_length_is_refused(item_tower: ItemTower) -> None:
    with pytest.raises(
        VectorRejected, match="'odd' has 2 numbers, this generation was trained with 3"
    ):
        item_tower.encode([Item(item_id="odd", vector=[1.0, 2.0])])
    with pytest.raises(VectorRejected, match="NaN"):
        item_tower.encode([Item(item_id="odd", vector=[1.0, 2.0, float("nan")])])


def test_query_vector_adds_and_normalises() -> None:
    f, e = unit(draw(3, D)), draw(3, D) * 0.1
    together = query_vector(f, e)
    np.testing.assert_allclose(together, unit(f + e))
    assert query_vector(f[0], e[0]).tobytes() == together[0].tobytes()
    assert query_vector(f, None) is f
    assert np.isfinite(query_vector(f[0], -f[0])).all()


def test_features_do_not_depend_on_the_process() -> None:
    space = features.learn_items(ITEMS)
    rows, weights = space.of_item(Item(item_id="x", title="Heat"))
    first = space.trigram_row
    assert [row - first for row in rows] == [1491, 3494, 3866, 1413]
    assert weights == [0.5] * 4


def test_a_feature_space_survives_json() -> None:
    import msgspec

    space = features.learn_items(ITEMS, dense=3)
    again = msgspec.json.decode(msgspec.json.encode(space), type=features.FeatureSpace)
    assert again == space
    assert all(again.of_item(item) == space.of_item(item) for item in ITEMS)


def test_numbers_fall_into_bins_of_about_equal_counts() -> None:
    space = features.learn_items(
        [Item(item_id=str(n), attributes={"year": n}) for n in range(1600)]
    )
    number = space.numbers["year"]
    rows = [space.of_item(Item(item_id="x", attributes={"year": n}))[0][0] for n in range(1600)]
    counts = np.bincount(np.array(rows) - number.row)
    assert len(counts) == 16
    assert counts.min() >= 99
    assert counts.max() <= 101
    below, above = ({"year": -(10**9)}, {"year": 1e12})
    assert space.of_item(Item(item_id="x", attributes=below))[0] == [number.row]
    assert space.of_item(Item(item_id="x", attributes=above))[0] == [number.row + 15]
    assert space.of_item(Item(item_id="x", attributes={"year": " 1e3"}))[0] == [rows[1000]]
    for text in ("", "new", "nan", "inf", "1_000", "1e999", "١٢"):
        assert space.of_item(Item(item_id="x", attributes={"year": text}))[0] == []
    assert space.of_item(Item(item_id="x", attributes={"year": float("inf")}))[0] == []


@pytest.mark.parametrize(
    ("values", "numeric", "left_out"),
    [
        ([3, 4, 5, "new"], True, 1),
        ([3, 4, 5, "4", " 6.5 "], True, 0),
        ([3, 4, "new", "new"], False, 0),
        (["3", "4", "5"], False, 0),  # ids and codes stay texts
        ([3, 4, 5, True, "new"], True, 2),
        ([3, 4, True, "new"], False, 0),
    ],
)
def test_most_values_decide_whether_an_attribute_is_numeric(
    values: list[Any], numeric: bool, left_out: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    items = [Item(item_id=str(n), attributes={"price": v}) for n, v in enumerate(values)]
    space = features.learn_items(items)
    assert set(space.numbers) == ({"price"} if numeric else set())
    logged = [getattr(record, "values_left_out", 0) for record in caplog.records]
    assert logged == ([left_out] if left_out else [])
    if numeric:
        without = features.learn_items(items[:3])
        read = {"price": "4"}
        assert space.of_item(Item(item_id="x", attributes=read))[0]
        assert left_out != 1 or space.numbers == without.numbers


VALUES = st.text(max_size=9) | st.integers() | st.floats() | st.booleans()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.dictionaries(st.text(max_size=5), VALUES))
def test_any_item_has_valid_rows(title: str, attributes: dict) -> None:
    space = features.learn_items(ITEMS)
    rows, weights = space.of_item(Item(item_id="x", title=title, attributes=attributes))
    assert len(rows) == len(weights)
    assert all(0 <= row < space.rows for row in rows)
    assert len(trigrams(title)) <= TRIGRAMS_MAX
    assert space.trigram_rows == TRIGRAM_ROWS
