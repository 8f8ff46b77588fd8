"""The port of recall paths: what a path is built from, what it gets for a query, what it returns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from eddyline.settings.loader import Settings
from eddyline.stores.state_store import StateStore, UserState
from index.arrays import Vector
from index.filters import Filter
from index.port import Hit
from serving.answer.deadline import Deadline
from serving.recall.index_reader import IndexReader
from serving.recall.popularity import Popularity


class RecallRequest(NamedTuple):
    """One query as a recall path sees it.

    user:            None if the store could not be read
    k:               the most candidates to return
    excluded:        item ids that must not be returned
    filters:         every candidate passes them; None: no filter
    popularity_beta: strength of the popularity correction, see `Popularity.debias`; 0: none
    """

    user: UserState | None
    k: int
    excluded: Collection[str]
    filters: Filter | None
    popularity_beta: float
    deadline: Deadline


class StageTimings(NamedTuple):
    """When a path finished its stages, microseconds since 1970; 0: the stage did not run."""

    embedded_us: int = 0
    searched_us: int = 0


NOT_TIMED = StageTimings()


class Candidates(NamedTuple):
    """The result of a recall path.

    hits:        best first
    why:         one clause on why there are fewer than `request.k`, else ""
    degradation: `server: reason` if the path works with old or missing data, else ""
    """

    hits: Sequence[Hit]
    why: str = ""
    timings: StageTimings = NOT_TIMED
    degradation: str = ""


class RecallPath(Protocol):
    """One way to find candidates for a user. `registry.PATHS` lists all. Thread rule: any thread."""

    name: str

    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        """Live items that pass the filter and are not excluded. Raises DeadlinePassed."""

    def degradation(self) -> str:
        """`server: reason` if the path works with old or missing data now, else ""."""
        return ""


class Tower(Protocol):
    """The user tower of a generation; `embeddings.towers.user_tower.UserTower` is one."""

    history_max: int

    def encode_one(self, history: Vector, profile: Mapping[str, object]) -> Vector:
        """float32 (h, d) newest first, and attributes -> float32 (d,), unit norm."""


@dataclass(frozen=True, slots=True)
class RecallContext:
    """What the recall paths of one generation are built from.

    closing: a path registers the close of its threads and connections here
    """

    settings: Settings
    store: StateStore
    tower: Tower
    popularity: Popularity
    closing: ExitStack
