"""The fusions by the names of the setting `fusion`. A new fusion is one line here."""

from __future__ import annotations

from collections.abc import Callable

from eddyline.settings.loader import Settings
from serving.answer.fusion import Cascade, Fusion
from serving.answer.reciprocal_rank import ReciprocalRank


def _reciprocal_rank(settings: Settings) -> Fusion:
    return ReciprocalRank(
        settings.recall_path_names,
        settings.fusion_weight_of,
        candidates=settings.path_candidates,
        budget_ms=settings.path_budget_ms,
    )


FUSIONS: dict[str, Callable[[Settings], Fusion]] = {
    Cascade.name: lambda settings: Cascade(settings.path_budget_ms),
    ReciprocalRank.name: _reciprocal_rank,
}


def make_fusion(settings: Settings) -> Fusion:
    """The fusion of the settings."""
    return FUSIONS[settings.fusion](settings)
