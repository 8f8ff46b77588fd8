"""Every recall path and fusion: its order of all items is the order of what it serves."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest

from eddyline.schema import seen_items
from eddyline.schema.co_visits import entries
from eddyline.schema.event_decay import decays
from eddyline.schema.item_key import item_key
from eddyline.schema.item_record import ItemRecord
from eddyline.schema.partitioning import item_slot
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.settings.loader import Settings
from eddyline.settings.worker import RECALL_PATHS
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, LogId, Source, UserState
from embeddings.towers.user_tower import query_vector
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.port import Hit, Index, LiveItems
from serving.answer.co_visit_reader import CoVisitReader
from serving.answer.deadline import Deadline
from serving.answer.fusion import Cascade, Fusion
from serving.answer.outages import Outages
from serving.answer.reciprocal_rank import ReciprocalRank
from serving.recall.base import AFTER, BEFORE, PathScores, RecallContext, RecallPath, RecallRequest
from serving.recall.popularity import Popularity
from serving.recall.registry import make_paths

D, N = 4, 60
SETTINGS = Settings(
    item_slots=2,
    popular_bucket_s=10,
    popular_half_life_s=10,
    popular_limit=20,
    popular_buckets=5,
    popular_fast_half_life_events=2,
    popular_slow_half_life_events=40,
)


class Mean:
    """A tower that is simple to foresee: the mean of the history."""

    history_max = 3
    dimension = D

    def encode_one(self, history: np.ndarray, profile: object) -> np.ndarray:
        mean = history.mean(axis=0)
        return (mean / np.linalg.norm(mean)).astype(np.float32)

    def combine(self, forward: np.ndarray, embedding: np.ndarray | None) -> np.ndarray:
        return query_vector(forward, embedding)


class World:
    """Items with twins of equal vectors, equal times and equal clicks; some were deleted."""

    def __init__(self, seed: int, index: Index) -> None:
        self.rng, self.index, self.store = np.random.default_rng(seed), index, MemoryStore()
        vectors = self.rng.normal(size=(N // 2, D)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        times = self.rng.integers(0, 9, N).tolist()
        for n in range(N):
            vector = vectors[n % len(vectors)]
            index.apply([ItemRecord(f"i{n}", 0, n, times[n], 1, vector)])
        gone = self.rng.choice(N, 5, replace=False).tolist()
        index.apply([ItemRecord(f"i{n}", 0, 2 * N + n, 0, 1, None) for n in gone])
        self.popularity = Popularity(SETTINGS, self.store)
        context = RecallContext(SETTINGS, self.store, Mean(), self.popularity, ExitStack())  # type: ignore[arg-type]
        self.paths = make_paths(context, RECALL_PATHS)
        self.reader = CoVisitReader(self.store, 2, Outages(self.store), (AFTER, BEFORE))
        self.clicks = 0

    def click(self) -> None:
        """Clicks on some items, some of them not live, in the newest or an older bucket."""
        for slot in ("i0", "i1"):
            source = Source("clicks", 0)
            expected = self.store.fences(source, [slot])[slot]
            new = Fence(self.clicks, LogId("cluster", "topic"))
            names = [f"i{n}" for n in self.rng.integers(0, N + 3, 8) if n % 2 == int(slot[1])]
            counts = {name: 1_000 * int(self.rng.integers(1, 3)) for name in names}
            bucket = self.clicks // 3 + int(self.rng.integers(0, 2))
            self.store.count_clicks(
                slot, source, expected, new, {bucket: counts}, 5, 99, names, decays(SETTINGS)
            )
            self.visit(slot)
        self.clicks += 1
        assert not self.popularity.read()

    def visit(self, slot: str) -> None:
        """Visits after and before some items, of few kinds, so that scores tie."""
        source = Source("co-visits", 0)
        expected = self.store.fences(source, [slot])[slot]
        new = Fence(self.clicks, LogId("cluster", "topic"))

        def rows() -> dict[str, bytes]:
            found = {}
            for name in (f"i{n}" for n in range(N) if item_slot(f"i{n}", 2) == slot):
                if self.rng.random() < 0.3:
                    others = [f"i{n}" for n in self.rng.integers(0, N + 3, 9)]
                    distances = self.rng.integers(1, 3, 9).tolist()
                    found[name] = entries(
                        (item_key(other), 1_000 // distance, int(distance == 1))
                        for other, distance in zip(others, distances, strict=True)
                    )
            return found

        self.store.append_co_visits(slot, source, expected, new, rows(), rows(), 12)

    def request(self) -> RecallRequest:
        items = self.rng.choice(N, int(self.rng.integers(0, 5)), replace=False).tolist()
        entries = tuple(Entry(f"i{n}", 100 - at) for at, n in enumerate(items))
        embedding = None
        if self.rng.random() < 0.5:
            drawn = self.rng.normal(0, 0.1, D).astype("<f4")
            embedding = (9, drawn.tobytes())
        others = self.rng.integers(0, N + 3, int(self.rng.integers(0, 6)))
        beyond = [Entry(f"i{n}", 60_000 * int(self.rng.integers(4)), n % 6) for n in others]
        seen = seen_items.stored(beyond)
        user = UserState(None, UserHistory(entries=entries), 0, embedding, {}, seen)
        excluded = {f"i{n}" for n in items} if self.rng.random() < 0.7 else set()
        found, missing = self.reader.read(user, Deadline(60))
        assert not missing
        return RecallRequest(user, N, excluded, None, 0.0, Deadline(60), co_visits=found)


def in_order(
    scores: PathScores, number: int, ids: list[str], excluded: object
) -> list[tuple[str, float]]:
    """(id, score), by score and then id, as every path orders equal scores."""
    places = np.flatnonzero(scores.scores[number] > -np.inf)
    if scores.exact is None:
        values = scores.scores[number][places]
    else:
        values = scores.exact(number, places)
        assert np.abs(values - scores.scores[number][places]).max(initial=0) <= scores.error
    pairs = zip(places.tolist(), values.tolist(), strict=True)
    found = [(ids[place], value) for place, value in pairs if ids[place] not in excluded]  # type: ignore[operator]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def shown(path: RecallPath, hit: Hit) -> tuple[str, float]:
    return hit.item_id, hit.at_ms if path.name == "newest" else hit.score


@pytest.fixture(params=[0, 1, 2])
def world(request: pytest.FixtureRequest) -> World:
    index: Index = ExactIndex(D) if request.param == 0 else HnswIndex(D)
    return World(request.param, index)


def test_a_path_orders_all_items_as_it_serves_them(world: World) -> None:
    served = dict.fromkeys((path.name for path in world.paths), 0)
    for turn in range(12):
        world.click()
        items = world.index.live_items()
        requests = [world.request() for _ in range(4)]
        for path in world.paths:
            scores = path.score_all(requests, world.index, items)
            assert scores.scores.shape == (4, len(items.ids))
            for number, request in enumerate(requests):
                found = in_order(scores, number, items.ids, request.excluded)
                world.popularity.refresh()
                hits = path.recall(request, world.index).hits
                assert found == [shown(path, hit) for hit in hits], (path.name, turn)
                served[path.name] += len(hits)
    assert all(served.values()), served


def test_the_cascade_orders_all_items_as_it_serves_them(world: World) -> None:
    lengths = set()
    for _ in range(12):
        world.click()
        items, request = world.index.live_items(), world.request()
        paths = [path for path in world.paths if path.name in ("towers", "popular", "newest")]
        found = order_of(paths, world, Cascade(), request, items)
        world.popularity.refresh()
        served, _ = Cascade().fuse(paths, request, world.index)
        assert found == [one.hit.item_id for one in served]
        lengths.add(len({one.path for one in served}))
    assert {1, 2} <= lengths, "with and without the towers"


@pytest.mark.parametrize("candidates", [1, 7, 100])
@pytest.mark.parametrize(
    "fused",
    ["towers,popular,newest", "newest,towers", "popular", "co_visits,next", ",".join(RECALL_PATHS)],
)
def test_reciprocal_ranks_order_all_items_as_they_serve_them(
    world: World, candidates: int, fused: str
) -> None:
    paths, filled = fused.split(","), 0
    fusion = ReciprocalRank(paths, {"towers": 3.0, "newest": 0.3}, candidates=candidates)
    for _ in range(8):
        world.click()
        items, request = world.index.live_items(), world.request()
        found = order_of(world.paths, world, fusion, request, items)
        world.popularity.refresh()
        served, _ = fusion.fuse(world.paths, request, world.index)
        assert found == [one.hit.item_id for one in served]
        assert not set(found) & set(request.excluded)
        assert len(found) == len(items.ids) - len({*items.ids} & {*request.excluded})
        filled += sum(not one.fused_score for one in served)
        for k in (0, 1, 5, len(found) - 1):
            some, _ = fusion.fuse(world.paths, request._replace(k=k), world.index)
            assert some == served[:k], "the first k of the longer answer"
    assert filled or (candidates == 100 and "newest" in paths)


def order_of(
    paths: list[RecallPath], world: World, fusion: Fusion, request: RecallRequest, items: LiveItems
) -> list[str]:
    """Item ids by `order_all`, equal scores by id."""
    scores = {path.name: path.score_all([request], world.index, items) for path in paths}
    places = [items.place_of[i] for i in request.excluded if i in items.place_of]
    order = fusion.order_all(scores, items, np.array(places, np.int64))
    found: list[str] = []
    for tier, of_tier in enumerate(order.scores):
        others = {items.ids[place] for place in np.flatnonzero(order.tiers != tier)}
        within = in_order(of_tier, 0, items.ids, others | set(request.excluded))
        found += [item_id for item_id, _ in within]
    return found


def test_live_items_are_those_of_the_queries(world: World) -> None:
    items = world.index.live_items()
    described = world.index.describe(items.ids)
    assert [hit.at_ms for hit in described if hit] == items.at_ms.tolist()
    assert len(items.ids) == world.index.stats().live == len(set(items.ids)) == N - 5
    assert np.array_equal(world.index.vectors_of(items.ids), items.vectors)
    assert [items.ids[place] for place in items.place_of.values()] == list(items.place_of)
