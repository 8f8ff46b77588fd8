"""The recall path of several interests: groups of the user's items, and what each finds."""

from __future__ import annotations

import numpy as np
import pytest

from eddyline.schema.item_record import ItemRecord
from eddyline.schema.user_history import EMPTY, Entry, UserHistory
from eddyline.stores.state_store import UserState
from index.arrays import Vector
from index.exact import ExactIndex
from index.filters import Filter
from serving.answer.deadline import Deadline, DeadlinePassed
from serving.recall import interests
from serving.recall.base import RecallRequest
from serving.recall.interests import GROUPS_MAX, ITEMS_MAX, InterestsPath, group, middles_of

D = 8


def unit(*parts: float) -> Vector:
    vector = np.zeros(D, np.float32)
    vector[: len(parts)] = parts
    return vector / np.float32(np.linalg.norm(vector))


def axis(number: int) -> Vector:
    return np.eye(D, dtype=np.float32)[number]


def index_of(**vectors: Vector) -> ExactIndex:
    index = ExactIndex(D)
    index.apply([ItemRecord(name, 0, n, 1, 1, v) for n, (name, v) in enumerate(vectors.items())])
    return index


def user_of(*items: str, kind: int = 1) -> UserState:
    entries = [Entry(item, 1_000 - n, kind) for n, item in enumerate(items)]
    return UserState(None, UserHistory(entries=entries), 0, None, {})


def request_of(user: UserState | None, k: int = 9, **more: object) -> RecallRequest:
    request = RecallRequest(user, k, (), None, 0.0, Deadline(5.0))
    return request._replace(**more)  # type: ignore[arg-type]


PATH = InterestsPath(None)  # type: ignore[arg-type]


def test_two_tastes_are_both_found_where_the_middle_suits_neither() -> None:
    index = index_of(
        jazz=axis(0), jazz2=unit(1, 0, 0.2), rock=axis(1), rock2=unit(0, 1, 0.2), between=unit(1, 1)
    )
    user = user_of("jazz", "rock")
    found = PATH.recall(request_of(user, 2, excluded={"jazz", "rock"}), index)
    assert [hit.item_id for hit in found.hits] == ["jazz2", "rock2"] and not found.why
    middle = unit(1, 1)
    assert index.query(middle, 1, {"jazz", "rock"})[0].item_id == "between"


def test_similar_items_are_one_group_and_newer_ones_weigh_more() -> None:
    close, far = unit(1, 0.2), axis(2)
    [first, second] = group(np.array([axis(0), far, close]))
    wanted = axis(0) + interests.DECAY**2 * close
    assert first == pytest.approx(wanted / np.linalg.norm(wanted), abs=1e-6)
    assert second == pytest.approx(far)


@pytest.mark.parametrize("items", [0, 1, GROUPS_MAX - 1, GROUPS_MAX, GROUPS_MAX + 1, D])
def test_there_are_no_more_groups_than_allowed(items: int) -> None:
    middles = group(np.eye(D, dtype=np.float32)[:items])
    assert len(middles) == min(items, GROUPS_MAX)
    assert np.linalg.norm(middles, axis=1) == pytest.approx(1.0)
    assert middles.dtype == np.float32


def test_the_cosine_from_which_an_item_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = np.array([axis(0), unit(3, 4)])
    cosine = float(pair[0].astype(np.float64) @ pair[1].astype(np.float64))
    for limit, groups in ((cosine - 1e-3, 1), (cosine, 1), (cosine + 1e-3, 2)):
        monkeypatch.setattr(interests, "JOINS_FROM", limit)
        assert len(group(pair)) == groups


def test_opposite_items_keep_the_middle_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interests, "GROUPS_MAX", 1)
    monkeypatch.setattr(interests, "DECAY", 1.0)
    assert group(np.array([axis(0), -axis(0)])) == pytest.approx(axis(0)[None])


@pytest.mark.parametrize("items", [ITEMS_MAX - 1, ITEMS_MAX, ITEMS_MAX + 1, 3 * ITEMS_MAX])
def test_only_the_newest_items_form_groups(items: int) -> None:
    index = index_of(new=axis(0), old=axis(1))
    user = user_of(*["new"] * (items - 1), "old")
    assert len(middles_of(user, index)) == (2 if items <= ITEMS_MAX else 1)


def test_without_a_live_positive_item_the_path_says_why() -> None:
    index = index_of(i0=axis(0))
    why = "no positive event of this user is on a live item"
    for user in (UserState(None, EMPTY, 0, None, {}), user_of("gone"), user_of("i0", kind=5)):
        found = PATH.recall(request_of(user), index)
        assert (found.hits, found.why) == ((), why)
    assert PATH.recall(request_of(None), index).why == "the user could not be read"


def test_fewer_items_than_wanted_are_explained() -> None:
    index = index_of(i0=axis(0), i1=axis(1))
    found = PATH.recall(request_of(user_of("i0"), 2, excluded={"i0"}), index)
    assert [hit.item_id for hit in found.hits] == ["i1"]
    assert found.why == "only 1 live items are unseen"
    found = PATH.recall(request_of(user_of("i0"), filters=Filter(deny=frozenset({"i1"}))), index)
    assert [hit.item_id for hit in found.hits] == ["i0"]
    assert found.why == "only 1 live items are unseen and pass the filter"


def test_no_search_starts_after_the_deadline() -> None:
    with pytest.raises(DeadlinePassed):
        PATH.recall(request_of(user_of("i0"), deadline=Deadline(0.0)), index_of(i0=axis(0)))
