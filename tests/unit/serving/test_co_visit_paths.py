"""The recall paths of co-visits and repeats: scores, limits, and what a query reads for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from eddyline.errors import StoreRefused, StoreUnavailable
from eddyline.schema import seen_items
from eddyline.schema.co_visits import EMPTY, CoVisits, decode, entries
from eddyline.schema.item_key import item_key
from eddyline.schema.partitioning import item_slot
from eddyline.schema.user_history import EMPTY as NO_HISTORY
from eddyline.schema.user_history import Entry
from eddyline.settings.worker import RECALL_PATHS
from eddyline.stores.state_store import Fence, Source, UserState
from index import port
from index.filters import Filter
from serving.answer.co_visit_reader import ITEMS_MAX, CoVisitReader, newest_items
from serving.answer.deadline import Deadline, DeadlinePassed
from serving.answer.fusions import make_fusion
from serving.answer.retriever import Query, Retriever
from serving.answer.seen import SeenPolicy
from serving.recall.again import AgainPath
from serving.recall.base import AFTER, BEFORE, QueryCoVisits, RecallContext, RecallRequest
from serving.recall.co_visits import CoVisitsBothPath, CoVisitsPath, sum_up
from serving.recall.registry import PATHS, make_paths
from serving.recall.trend import TrendList
from tests.unit.serving import test_coordinator
from tests.unit.serving.test_coordinator import Plant, catalogue, seen
from tests.unit.serving.test_retriever import LOG, SETTINGS, World

Visits = Mapping[str, Sequence[int]]


def stored(visits: Visits) -> bytes:
    """Entries of a row. visits: other item -> distance of each visit"""
    return entries(
        (item_key(other), round(1_000 / distance), int(distance == 1))
        for other, distances in visits.items()
        for distance in distances
    )


def row(visits: Visits, pruned: float = 0.0) -> CoVisits:
    """A row, see `stored`. pruned: visits that were pruned away"""
    found = decode(bytes(16) + stored(visits))
    return found._replace(visits_sum=found.visits_sum + pruned, next_sum=found.next_sum + pruned)


def user_of(*items: str, kind: int = 1) -> UserState:
    history = msgspec.structs.replace(
        NO_HISTORY, entries=[Entry(item, 100 - n, kind) for n, item in enumerate(items)]
    )
    return UserState(None, history, 0, None, {})


def request_of(
    found: QueryCoVisits | None, k: int = 9, *, user: UserState | None = None, **more: object
) -> RecallRequest:
    user = user or user_of("i0")
    request = RecallRequest(user, k, (), None, 0.0, Deadline(5.0), co_visits=found)
    return request._replace(**more)  # type: ignore[arg-type]


def context_of(world: World, **settings: object) -> RecallContext:
    changed = msgspec.structs.replace(SETTINGS, **settings)
    return RecallContext(changed, world.store, world.tower, world.popularity, ExitStack())


@pytest.fixture
def world() -> World:
    return World()


# ---------------------------------------------------------------- scores


def shown(world: World, path: str, request: RecallRequest) -> dict[str, float]:
    hits = PATHS[path](context_of(world)).recall(request, world.index).hits
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    return {hit.item_id: hit.score for hit in hits}


def test_directed_scores(world: World) -> None:
    rows = [row({"i1": [1, 2], "i2": [4]}, pruned=3.0), row({"i2": [1], "gone": [1]})]
    found = shown(world, "co_visits", request_of(QueryCoVisits(["a", "b"], rows, [EMPTY] * 2)))
    first, second = (1.75 + 3 + 10) ** -0.5, 0.9 * (2 + 10) ** -0.5
    wanted = {"i1": 1.5 * first, "i2": 0.25 * first + second}
    assert found == pytest.approx(wanted, rel=1e-6) and [*found] == ["i1", "i2"]


def test_symmetric_scores_are_divided_by_popularity(world: World) -> None:
    path = CoVisitsBothPath(context_of(world))
    clicks = TrendList(None, None)  # type: ignore[arg-type]
    clicks.replace([("i9", 400.0), ("i2", 90.0)])
    path._clicks = clicks
    after, before = row({"i1": [1], "i2": [1]}), row({"i1": [2], "i2": [2], "i3": [4]})
    request = request_of(QueryCoVisits(["a"], [after], [before]))
    found = {hit.item_id: hit.score for hit in path.recall(request, world.index).hits}
    weight = (2 + 1.25 + 5) ** -0.5
    assert [*found] == ["i1", "i2", "i3"]
    assert found["i1"] == pytest.approx(1.5 * weight * 10**-0.3, rel=1e-6)
    assert found["i2"] == pytest.approx(1.5 * weight * 100**-0.3, rel=1e-6)
    assert found["i3"] == pytest.approx(0.25 * weight * 10**-0.3, rel=1e-6)
    clicks.replace([("i1", 90.0)])
    found = {hit.item_id: hit.score for hit in path.recall(request, world.index).hits}
    assert [*found] == ["i2", "i1", "i3"], "the next list counts at once"


def test_next_scores_count_visits_right_after_the_last_five(world: World) -> None:
    rows = [row({"i1": [1, 1], "i2": [2]}, pruned=1.0), *[EMPTY] * 3]
    rows += [row({"i3": [1]}), row({"i4": [1]})]
    request = request_of(QueryCoVisits([*"abcdef"], rows, [EMPTY] * 6))
    found = shown(world, "next", request)
    assert found == pytest.approx({"i1": 2 / 8, "i3": 0.7**4 / 6}, rel=1e-6)


def test_again_scores_and_who_may_see_them(world: World) -> None:
    user = user_of("i1", "i2", "i1", "gone")
    hits = AgainPath(context_of(world, seen_items="keep")).recall(
        request_of(None, user=user), world.index
    )
    scores = {hit.item_id: hit.score for hit in hits.hits}
    assert scores == {"i1": 20**-0.25 + 22**-0.25, "i2": 21**-0.25}
    assert hits.why == "of 3 items of the user 2 can be returned"
    hidden = AgainPath(context_of(world)).recall(
        request_of(None, user=user, excluded={"i1", "i2", "gone"}), world.index
    )
    assert (hidden.hits, hidden.why) == ([], "seen items are hidden, see the setting seen_items")
    far = [("i3", 4, 1), ("i1", 3, 1), ("i4", 2, 5), ("i5", 4, 3), ("i3", 1, 0), ("gone", 9, 1)]
    seen = seen_items.stored([Entry(i, 60_000 * minute, kind) for i, minute, kind in far])
    more = request_of(None, user=replace(user, seen=seen))
    hits = AgainPath(context_of(world, seen_items="keep")).recall(more, world.index)
    first, second = sorted(("i3", "i5"), key=item_key)  # of the same minute
    assert {hit.item_id: hit.score for hit in hits.hits} == pytest.approx(
        {
            "i1": 20**-0.25 + 22**-0.25 + 27**-0.25,
            "i2": 21**-0.25,
            first: 25**-0.25,
            second: 26**-0.25,
        }
    )
    disliked = request_of(None, user=user_of("i1", kind=5))
    assert not AgainPath(context_of(world)).recall(disliked, world.index).hits


def test_repeated_keys_are_summed_and_what_is_not_above_0_is_left_out() -> None:
    keys = np.array([7, 3, 7, 9], np.uint64)
    found = sum_up([(keys, np.array([1, 2, 3, 0], np.float32), 0.5), (keys[:1], keys[:1] * 0, 1)])  # type: ignore[list-item]
    assert (found.keys.tolist(), found.scores.tolist()) == ([3, 7], [1.0, 2.0])
    assert len(sum_up([]).keys) == 0


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("piece", [0, 1, 16])
@pytest.mark.parametrize("k", [0, 1, 2, 6, 7, 8, 99])
def test_k_is_cut_among_equal_scores_by_id(
    world: World, k: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port, "PIECE_MIN", piece)
    others = {f"gone-{n}": [1] for n in range(30)} | {f"i{n}": [2] for n in range(1, 9)}
    request = request_of(QueryCoVisits(["a"], [row(others)], [EMPTY]), k, excluded={"i3"})
    found = CoVisitsPath(context_of(world)).recall(request, world.index)
    wanted = ["i1", "i2", "i4", "i5", "i6", "i7", "i8"]
    assert [hit.item_id for hit in found.hits] == wanted[:k]
    assert found.why == ("" if k <= 7 else "of 37 co-visited items 7 are live and unseen")


def test_the_filter_holds(world: World) -> None:
    rows = QueryCoVisits(["a"], [row({"i1": [1], "i2": [2]})], [EMPTY])
    request = request_of(rows, filters=Filter(deny=frozenset({"i1"})))
    found = CoVisitsPath(context_of(world)).recall(request, world.index)
    assert [hit.item_id for hit in found.hits] == ["i2"]
    assert found.why == "of 2 co-visited items 1 are live, unseen and pass the filter"


def test_only_the_best_are_looked_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[int] = []
    find = world.index.find_keys

    def counted(keys: np.ndarray, filters: Filter | None = None) -> object:
        looked_up.append(len(keys))
        return find(keys, filters)

    monkeypatch.setattr(world.index, "find_keys", counted)
    others = {f"i{n}": [1] * (2_000 - n) for n in range(12)}
    others |= {f"x{n}": [n % 90 + 2] for n in range(2_000)}
    rows = QueryCoVisits(["a"], [row(others)], [EMPTY])
    assert len(CoVisitsPath(context_of(world)).recall(request_of(rows, 9), world.index).hits) == 9
    assert len(looked_up) == 1 and looked_up[0] < 60


@pytest.mark.parametrize("name", ["co_visits", "co_visits_both", "next"])
def test_why_nothing_is_returned(world: World, name: str) -> None:
    path = PATHS[name](context_of(world))

    def why(request: RecallRequest) -> str:
        found = path.recall(request, world.index)
        assert not found.hits
        return found.why

    assert why(request_of(None)._replace(user=None)) == "the user could not be read"
    assert why(request_of(None)) == "the co-visits could not be read"
    assert why(request_of(QueryCoVisits([], [], []))) == "no positive event of this user is known"
    empty = QueryCoVisits(["i1"], [EMPTY], [EMPTY])
    assert why(request_of(empty)) == "of 0 co-visited items 0 are live and unseen"
    with pytest.raises(DeadlinePassed, match="before the co-visits were summed up"):
        path.recall(request_of(empty, deadline=Deadline(0.0)), world.index)


def test_the_newest_distinct_positive_items() -> None:
    assert newest_items(user_of("a", "b", "a", "c"), 9) == ["a", "b", "c"]
    assert newest_items(user_of("a", kind=5), 9) == []
    for n in (ITEMS_MAX - 1, ITEMS_MAX, ITEMS_MAX + 1):
        items = [f"i{i}" for i in range(n)]
        assert newest_items(user_of(*items), ITEMS_MAX) == items[:ITEMS_MAX]


# ---------------------------------------------------------------- what a query reads


def visited(world: World, after: Mapping[str, Visits]) -> None:
    made = {item: stored(visits) for item, visits in after.items()}
    source = Source("co-visits", 0)
    expected = world.store.fences(source, ["i0"])["i0"]
    new = Fence(expected.offset + 1 if expected else 0, LOG)
    world.store.append_co_visits("i0", source, expected, new, made, {}, 200)


def retriever_of(world: World, **settings: object) -> Retriever:
    context = context_of(world, **settings)
    return Retriever(
        store=world.store,
        users=world.users,
        popularity=world.popularity,
        paths=make_paths(context),
        item_slots=1,
        fusion=make_fusion(context.settings),
        seen=SeenPolicy(context.settings),
    )


def test_an_answer_of_co_visits_and_of_a_session(world: World) -> None:
    world.user("ana", "i0", "i1")
    visited(world, {"i0": {"i7": [1], "i1": [1]}, "i1": {"i9": [1]}, "i5": {"i3": [1, 1]}})
    retriever = retriever_of(world, recall_paths="co_visits")
    answer = retriever.retrieve(Query("ana", 3), world.index, Deadline(5.0))
    assert [(i.hit.item_id, i.path) for i in answer.items] == [
        ("i7", "co_visits"),
        ("i9", "co_visits"),
        ("i11", "newest"),
    ]
    session = (Entry("i5", 0, 1),)
    guest = retriever.retrieve(Query("", 1, session=session), world.index, Deadline(5.0))
    assert [i.hit.item_id for i in guest.items] == ["i3"] and not guest.missing


def test_rows_are_read_only_for_paths_that_need_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.user("ana", "i0")
    reads: list[tuple[Sequence[str], Sequence[str]]] = []
    read = world.store.read_co_visits

    def counted(after: Sequence[str], before: Sequence[str], item_slots: int) -> object:
        reads.append((list(after), list(before)))
        return read(after, before, item_slots)

    monkeypatch.setattr(world.store, "read_co_visits", counted)
    for paths, wanted in (
        ("towers,popular,again", []),
        ("towers,next", [(["i0"], [])]),
        ("co_visits_both,next", [(["i0"], ["i0"])]),
    ):
        reads.clear()
        retriever = retriever_of(world, recall_paths=paths)
        retriever.retrieve(Query("ana", 3), world.index, Deadline(5.0))
        assert reads == wanted
        reads.clear()
        retriever.retrieve(Query("nobody", 3), world.index, Deadline(5.0))
        assert reads == [], "nothing to read rows of"


@pytest.mark.parametrize("fusion", ["cascade", "rrf"])
@pytest.mark.parametrize(
    "error", [StoreUnavailable("Redis at redis://nowhere: away"), StoreRefused("a damaged row")]
)
def test_an_answer_without_rows_has_k_and_says_so(
    world: World, fusion: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.user("ana", "i0")

    def away(*_: object) -> None:
        raise error

    monkeypatch.setattr(world.store, "read_co_visits", away)
    retriever = retriever_of(world, recall_paths="co_visits,next,towers", fusion=fusion)
    answer = retriever.retrieve(Query("ana", 4), world.index, Deadline(5.0))
    assert len(answer.items) == 4 and {item.path for item in answer.items} == {"towers"}
    assert answer.missing == [f"redis: no co-visits: {error}"]
    whys = {result.path: result.candidates.why for result in answer.paths}
    assert whys["co_visits"] == whys["next"] == "the co-visits could not be read"


def test_a_server_that_is_away_costs_its_own_rows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited(world, {"i1": {"i7": [1]}, "i2": {"i8": [1]}})
    monkeypatch.setattr(world.store, "server_of", lambda slot: slot)
    read = world.store.read_co_visits

    def half(after: Sequence[str], before: Sequence[str], _: int) -> object:
        if "i2" in after:
            raise StoreUnavailable("one is away")
        return read(after, before, 1)

    monkeypatch.setattr(world.store, "read_co_visits", half)
    slots = {f"i{n}": item_slot(f"i{n}", 2) for n in range(1, 9)}
    other = next(item for item in slots if slots[item] != slots["i2"])
    visited(world, {other: {"i9": [1]}})
    outages = world.users.outages
    reader = CoVisitReader(world.store, 2, outages, (AFTER, BEFORE))
    found, missing = reader.read(user_of("i2", other), Deadline(5.0))
    assert missing == "redis: no co-visits: one is away" and found is not None
    assert [len(one.keys) for one in found.after] == [0, 1 + (other == "i1")]
    assert reader.read(user_of("i2"), Deadline(5.0))[0] is None
    with pytest.raises(DeadlinePassed, match="before the co-visits were read"):
        reader.read(user_of("i1"), Deadline(0.0))


@pytest.mark.parametrize(("left_s", "enough"), [(0.49, False), (0.51, True)])
def test_half_of_the_time_is_kept_for_the_answer(
    world: World, left_s: float, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited(world, {"i1": {"i7": [1]}})
    reader, deadline = CoVisitReader(world.store, 1, world.users.outages, (AFTER,)), Deadline(1.0)
    monkeypatch.setattr(deadline, "left_s", lambda: left_s)
    found, missing = reader.read(user_of("i1"), deadline)
    assert (found is not None) == enough
    late = "redis: no co-visits: half of the query's time has passed"
    assert missing == ("" if enough else late)


def test_seen_items_come_back_where_they_are_kept(world: World) -> None:
    world.user("ana", "i3", "i4")
    retriever = retriever_of(world, recall_paths="again,towers", seen_items="keep")
    answer = retriever.retrieve(Query("ana", 12), world.index, Deadline(5.0))
    assert [(i.hit.item_id, i.path) for i in answer.items][:2] == [("i3", "again"), ("i4", "again")]
    assert len(answer.items) == 12
    session = (Entry("i3", 0, 5),)
    answer = retriever.retrieve(Query("ana", 12, session=session), world.index, Deadline(5.0))
    assert "i3" not in {i.hit.item_id for i in answer.items} and len(answer.items) == 11
    ends = "1 of them are disliked in the user's list or the session"
    assert answer.short_because.endswith(ends)
    query = Query("ana", 3, session=session)
    [found], _ = retriever.explain(query, ["i3"], world.index, Deadline(5.0), 9)
    assert found.why.startswith("seen: disliked ") and found.why.endswith(" does not come back")


# ---------------------------------------------------------------- shards


@pytest.fixture
def plant() -> Iterator[Plant]:
    settings = msgspec.structs.replace(
        test_coordinator.SETTINGS,
        recall_paths=",".join(RECALL_PATHS),
        fusion="rrf",
        path_candidates=30,
    )
    made = Plant(3, catalogue(200), settings=settings)
    yield made
    made.close()


def test_a_coordinator_gives_the_same_fused_answers(plant: Plant) -> None:
    rng = np.random.default_rng(3)
    rows = {
        f"item-{n}": entries(
            (item_key(f"item-{other}"), int(rng.integers(1, 1_000)), int(rng.integers(0, 2)))
            for other in rng.integers(0, 220, 40)
        )
        for n in range(0, 200, 2)
    }
    source = Source("co-visits", 0)
    plant.store.append_co_visits("i0", source, None, Fence(0, LOG), rows, rows, 200)
    plant.clicked({f"item-{n}": 1_000 * n for n in range(40)})
    paths = set()
    for n in range(12):
        items = [f"item-{i}" for i in rng.integers(0, 200, n)]
        plant.user(f"u{n}", *items)
        for k in (1, 10, 150):
            answer, alone = (client.retrieve(f"u{n}", k) for client in (plant.client, plant.one))
            assert seen(answer) == seen(alone)
            assert [i.fused_score for i in answer.items] == [i.fused_score for i in alone.items]
            assert [[*i.paths] for i in answer.items] == [[*i.paths] for i in alone.items]
            assert len(answer.items) == k and not answer.missing
            paths |= {source.path for item in answer.items for source in item.paths}
    assert paths >= {"towers", "co_visits", "co_visits_both", "next", "popular", "newest"}
