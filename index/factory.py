"""The live index and its recall guard, from the settings."""

from __future__ import annotations

from eddyline.settings.loader import Settings
from index.backends.base import AnnBackend
from index.backends.registry import make_backend
from index.live import LiveIndex
from index.recall_guard import RecallGuard


def ann_backend(settings: Settings) -> AnnBackend:
    """The backend that `index_main` names. Raises SettingsError if its library is missing."""
    return make_backend(
        settings.index_main,
        m=settings.index_m,
        ef_construction=settings.index_ef_construction,
        ef=settings.index_ef,
    )


def live_index(settings: Settings, backend: AnnBackend, dimension: int) -> LiveIndex:
    """An empty live index."""
    return LiveIndex(
        dimension,
        backend,
        breadth=settings.index_ef,
        exact_below=settings.index_exact_below,
        fresh_max=settings.index_fresh_max,
        flush_above=settings.index_tier_above,
        text_names=settings.filter_text_names,
    )


def guard_recall(settings: Settings, index: LiveIndex) -> None:
    """Have a recall guard watch the index, unless `index_recall_share` is 0."""
    if settings.index_recall_share:
        index.guard = RecallGuard(
            index,
            share=settings.index_recall_share,
            floor=settings.index_recall_floor,
            samples=settings.index_recall_samples,
            breadth_max=settings.index_ef_max,
            cpu_share=settings.index_recall_cpu_percent_max / 100,
        )


class HnswIndex(LiveIndex):
    """A live index on hnswlib with default sizes, without settings."""

    def __init__(
        self,
        dimension: int,
        *,
        m: int = 16,
        ef_construction: int = 200,
        ef: int = 200,
        exact_below: int = 12_000,
        fresh_max: int = 4_096,
        flush_above: int = 0,
        text_names: frozenset[str] = frozenset(),
    ) -> None:
        """m, ef_construction, ef: hnswlib's parameters; the others: see `LiveIndex`."""
        super().__init__(
            dimension,
            make_backend("hnswlib", m=m, ef_construction=ef_construction, ef=ef),
            breadth=ef,
            exact_below=exact_below,
            fresh_max=fresh_max,
            flush_above=flush_above,
            text_names=text_names,
        )
