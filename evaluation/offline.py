"""`evaluate`: a log, a bundle and the names of rows become a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from eddyline.errors import SettingsError
from eddyline.settings.loader import Settings
from embeddings.bundle import bundle as bundles
from embeddings.bundle.bundle import Bundle
from embeddings.data.examples import TrainingData
from embeddings.data.sources import CLICKS_MAX
from evaluation import processes, protocol, report
from evaluation.blend_row import BlendRow
from evaluation.event_log import EventLog
from evaluation.product import Product
from evaluation.protocol import OnProgress, Outcome
from evaluation.references import DAY_MS, CountsRow, RandomRow
from evaluation.refitted import AlsRow, ItemNeighboursRow, check_library
from evaluation.report import Report
from evaluation.rows import FusedRow, PathRow, Row, TowersRow
from serving.answer.fusions import FIXED
from serving.recall import registry
from serving.recall.again import AgainPath
from serving.recall.base import FILLS
from serving.recall.newest import NewestPath
from serving.recall.towers import TowersPath

HOUR_MS = 3_600_000
WEEK_MS = 7 * DAY_MS
_BOTH = (True, False)
# Rows that learn from every event which is scored.
LEARNING = {"blend", "blend-tenth"}
_OF_LIBRARY = ("als-daily", "item-knn-daily")

# Name -> (log, product, events to score, seed) -> the row. A new row is one line here.
ROWS: dict[str, Callable[[EventLog, Product, int, int], Row]] = {
    "random": lambda log, product, n, seed: RandomRow(log, product, n, seed),
    "popular-all": lambda log, product, n, _: CountsRow("popular-all", log, product, n),
    "popular-7d": lambda log, product, n, _: CountsRow("popular-7d", log, product, n, WEEK_MS),
    "als-daily": lambda log, product, n, seed: AlsRow(log, product, n, seed),
    "item-knn-daily": lambda log, product, n, _: ItemNeighboursRow(log, product, n),
    "towers-frozen": lambda _, p, n, __: TowersRow(p, n, "towers-frozen", 0, steps=_BOTH),
    "towers-daily": lambda _, p, n, __: TowersRow(p, n, "towers-daily", DAY_MS, steps=_BOTH),
    "towers-hourly": lambda _, p, n, __: TowersRow(p, n, "towers-hourly", HOUR_MS, steps=_BOTH),
    "towers": lambda _, p, n, __: TowersRow(p, n, "towers", 1, steps=_BOTH),
    "cascade": lambda _, product, n, __: _fused(product, "cascade", n),
    "rrf": lambda _, product, n, __: _fused(product, "rrf", n),
    "blend": lambda _, product, n, __: BlendRow(product, "blend", n),
    "blend-tenth": lambda _, p, n, __: BlendRow(p, "blend-tenth", n, learns_every=10),
    "rrf-all": lambda _, product, n, __: _fused_all(product, n),
} | {
    path: lambda _, product, n, __, path=path: PathRow(product, path, n)
    for path in registry.PATHS
    if path != TowersPath.name
}


def _fused(product: Product, fusion: str, scored: int) -> Row:
    """The row of a fusion over the paths of the settings."""
    return _row(product.settings, fusion, product, fusion, scored)


def _fused_all(product: Product, scored: int) -> Row:
    """The row of `rrf` over all paths but `newest`, and `again` where seen items are hidden."""
    settings = product.settings
    left_out = {NewestPath.name, AgainPath.name if settings.seen_items == "hide" else ""}
    paths = ",".join(path for path in registry.PATHS if path not in left_out)
    settings = msgspec.structs.replace(settings, recall_paths=paths, fusion_weights="")
    return _row(settings, "rrf", product, "rrf-all", scored)


def _row(settings: Settings, fusion: str, product: Product, name: str, scored: int) -> Row:
    paths = [*dict.fromkeys((*settings.recall_path_names, *FILLS))]
    return FusedRow(product, name, scored, FIXED[fusion](settings), paths)


def _reads_co_visits(rows: Sequence[str], settings: Settings) -> bool:
    """Whether one of these rows depends on what all users visited."""
    if "rrf-all" in rows or registry.reads_co_visits(row for row in rows if row in registry.PATHS):
        return True
    fused = {*FIXED, *LEARNING} & {*rows}
    return bool(fused) and registry.reads_co_visits(settings.recall_path_names)


def training_data(log: EventLog, first: int) -> TrainingData:
    """What was known before the split: events before `first`, items and profiles from before.

    Of more than `CLICKS_MAX` events the newest count, as in a training from topics.
    """
    split_ms = int(log.at_ms[first]) if first < len(log) else 2**62
    return TrainingData(
        items=[item for item in log.changes if item.at_ms < split_ms],
        profiles={p.user_id: p.attributes for p in log.profiles if p.at_ms < split_ms},
        clicks=[log.click(number) for number in range(max(0, first - CLICKS_MAX), first)],
    )


def check_rows(rows: Sequence[str]) -> None:
    """Raise SettingsError for an unknown row, or one whose library is missing."""
    if unknown := [row for row in rows if row not in ROWS]:
        raise SettingsError(f"--rows {unknown[0]}: expected some of {', '.join(ROWS)}")
    if needing := [row for row in rows if row in _OF_LIBRARY]:
        check_library(needing)


def check_split(log: EventLog, split: float) -> tuple[int, int]:
    """(events before the split, events to score). Raises SettingsError if one is 0."""
    first = log.split(split)
    after, scored = len(log) - first, len(protocol.scorable(log, first))
    if not first:
        raise SettingsError(
            f"--split {split}: none of the {len(log):,} events is before it; events of one time "
            "are not separated"
        )
    if not scored:
        raise SettingsError(
            f"--split {split}: of the {len(log):,} events {after:,} are after it, and none of "
            "those is to be scored; dislikes are not"
        )
    return first, scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all processes of an evaluation know. Can be pickled.

    bundle:     its folder
    process_of: int16 (users,); see `processes.share_out`
    """

    settings: Settings
    log: EventLog
    bundle: Path
    rows: Sequence[str]
    first: int
    keeps_repeats: bool
    seed: int
    process_of: npt.NDArray[np.int16]

    def __call__(self, process: int, on_progress: OnProgress) -> Outcome:
        """Score the events of the users of a process."""
        with closing(self.product(bundles.load(self.bundle), process)) as product:
            return self.score(product, process, on_progress)

    def product(self, bundle: Bundle, process: int) -> Product:
        """A product that follows the users of a process, or all where their visits count."""
        if _reads_co_visits(self.rows, self.settings):
            return Product(self.settings, bundle)
        mine = {self.log.user_ids[user] for user in np.flatnonzero(self.process_of == process)}
        return Product(self.settings, bundle, mine.__contains__)

    def score(self, product: Product, process: int, on_progress: OnProgress) -> Outcome:
        """Score them by a product."""
        log, events = self.log, protocol.scorable(self.log, self.first)
        rows = [ROWS[row](log, product, len(events), self.seed) for row in self.rows]
        return protocol.run(
            log,
            product,
            rows,
            self.first,
            keeps_repeats=self.keeps_repeats,
            on_progress=on_progress,
            mine=self.process_of[log.users[events]] == process,
        )


def evaluate(
    settings: Settings,
    log: EventLog,
    bundle: Bundle,
    *,
    name: str,
    split: float,
    keeps_repeats: bool,
    seed: int,
    rows: Sequence[str] = tuple(ROWS),
    wanted_processes: int = 0,
    on_progress: OnProgress = lambda done, total: None,
) -> tuple[Report, Outcome]:
    """Rank the events after the split by every row.

    bundle:           trained on what `training_data` gives for the same split
    wanted_processes: 0 for as many as are worth it; the result is the same
    Raises SettingsError for an unknown row, or if there is nothing to score.
    """
    check_rows(rows)
    first, scored = check_split(log, split)
    number, events = processes.number(wanted_processes, scored), protocol.scorable(log, first)
    if LEARNING & set(rows):
        number = 1  # a process scores the events of its own users only
    job = Job(
        settings=settings,
        log=log,
        bundle=bundle.folder,
        rows=rows,
        first=first,
        keeps_repeats=keeps_repeats,
        seed=seed,
        process_of=processes.share_out(log, events, number),
    )
    with closing(job.product(bundle, 0)) as product:
        outcome = processes.run(
            job,
            lambda: job.score(product, 0, on_progress),
            job.process_of[log.users[events]],
            number,
        )
        if not outcome.kept.any():
            raise SettingsError("every event to score is a repeat: see --repeats keep")
        found = report.make(
            name,
            log,
            product,
            outcome,
            first=first,
            split=split,
            repeats="keep" if keeps_repeats else "drop",
            seed=seed,
        )
        return found, outcome
