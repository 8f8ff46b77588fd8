"""What the judge says: its rates and its own state, for metrics and `eddyline stats`."""

from __future__ import annotations

from pathlib import Path

import msgspec

from eddyline.process import files
from eddyline.settings.loader import Settings
from evaluation.judge.click_rates import ClickRate
from evaluation.judge.drift import Drift
from evaluation.judge.impressions import JoinCounts
from evaluation.judge.rates import Rate


class JudgeReport(msgspec.Struct, frozen=True, kw_only=True):
    """At one moment. Times in milliseconds since 1970.

    at_ms:      of the report; event_ms: event time of the newest target
    generation: that is judged; share: of the followed users, those that are scored
    scored, skipped, applied, rejected: see `Judge` and `Decoder`
    lag_s:      see `LogReader.lag_s`; behind: topic -> offsets
    clicks:     click-through of recorded answers; joined: what became of clicks that name one
    drifts:     generation -> how many; last_drifts: the newest of each generation
    learned:    clicks that the blender has learned from; 0 without the fusion `blend`
    blender_replaced: see `blend_learner.Guard`
    """

    at_ms: int
    event_ms: int
    generation: str
    share: float
    scored: int
    skipped: int
    applied: int
    rejected: int
    lag_s: float
    behind: dict[str, int]
    rates: list[Rate]
    clicks: list[ClickRate]
    joined: JoinCounts
    drifts: dict[str, int]
    last_drifts: list[Drift]
    learned: int = 0
    blender_replaced: bool = False


def path_of(settings: Settings) -> Path:
    """The file of the newest report."""
    return Path(settings.data_dir) / "judge" / "report.json"


def write(settings: Settings, report: JudgeReport) -> None:
    """Replace the file in one step. Raises OSError."""
    files.write_atomically(path_of(settings), msgspec.json.encode(report), mode=0o644)


def read(settings: Settings) -> JudgeReport | None:
    """The newest report of this data folder; None without one, or if it has another format."""
    content = files.read_if_exists(path_of(settings))
    if content is None:
        return None
    try:
        return msgspec.json.decode(content, type=JudgeReport)
    except msgspec.MsgspecError:
        return None
