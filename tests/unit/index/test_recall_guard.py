"""The recall guard: it notices damage, takes steps, steps back; its cost is bounded."""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from cli.commands.query import recall_of
from eddyline.statistics import ConfidenceSequence
from index.arrays import Ints
from index.backends.base import AnnBackend, AnnIndex
from index.backends.hnswlib import HnswBackend
from index.factory import HnswIndex
from index.filters import Filter
from index.live import LiveIndex
from index.recall_guard import RecallGuard
from index.search import filtered
from index.strata import FILTERED
from serving.rpc.converters import sizes_of
from tests.unit.index.item_records import records, units, wait_until

D, N, K = 16, 3_000, 20
VECTORS, QUERIES = units(N, D, 1), units(500, D, 2)
RECORDS = records(VECTORS)


class Half(AnnIndex):
    """An ANN index that knows every `step`-th item only."""

    name, memory_bytes, size = "half", 0, N

    def __init__(self, vectors: np.ndarray, labels: Ints, step: int) -> None:
        self.vectors, self.labels = vectors[::step], labels[::step]

    def search(self, query: np.ndarray, fetch: int, breadth: int = 0) -> Ints:
        return self.labels[np.argsort(-(self.vectors @ query))[: max(fetch, breadth)]]


class HalfBackend(AnnBackend):
    """Builds an index without every second item if `bad(number of the build)`."""

    name, settings = "half", MappingProxyType({})

    def __init__(self, bad: Callable[[int], bool]) -> None:
        self.bad, self.builds = bad, 0

    def build(self, labels: Ints, vectors: np.ndarray, stop: threading.Event) -> Half:
        self.builds += 1
        return Half(vectors, labels, 2 if self.bad(self.builds) else 1)


class Damaged(LiveIndex):
    """A filled index on `HalfBackend` with a small breadth."""

    def __init__(
        self,
        bad: Callable[[int], bool],
        vectors: np.ndarray = VECTORS,
        attributes: dict[str, object] | None = None,
    ) -> None:
        self.half = HalfBackend(bad)
        super().__init__(D, self.half, breadth=30, exact_below=100, fresh_max=1_000_000)
        self.apply([replace(r, attributes=attributes or {}) for r in records(vectors)])
        wait_until(lambda: self.stats().rebuilds == 1)


class Clock:
    """Real time plus what a test adds."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


def query_until(
    index: LiveIndex,
    condition: Callable[[], bool],
    timeout_s: float = 60.0,
    filters: Filter | None = None,
) -> list[str]:
    """Query until the condition holds; the steps of the guard on the way, without repeats."""
    steps: list[str] = []
    deadline, at = time.monotonic() + timeout_s, 0
    while not condition():
        assert time.monotonic() < deadline, f"timed out after {steps}, {index.stats().recall}"
        at += 1
        index.query(QUERIES[at % len(QUERIES)], K, (), filters)
        recall = index.stats().recall
        assert recall is not None
        if steps[-1:] != [recall.step]:
            steps.append(recall.step)
        time.sleep(0.0005)
    return steps


def guarded(index: LiveIndex, **more: object) -> RecallGuard:
    options = {
        "share": 1.0,
        "floor": 0.95,
        "samples": 20,
        "breadth_max": 240,
        "cpu_share": 1.0,
        "hold_s": 0.0,
    }
    guard = index.guard = RecallGuard(index, **(options | more))  # type: ignore[arg-type]
    return guard


@pytest.fixture
def made() -> Iterator[list[LiveIndex]]:
    indexes: list[LiveIndex] = []
    yield indexes
    for index in indexes:
        index.close()
    assert not [
        t.name for t in threading.enumerate() if t.name in ("recall-guard", "index-rebuild")
    ]


def true_recall(index: LiveIndex) -> float:
    good = 0
    for query in QUERIES[:100]:
        cut = np.sort(VECTORS @ query)[-K]
        good += sum(hit.score >= cut - 1e-6 for hit in index.query(query, K))
    return good / (100 * K)


def test_good_recall_is_reported_and_changes_nothing(made: list[LiveIndex]) -> None:
    index = HnswIndex(D, exact_below=100)
    made.append(index)
    index.apply(RECORDS)
    wait_until(lambda: index.stats().rebuilds == 1)
    guard = guarded(index)
    assert query_until(index, lambda: guard.recall().samples >= 100) == ["normal"]
    recall = index.stats().recall
    assert (
        recall is not None
        and recall.low > 0.9
        and recall.estimate > 0.99
        and recall.high >= recall.estimate
    )
    assert (recall.raised, recall.lowered, index.breadth) == (0, 0, 200)


def test_a_search_with_too_few_candidates_is_widened(
    made: list[LiveIndex], caplog: pytest.LogCaptureFixture
) -> None:
    """hnswlib with a thin graph and ef 1: more candidates alone restore its recall."""
    backend = HnswBackend(m=4, ef_construction=20, ef=1)
    index = LiveIndex(D, backend, breadth=1, exact_below=100, fresh_max=1_000_000)
    made.append(index)
    index.apply(RECORDS)
    wait_until(lambda: index.stats().rebuilds == 1)
    assert true_recall(index) < 0.85
    guard = guarded(index, breadth_max=2_048, hold_s=3_600.0)
    with caplog.at_level(logging.WARNING):
        steps = query_until(
            index, lambda: guard.recall().raised > 0 and guard.recall().samples >= 190
        )
    assert steps[:2] == ["normal", "wider"] and "exact" not in steps
    assert true_recall(index) >= 0.93 and index.breadth >= 64
    record = caplog.records[0]
    assert "below its floor" in record.message
    assert (record.step, record.breadth) == ("wider", 32)  # type: ignore[attr-defined]
    assert record.recall < record.recall_high < record.recall_floor == 0.95  # type: ignore[attr-defined]


def test_a_rebuild_follows_if_more_candidates_do_not_help_and_then_the_steps_back(
    made: list[LiveIndex],
) -> None:
    index = Damaged(lambda build: build == 1)
    made.append(index)
    assert true_recall(index) < 0.6
    guard = guarded(index)
    steps = query_until(
        index, lambda: guard.recall().step == "normal" and guard.recall().lowered > 0
    )
    # The last step ends the queries, so it may be missing here.
    assert steps[:4] == ["normal", "wider", "rebuild", "wider"]
    assert index.half.builds == 2 and index.breadth == 30 and not index.exact_only
    assert true_recall(index) == 1.0


def test_answers_are_exact_if_a_rebuild_does_not_help_until_recall_is_good_again(
    made: list[LiveIndex], caplog: pytest.LogCaptureFixture
) -> None:
    broken = True
    index = Damaged(lambda _: broken)
    made.append(index)
    clock = Clock()
    guard = guarded(index, hold_s=60.0, clock=clock)
    with caplog.at_level(logging.INFO, "index.recall_guard"):
        steps = query_until(index, lambda: index.exact_only)
        assert [step for step in steps if step != "exact"] == [
            "normal",
            "wider",
            "rebuild",
            "wider",
        ]
        assert true_recall(index) == 1.0 and index.half.builds == 2
        # The guard goes on comparing the segment, which is still bad, and holds the step.
        query_until(index, lambda: guard.recall().samples >= 40)
        assert (
            guard.recall().step == "exact" and guard.recall().high < 0.7 and index.half.builds == 2
        )
        broken = False
        clock.ahead_s += 61.0
        query_until(index, lambda: index.half.builds == 3 and guard.recall().step == "exact")
        clock.ahead_s += 121.0
        query_until(index, lambda: guard.recall().samples >= 20 or not index.exact_only)
        while guard.recall().step != "normal":
            clock.ahead_s += 121.0
            lowered = guard.recall().lowered
            query_until(index, lambda: guard.recall().lowered > lowered)
    assert not index.exact_only and index.breadth == 30 and true_recall(index) == 1.0
    logged = [(record.step, record.breadth) for record in caplog.records]  # type: ignore[attr-defined]
    # Up to 240, a rebuild in vain, exact answers, another rebuild, all the way back.
    assert logged == [
        ("wider", 60),
        ("wider", 120),
        ("wider", 240),
        ("rebuild", 240),
        ("wider", 240),
        ("exact", 240),
        ("rebuild", 240),
        ("exact", 240),
        ("wider", 240),
        ("wider", 120),
        ("wider", 60),
        ("normal", 30),
    ]


def test_exact_answers_follow_a_failed_rebuild_at_once(made: list[LiveIndex]) -> None:
    def bad(build: int) -> bool:
        if build > 1:
            raise MemoryError("no room")
        return True

    index = Damaged(bad)
    made.append(index)
    guard = guarded(index, breadth_max=30, hold_s=3_600.0)
    query_until(index, lambda: index.exact_only)
    assert true_recall(index) == 1.0 and guard.recall().raised == 1
    assert "no room" in index.stats().rebuild_error


def test_a_step_back_that_was_undone_waits_longer_the_next_time(made: list[LiveIndex]) -> None:
    """30 candidates are bad, 60 are good: it settles on 60 and tries 30 ever more rarely."""
    index = Damaged(lambda _: False)
    made.append(index)
    main = index._version.main
    assert isinstance(main, Half)
    wide, narrow = main.search, Half(VECTORS, np.arange(N), 2).search
    main.search = lambda query, fetch, breadth=0: (  # type: ignore[method-assign]
        narrow if max(fetch, breadth) < 60 else wide
    )(query, fetch, breadth)
    clock = Clock()
    guard = guarded(index, breadth_max=60, hold_s=60.0, clock=clock)
    query_until(index, lambda: index.breadth == 60)
    waits = []
    for _ in range(3):
        waited, lowered = 0.0, guard.recall().lowered
        while guard.recall().lowered == lowered:
            clock.ahead_s += 10.0
            waited += 10.0
            compared = guard.recall().shadowed + 21
            query_until(index, lambda compared=compared: guard.recall().shadowed >= compared)
        waits.append(waited)
        query_until(index, lambda: index.breadth == 60)
    assert waits[0] >= 60 and waits[1] >= 1.5 * waits[0] and waits[2] >= 1.5 * waits[1]


def test_one_query_that_repeats_decides_nothing(made: list[LiveIndex]) -> None:
    """The index finds half of the items; a user repeats one query, others send two more."""
    index = Damaged(lambda _: True)
    made.append(index)
    guard = guarded(index)
    for _ in range(3):
        for query in (QUERIES[0], QUERIES[1], QUERIES[2]):
            for _ in range(30):
                index.query(query, K)
                wait_until(lambda: not guard._busy.locked())
    recall = guard.recall()
    assert (recall.step, recall.samples, recall.raised, index.breadth) == ("normal", 3, 0, 30)
    assert recall.shadowed == 3 and recall.skipped == 267
    # Distinct queries of the same index decide.
    query_until(index, lambda: guard.recall().raised > 0)


def test_its_cost_is_bounded(made: list[LiveIndex]) -> None:
    """Every query is sampled; one comparison at a time, for a tenth of the time at most."""
    index = Damaged(lambda _: False)
    made.append(index)
    running, most, times = 0, 0, list[float]()
    guard = guarded(index, cpu_share=0.1)
    compare = guard._compare

    def slow(sample: object) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        begun = time.monotonic()
        time.sleep(0.01)
        compare(sample)  # type: ignore[arg-type]
        times.append(time.monotonic() - begun)
        running -= 1

    guard._compare = slow  # type: ignore[method-assign]
    begun = time.monotonic()
    threads = [
        threading.Thread(target=lambda: [index.query(q, K) for _ in range(2) for q in QUERIES])
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    took = time.monotonic() - begun
    recall = guard.recall()
    assert most == 1 and recall.shadowed >= 1
    # The last comparison may have started just before the end.
    assert sum(times) <= 0.1 * took + max(times) + 0.03
    assert recall.shadowed + recall.skipped >= 2 * 3 * len(QUERIES) - 1


@pytest.mark.parametrize(
    ("share", "low", "high"), [(0.0, 0, 0), (0.1, 150, 250), (1.0, 2_000, 2_000)]
)
def test_the_share_of_queries(made: list[LiveIndex], share: float, low: int, high: int) -> None:
    index = Damaged(lambda _: False)
    made.append(index)
    guard = guarded(index, share=share, cpu_share=0.001, seed=3)
    for _ in range(4):
        for query in QUERIES:
            index.query(query, K)
    wait_until(lambda: not guard._busy.locked())
    recall = guard.recall()
    assert low <= recall.shadowed + recall.skipped <= high


def test_exact_scans_are_not_sampled(made: list[LiveIndex]) -> None:
    index = HnswIndex(D, exact_below=N)
    made.append(index)
    index.apply(RECORDS)
    guard = guarded(index)
    for query in QUERIES[:50]:
        index.query(query, K)
    assert guard.recall().shadowed + guard.recall().skipped == 0
    assert guard.recall()[:5] == ("normal", 0, 0.0, 0.0, 1.0)


def test_the_stats_call_and_the_command_line_report_it(made: list[LiveIndex]) -> None:
    index = HnswIndex(D, exact_below=100)
    made.append(index)
    index.apply(RECORDS)
    wait_until(lambda: index.stats().rebuilds == 1)
    assert recall_of(sizes_of(index.stats(), D)) == "not watched"
    guard = guarded(index)
    assert (
        recall_of(sizes_of(index.stats(), D)) == "not enough compared yet, normal, 200 candidates"
    )
    query_until(index, lambda: guard.recall().samples >= 25)
    sizes = sizes_of(index.stats(), D)
    assert (sizes.main_name, sizes.breadth, sizes.recall.step) == ("hnswlib", 200, "normal")
    assert sizes.main_bytes > N * 4 * D and sizes.recall.shadowed == sizes.recall.samples
    assert re.match(
        r"(0\.9|1\.0)\d+ \(0\.\d+ … 1\.000\) of \d+ queries, normal, ", recall_of(sizes)
    )


def test_an_error_of_the_guard_affects_no_query(
    made: list[LiveIndex], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index = Damaged(lambda _: False)
    made.append(index)
    clock = Clock()
    guard = guarded(index, clock=clock)
    monkeypatch.setattr(guard, "_compare", lambda sample: 1 / 0)
    for query in QUERIES[:100]:
        assert len(index.query(query, K)) == K
    wait_until(lambda: "could not compare" in caplog.text)
    assert caplog.text.count("could not compare") == 1
    monkeypatch.undo()
    clock.ahead_s += 61.0
    query_until(index, lambda: guard.recall().shadowed > 0)


@pytest.mark.parametrize(
    "bad", [{"share": 1.1}, {"share": -0.1}, {"floor": 1.1}, {"samples": 1}, {"cpu_share": 0.0}]
)
def test_bad_parameters_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be within 0 … 1"):
        guarded(HnswIndex(D), **bad)


def test_an_interval_that_is_looked_at_after_every_sample_holds() -> None:
    """Of 400 sequences hardly any ever misses the truth; a fixed 95 % interval would miss often."""
    rng = np.random.default_rng(4)
    missed = often = 0
    for _ in range(400):
        # One query in ten finds half of its 20, the others all: recall 0.95.
        recalls = np.where(rng.random(600) < 0.1, 0.5, 1.0)
        sequence, ever = ConfidenceSequence(0.05), False
        for recall in recalls.tolist():
            sequence.add(recall)
            ever |= not sequence.low <= 0.95 <= sequence.high
        missed += ever
        n = np.arange(1, 601)
        mean = recalls.cumsum() / n
        deviation = np.sqrt(np.maximum((recalls**2).cumsum() / n - mean**2, 0.0))
        often += bool(np.any((np.abs(mean - 0.95) > 1.96 * deviation / n**0.5)[19:]))
    assert missed <= 20 and often > 100
    assert abs(sequence.mean - 0.95) < 0.02 and sequence.high - sequence.low < 0.1
    assert sequence.samples == 600


def test_a_lost_cluster_does_not_hide_behind_a_good_mean(
    made: list[LiveIndex], caplog: pytest.LogCaptureFixture
) -> None:
    """A third of one cluster is lost; one query in a hundred is near it: mean recall 0.996."""
    rng = np.random.default_rng(7)
    centres = units(8, D, 5)
    near = centres[rng.integers(0, 8, N)] + 0.15 * rng.standard_normal((N, D))
    vectors = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)
    cluster = (vectors @ centres.T).argmax(axis=1)
    index = Damaged(lambda _: False, vectors)
    made.append(index)
    main = index._version.main
    assert isinstance(main, Half)
    lost = (cluster[main.labels] == 3) & (np.arange(N) % 3 == 0)
    main.vectors, main.labels = main.vectors[~lost], main.labels[~lost]
    guard = guarded(index, breadth_max=30, hold_s=3_600.0, samples=50)

    def near_to(number: int) -> np.ndarray:
        query = centres[number] + 0.1 * rng.standard_normal(D)
        return (query / np.linalg.norm(query)).astype(np.float32)

    good = []
    with caplog.at_level(logging.WARNING, "index.recall_guard"):
        for n in range(20_000):
            query = near_to(3 if n % 100 == 99 else (n % 7 + 4) % 8)
            found = index.query(query, K)
            if n < 500:
                cut = np.sort(vectors @ query)[-K]
                good.append(np.mean([hit.score >= cut - 1e-6 for hit in found]))
            if guard.recall().raised:
                break
            wait_until(lambda: not guard._busy.locked())
    assert np.mean(good) > 0.99
    assert guard.recall().raised == 1
    [record] = caplog.records[:1]
    assert record.recall > 0.97 and record.stratum.startswith("cluster")  # type: ignore[attr-defined]
    assert record.stratum_recall_high < 0.95  # type: ignore[attr-defined]


def test_frequent_strata_leave_samples_to_rare_ones(made: list[LiveIndex]) -> None:
    index = Damaged(lambda _: False)
    made.append(index)
    guard = guarded(index, floor=0.0, samples=200)
    rng = np.random.default_rng(1)
    asked = {"rare": 0, "often": 0}
    for n in range(3_000):
        rare = n % 20 == 19
        query = VECTORS[7 if rare else 11] + 0.01 * rng.standard_normal(D)
        asked["rare" if rare else "often"] += 1
        index.query((query / np.linalg.norm(query)).astype(np.float32), K)
        wait_until(lambda: not guard._busy.locked())
    rare_n, often_n = sorted(one.recall.samples for one in guard._strata.values())
    assert rare_n == asked["rare"] and often_n < 0.4 * asked["often"]


def test_a_shop_that_always_filters_is_watched(
    made: list[LiveIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filtered, "ROWS_A_CANDIDATE", 1)
    index = Damaged(lambda build: build == 1, attributes={"tags": ["t"]})
    made.append(index)
    guard, only = guarded(index), Filter(tags=frozenset({"t"}))

    def until(condition: Callable[[], bool]) -> list[str]:
        return query_until(index, condition, filters=only)

    steps = until(lambda: guard.recall().step == "normal" and guard.recall().lowered > 0)
    assert steps[:4] == ["normal", "wider", "rebuild", "wider"]
    assert set(guard._strata) <= {FILTERED}
    assert index.half.builds == 2 and index.breadth == 30
