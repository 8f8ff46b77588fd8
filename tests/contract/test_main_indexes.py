"""Every ANN backend behind the live index: recall, freshness, few vectors, one core, errors."""

import builtins
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import annoy
import numpy as np
import pytest

from eddyline.errors import SettingsError
from eddyline.schema.item_record import ItemRecord
from eddyline.settings.loader import Settings
from index.backends.base import AnnBackend
from index.backends.faiss import FaissHnsw, FaissIvf
from index.backends.registry import NAMES, make_backend
from index.live import LiveIndex

D, N, K = 16, 3_000, 20


def clustered(n: int, seed: int, dimension: int = D) -> np.ndarray:
    centres = np.random.default_rng(1).normal(size=(40, dimension))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(40, size=n)] + 0.9 * rng.normal(size=(n, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> AnnBackend:
    return make_backend(request.param)


def live_on(backend: AnnBackend) -> LiveIndex:
    return LiveIndex(D, backend, breadth=200, exact_below=100, fresh_max=1_000_000)


def records(vectors: np.ndarray, first: int = 0, names: str = "i") -> list[ItemRecord]:
    return [ItemRecord(f"{names}{n}", 0, first + n, 0, 0, v) for n, v in enumerate(vectors)]


def recall(index: LiveIndex, vectors: dict[str, np.ndarray], queries: np.ndarray) -> float:
    matrix = np.array(list(vectors.values()))
    good = 0
    for query in queries:
        hits = index.query(query, K)
        best = np.sort(matrix @ query)[::-1][:K]
        assert len({hit.item_id for hit in hits}) == K
        for hit in hits:
            assert hit.score == pytest.approx(float(vectors[hit.item_id] @ query), abs=1e-5)
        good += sum(hit.score >= best[-1] - 1e-6 for hit in hits)
    return good / (K * len(queries))


def test_new_turned_and_retired_items_without_a_rebuild(backend: AnnBackend) -> None:
    """Built once; new, turned and retired items follow: exact scores, no wrong item."""
    index = live_on(backend)
    vectors, queries = clustered(N, 2), clustered(40, 3)
    index.upsert(records(vectors))
    assert index.rebuild()
    current = {f"i{n}": v for n, v in enumerate(vectors)}
    assert recall(index, current, queries) >= 0.97
    new = clustered(200, 4)
    index.upsert(records(new, N, "new"))
    moved = clustered(100, 5)
    index.upsert(records(moved, 2 * N))
    index.retire([ItemRecord(f"i{n}", 0, 3 * N, 0, 0, None) for n in range(100, 200)])
    current |= {f"new{n}": v for n, v in enumerate(new)} | {f"i{n}": v for n, v in enumerate(moved)}
    for n in range(100, 200):
        del current[f"i{n}"]
    assert recall(index, current, queries) >= 0.97
    stats = index.stats()
    assert (stats.main, stats.main_name, stats.fresh, stats.refused) == (N, backend.name, 300, 0)
    index.close()


def test_more_candidates_are_a_wider_search(backend: AnnBackend) -> None:
    vectors = clustered(N, 6)
    built = backend.build(np.arange(N) + 7, vectors, threading.Event())
    assert built is not None and built.size == N and built.name == backend.name
    for fetch in (1, 50, 400):
        found = built.search(vectors[5], fetch)
        assert found is not None and found.dtype == np.int64
        assert fetch <= len(found) <= 2 * fetch
        assert len(set(found.tolist())) == len(found) and 7 <= found.min() and found.max() < N + 7
        assert 12 in found
    # All of them, or None, and then the scan answers.
    everything = built.search(vectors[5], N)
    assert everything is None or len(everything) <= N


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 38, 39, 40, 255, 256, 257, 624])
def test_too_few_vectors_to_train_on_are_no_error(backend: AnnBackend, n: int) -> None:
    vectors = clustered(n, 8)
    built = backend.build(np.arange(n), vectors, threading.Event())
    assert built is not None
    found = built.search(vectors[n // 2], min(n, 10))
    assert found is not None and n // 2 in found


@pytest.mark.parametrize("dimension", [1, 2, 7, 12])
def test_product_quantization_of_any_dimension(dimension: int) -> None:
    from index.backends.faiss import PQ_VECTORS_MIN

    vectors = clustered(PQ_VECTORS_MIN, 9, dimension)
    built = make_backend("faiss-ivfpq").build(np.arange(len(vectors)), vectors, threading.Event())
    assert built is not None
    assert built.memory_bytes < len(vectors) * (4 * dimension + 16) + 4 * dimension * 1024
    assert built.search(vectors[0], 10) is not None


def test_a_build_stops(backend: AnnBackend) -> None:
    stop = threading.Event()
    stop.set()
    assert backend.build(np.arange(50), clustered(50, 1), stop) is None


def test_a_backend_takes_one_core_at_most(backend: AnnBackend) -> None:
    """The CPU time of all threads, the library's included, is at most the wall time.

    On a busy machine the wall time grows and the CPU time does not. Threads that earlier tests
    left behind do not count.
    """
    vectors = clustered(8_000, 10)
    spent, others = list[float](), list(map(cpu_clock, threading.enumerate()))

    def cpu_s() -> float:
        return time.process_time() - sum(clock() for clock in others)

    def run() -> None:
        cpu, wall = cpu_s(), time.perf_counter()
        built = backend.build(np.arange(len(vectors)), vectors, threading.Event())
        assert built is not None
        for query in vectors[:100]:
            built.search(query, 200)
        spent.extend((cpu_s() - cpu, time.perf_counter() - wall))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert spent and spent[0] < 1.2 * spent[1] + 0.05


def cpu_clock(thread: threading.Thread) -> Callable[[], float]:
    """Reads the seconds of CPU time of a thread; after its end, those of the last reading."""
    clock, last = time.pthread_getcpuclockid(thread.ident or 0), 0.0

    def read() -> float:
        nonlocal last
        if thread.is_alive():
            last = time.clock_gettime(clock)
        return last

    return read


def test_the_memory_of_a_forest_is_about_the_size_of_its_file(tmp_path: Path) -> None:
    vectors = clustered(4_000, 11)
    built = make_backend("annoy").build(np.arange(len(vectors)), vectors, threading.Event())
    assert built is not None
    forest = built._forest
    assert isinstance(forest, annoy.AnnoyIndex)
    file = tmp_path / "forest"
    forest.save(str(file))
    assert built.memory_bytes == pytest.approx(file.stat().st_size + 8 * len(vectors), rel=0.15)


def test_a_faiss_graph_of_equal_vectors_reports_that_it_misses_some() -> None:
    """Equal vectors make points unreachable; the scan answers instead and finds every item."""
    index = LiveIndex(D, FaissHnsw(), breadth=60, exact_below=0, fresh_max=100)
    index.upsert(records(np.repeat(clustered(1, 1), 60, axis=0)))
    assert index.rebuild()
    assert len(index.query(clustered(1, 2)[0], 60)) == 60
    assert index.stats().refused == 1
    index.close()


@pytest.mark.parametrize(
    ("name", "extra"), [("annoy", "annoy"), ("faiss-flat", "faiss"), ("hnswlib", "worker")]
)
def test_a_missing_library_is_named_with_its_extra(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = name.partition("-")[0]
    real = builtins.__import__

    def absent(module, globals=None, locals=None, names=(), level=0):  # type: ignore[no-untyped-def]
        if module == library and level == 0:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return real(module, globals, locals, names, level)

    for module in ("index.backends.hnswlib", "index.backends.faiss", "index.backends.annoy"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    package = __import__("index.backends", fromlist=["backends"])
    for attribute in ("faiss", "annoy"):
        monkeypatch.delattr(package, attribute, raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(SettingsError, match=rf"index_main is '{name}'.*eddyline\[{extra}\]"):
        make_backend(name)


def test_unknown_names_and_bad_parameters_are_refused() -> None:
    assert Settings().index_main == NAMES[0] == "hnswlib"
    with pytest.raises(SettingsError, match="there are hnswlib, faiss-flat"):
        make_backend("scann")
    for make in (
        lambda: FaissIvf(lists_per_root=0),
        lambda: FaissHnsw(m=0),
        lambda: make_backend("hnswlib", m=1),
    ):
        with pytest.raises(ValueError, match="must be at least"):
            make()
