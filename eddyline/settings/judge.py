"""Settings of the judge, which scores the live events."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from eddyline.settings.field import within


class JudgeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The judge: whose events it scores, how long it waits, where its rates go."""

    judge_sample: Annotated[float, within(0, 1)] = 0.05
    """Share of the users whose events the judge scores. It keeps the lists of these users only,
    unless a recall path depends on what all users visited; the events of all users count for the
    items."""
    judge_from: Literal["now", "beginning"] = "now"
    """Which events a judge without a checkpoint scores: those appended after its start, or all that
    Kafka has. Earlier ones are applied without being scored."""
    judge_repeats: Literal["drop", "keep"] = "drop"
    """Whether events on items of the user's list are left out, as answers do not have these items,
    or count, with these items among the ranked ones."""
    judge_scene_field: Annotated[str, Meta(max_length=256)] = "scene"
    """Key of the events' `context` that names the scene; the first 20 scenes have rates of their
    own, all others are counted together. Empty: no scenes."""
    judge_wait_s: Annotated[float, within(0, 600)] = 1.0
    """How long the judge waits for further events of one time before it scores those it has."""
    judge_lag_s_max: Annotated[int, within(1, 86_400)] = 60
    """A judge that is further behind than this scores fewer of the events; it still applies all."""
    judge_checkpoint_s: Annotated[int, within(1, 86_400)] = 60
    """How often the judge writes its whole state to `judge` in `data_dir`; after a crash it goes on
    from there."""
    judge_report_s: Annotated[int, within(1, 3_600)] = 10
    """How often the rates in metrics and `eddyline stats` are renewed."""
    judge_metrics_port: Annotated[int, within(0, 65_535)] = 0
    """Port of the judge's Prometheus metrics; 0 serves none."""
