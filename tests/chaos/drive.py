"""One chaos run: the load, the faults of a plan, constant queries, and the oracle."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

from eddyline import generations
from eddyline.errors import EddylineError
from eddyline.generations import Manifest
from eddyline.kafka.topics import CLICKS, ITEMS, SOURCES, USERS
from eddyline.settings.loader import Settings
from embeddings.bundle import bundle as bundles
from sandbox.datasets.dataset import Dataset
from serving.rpc.client import CallFailed, Client
from tests import oracle
from tests.chaos.faults import Faults
from tests.chaos.foreign import OWN, in_own_format
from tests.chaos.load import SHOPPERS, Load
from tests.chaos.scene import CUT, Scene
from tests.chaos.schedule import Fault, plan
from tests.model import comparison
from tests.model.reading import Raw
from tests.topics import READ_S, read_all

# Codes that a worker may answer while its servers come and go. INTERNAL and UNKNOWN are its own
# faults.
MAY_ANSWER = {"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
QUERY_EVERY_S = 0.05
LAST_FAULTS_S = 200.0
# Ingest may take this long without progress: a session's end, a broker's start, back-off.
STALLED_S = 60.0
CONVERGE_S = 30.0
# Ingest removes what ended generations left at its start.
REMOVED_S = 60.0
REPORT_EVERY_S = 10.0

OnProgress = Callable[[str], None]


@dataclass
class Result:
    """The result of a run. met: (fault, what it met); differences: must be empty."""

    seed: int
    met: list[tuple[Fault, str]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    failed_sends: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    restarts: dict[str, int] = field(default_factory=dict)
    records: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """kind -> (faults, those of them that met something)."""
        counted: dict[str, tuple[int, int]] = {}
        for fault, met in self.met:
            all_, hit = counted.get(fault.kind, (0, 0))
            counted[fault.kind] = all_ + 1, hit + bool(met)
        return dict(sorted(counted.items()))


class QueryLoop:
    """Queries the worker all the time and counts the answers by status code."""

    def __init__(self, address: str, seed: int) -> None:
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._address = address
        self._rng = random.Random(f"asking-{seed}")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="asking", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the queries."""
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        with Client(self._address) as client:
            while not self._stop.wait(QUERY_EVERY_S):
                user, k = f"s{self._rng.randrange(SHOPPERS)}", self._rng.choice((1, 10, 50))
                try:
                    answer = client.retrieve(user, k, timeout_s=2)
                    self.answers["OK"] += 1
                    ids = [item.item_id for item in answer.items]
                    if len(set(ids)) != len(ids) or (len(ids) != k and not answer.short_because):
                        self.wrong.append(
                            f"the worker gave {user} {len(ids)} items for k = {k}: {ids}"
                        )
                except CallFailed as error:
                    self.answers[error.code] += 1
                    if error.code not in MAY_ANSWER:
                        self.wrong.append(f"the worker answered {error}")
                except Exception as error:
                    self.wrong.append(f"asking the worker raised {error!r}")


def run(
    folder: Path,
    bundle_dir: Path,
    manifests: Sequence[Manifest],
    dataset: Dataset,
    *,
    seed: int,
    count: int,
    gap_s: tuple[float, float],
    rate: float,
    ingests: int = 2,
    short: bool = False,
    patches: bool = False,
    on_progress: OnProgress = lambda _: None,
    stalled_s: float = STALLED_S,
) -> Result:
    """Run a plan on its own servers in `folder`. Raises LocalServerError if they do not start.

    manifests: of one more generation than the plan has retrainings; see also `Scene`
    """
    result = Result(seed)
    faults = plan(seed, count, gap_s, ingests, short)
    for fault in faults:
        on_progress(str(fault))
    scene = Scene(folder, bundle_dir, manifests, ingests, patches)
    # What ended generations left is removed a second after their grace, not five minutes.
    soon = mock.patch.object(generations, "REMOVE_AFTER_MS", 1_000)
    try:
        soon.start()
        begun = time.monotonic()
        scene.start(dataset)
        result.seconds["start"] = time.monotonic() - begun
        settings = scene.settings
        load = Load(
            settings, dataset.items, rate=rate, seed=seed, lateness_s=int(CUT["lateness_s_max"])
        )
        queries = QueryLoop(scene.address, seed)
        load.start()
        try:
            _under_load(scene, load, faults, result, on_progress)
        finally:
            begun = time.monotonic()
            scene.proxy.clear()
            scene.wake_all()
            load.stop()
            queries.stop()
        result.sent, result.failed_sends, result.answers = load.sent, load.failed, queries.answers
        result.differences += queries.wrong
        on_progress(f"{sum(load.sent.values()):,} records sent; waiting until all of it is applied")
        scene.caught_up(stalled_s)
        if ended := scene.ended():
            left = scene.remove_ended(ended, REMOVED_S)
            result.differences += [f"{key}: of an ended generation" for key in left]
            scene.caught_up(stalled_s)
        result.seconds["catch-up"] = time.monotonic() - begun
        on_progress("applied; the oracle recomputes everything")
        begun = time.monotonic()
        result.differences += find_differences(scene, load, ended, result)
        result.seconds["oracle"] = time.monotonic() - begun
    except EddylineError as error:
        result.differences.append(f"{type(error).__name__}: {error}")
    finally:
        soon.stop()
        result.restarts = {name: n for name, (_, n) in scene.supervisor.states().items()}
        scene.stop()
    return result


def find_differences(scene: Scene, load: Load, ended: set[str], result: Result) -> list[str]:
    """Every difference from the oracle's state and from the second model's."""
    eras = scene.eras
    window = min(era.settings.dedupe_window_events for era in eras)
    settings = msgspec.structs.replace(eras[-1].settings, dedupe_window_events=window)
    scene.recorder.advance(READ_S)
    known = {name: scene.recorder.records(name) for name in SOURCES}
    generation = eras[-1].generation
    topics = oracle.Topics.read(settings, generation, known=known)
    result.records = {name: len(records) for name, records in topics.records.items()}
    optional = removed(settings, known)
    result.records |= {"compacted": len(optional), "eras": len(eras)}
    names = sorted({era.generation for era in eras})
    towers = {name: bundles.load(settings.bundles / name) for name in names}
    spans = [(era, towers[era.generation]) for era in eras]
    expected = oracle.truth(settings, topics, towers[generation], eras=spans)
    found = oracle.differences(settings, topics, expected, generation, optional, _own_value)
    by_model = comparison.compare(
        topics, list(towers.values()), eras, optional, own_of=_own, with_strays=True, ended=ended
    )
    result.counts = found.counts | by_model.counts
    there = {_event_id(record.value) for record in topics.records[CLICKS]}
    foreign = sum(_is_foreign(record) for record in topics.records[CLICKS])
    result.counts["record of another format"] = foreign
    result.counts["ended generation"] = len(ended)
    lost = sorted(load.acked - there)
    differences = [f"event {e}: acknowledged by Kafka, not in the topic" for e in lost[:20]]
    live = {item_id for item_id, record in expected.published.items() if record.vector is not None}
    differences += found.differences + by_model.differences
    return differences + _worker(scene, live, result)


def _own_value(record: Any) -> bytes | None:
    return in_own_format(record.value, record.headers)


def _own(raw: Raw) -> Raw | None:
    value = in_own_format(raw.value, raw.headers)
    return None if value is None and _is_foreign(raw) else raw._replace(value=value)


def _is_foreign(record: Any) -> bool:
    return OWN[0] not in dict(record.headers)


def removed(settings: Settings, known: Mapping[str, list[Any]]) -> frozenset[str]:
    """Coordinates of the records of `items` and `users` that compaction removed."""
    gone: set[str] = set()
    for name in (ITEMS, USERS):
        there = {(r.partition, r.offset) for r in read_all(settings, name)}
        gone.update(
            f"{r.topic}/{r.partition}/{r.offset}"
            for r in known[name]
            if (r.partition, r.offset) not in there
        )
    return frozenset(gone)


def _event_id(value: bytes | None) -> str | None:
    try:
        event = msgspec.json.decode(value or b"null")
    except msgspec.DecodeError:
        return None
    found = event.get("event_id", event.get("id")) if isinstance(event, dict) else None
    return found if isinstance(found, str) else None


def _worker(scene: Scene, live: set[str], result: Result) -> list[str]:
    """Compare the worker's index with the live items, by a query of a new user for all items."""
    deadline, why = time.monotonic() + CONVERGE_S, ""
    with Client(scene.address) as client:
        while time.monotonic() < deadline:
            try:
                answer = client.retrieve("nobody", scene.settings.k_max, timeout_s=5)
                found = {item.item_id for item in answer.items}
                if found == live and not answer.missing:
                    result.counts["item in the worker's index"] = len(live)
                    return []
                lacks, extra = sorted(live - found)[:9], sorted(found - live)[:9]
                why = f"lacks {lacks}, has {extra}, {answer.missing}"
            except CallFailed as error:
                why = str(error)
            time.sleep(0.2)
    return [f"the worker's index {why}"]


def _under_load(
    scene: Scene, load: Load, faults: list[Fault], result: Result, on_progress: OnProgress
) -> None:
    begun = time.monotonic()
    stop = threading.Event()
    injector = Faults(scene, load, stop)
    threads: list[threading.Thread] = []
    next_report = begun + REPORT_EVERY_S

    def inject(fault: Fault) -> None:
        try:
            met = injector.inject(fault)
        except Exception as error:
            result.differences.append(
                f"fault {fault.number} ({fault.kind}) could not be injected: {error!r}"
            )
            met = ""
        result.met.append((fault, met))
        over_s = time.monotonic() - begun
        on_progress(
            f"fault {fault.number} ({fault.kind}) over at {over_s:.1f} s: {met or 'nothing'}"
        )

    try:
        for fault in faults:
            while (left := begun + fault.at_s - time.monotonic()) > 0:
                time.sleep(min(left, 0.25))
                scene.supervisor.check()
                if time.monotonic() > next_report:
                    next_report += REPORT_EVERY_S
                    on_progress(
                        f"{time.monotonic() - begun:6.0f} s  {sum(load.sent.values()):,} sent, "
                        f"{len(result.met)} faults over, failed sends {dict(load.failed)}"
                    )
            thread = threading.Thread(
                target=inject, args=(fault,), name=f"fault-{fault.number}", daemon=True
            )
            thread.start()
            threads.append(thread)
        deadline = time.monotonic() + LAST_FAULTS_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    finally:
        stop.set()
        for thread in threads:
            thread.join(LAST_FAULTS_S)
        result.met.sort(key=lambda one: one[0].number)
        result.seconds["under faults"] = time.monotonic() - begun
