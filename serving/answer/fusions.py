"""The fusions by the names of the setting `fusion`. A new fusion is one line here."""

from __future__ import annotations

from collections.abc import Callable

from eddyline.settings.loader import Settings
from serving.answer.blend import Blend
from serving.answer.blend_weights import CurrentBlender
from serving.answer.fusion import Cascade, Fusion, RanksAll
from serving.answer.reciprocal_rank import ReciprocalRank


def _reciprocal_rank(settings: Settings) -> RanksAll:
    return ReciprocalRank(
        settings.recall_path_names,
        settings.fusion_weight_of,
        candidates=settings.path_candidates,
        budget_ms=settings.path_budget_ms,
    )


# Those that need nothing but the settings.
FIXED: dict[str, Callable[[Settings], RanksAll]] = {
    Cascade.name: lambda settings: Cascade(settings.path_budget_ms),
    ReciprocalRank.name: _reciprocal_rank,
}


def make_fusion(settings: Settings, blender: CurrentBlender | None = None) -> Fusion:
    """The fusion of the settings. blender: of the process; default: one that learns nothing."""
    if settings.fusion != Blend.name:
        return FIXED[settings.fusion](settings)
    return Blend(
        settings.recall_path_names,
        blender or CurrentBlender(settings.recall_path_names),
        candidates=settings.path_candidates,
        budget_ms=settings.path_budget_ms,
    )
