"""Long runs of everything at once against the second model: `make soak` looks for SOAK_S seconds.

Clicks, users, items, forgotten users, merges, late and re-sent events, retrainings, retention, logs
that lose their end, settings that change, crashes, older copies of Redis, a full or absent Kafka.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from eddyline.errors import LogMismatch
from tests.model import reading
from tests.model.rig import Rig
from tests.simulation.test_against_model import (
    BASIC,
    BOTH,
    FORGET,
    FULL,
    REFUSED,
    SERVE,
    SETTINGS,
    TIGHTER,
    act,
    clicked,
    run,
)

SOAK_S = float(os.environ.get("SOAK_S", "0"))
# A core runs about ten of them a second.
EXAMPLES = max(25, int(8 * SOAK_S))
LOSE = st.tuples(st.just("lose"), st.integers(0, 1), st.integers(1, 4))
ALL = [
    *BASIC,
    FULL,
    BOTH,
    FORGET,
    REFUSED,
    SERVE,
    LOSE,
    st.tuples(st.just("settings"), st.sampled_from(TIGHTER)),
    st.tuples(st.just("retrain")),
]


@pytest.mark.timeout(120 + 4 * SOAK_S)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=not SOAK_S,
    phases=(Phase.generate, Phase.shrink) if SOAK_S else (Phase.generate,),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.lists(st.one_of(ALL), min_size=60, max_size=300), st.sampled_from([1, 3]))
def test_everything_at_once_is_the_models(actions: list[Any], slots: int) -> None:
    run(actions, item_slots=slots)


def test_a_log_that_lost_applied_records_is_refused() -> None:
    rig = Rig(SETTINGS)
    partition = reading.partition("u0", 2)
    for number in range(4):
        act(rig, clicked("u0", f"i{number}"), [])
    rig.drain()
    rig.ends["clicks", partition] -= 1
    with pytest.raises(LogMismatch, match="Kafka lost records"):
        rig.open("clicks", partition)
