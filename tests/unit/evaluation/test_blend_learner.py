"""The guard over the blender: harm replaces it, and it comes back."""

from __future__ import annotations

import random

import pytest

from evaluation.blend_learner import BlendLearner, Guard

NAMES = ["towers", "popular"]


def fed(learned: float, by_rank: float, targets: int, guard: Guard | None = None) -> Guard:
    """The guard after random targets. learned, by_rank: hit rates, independent"""
    guard, draw = guard or Guard(), random.Random(7)
    for _ in range(targets):
        guard.add(draw.random() < learned, draw.random() < by_rank)
    return guard


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_one_that_is_as_good_stays(rate: float) -> None:
    assert fed(rate, rate, 50_000).times == 0


def test_one_that_is_worse_is_replaced_and_comes_back_when_it_is_not() -> None:
    guard = fed(0.05, 0.15, 1_500)
    assert guard.replaced and guard.times == 1
    assert fed(0.05, 0.15, 3_000, guard).times == 1
    fed(0.2, 0.15, 20_000, guard)
    assert not guard.replaced and guard.times == 1


@pytest.mark.parametrize(("losses", "replaced"), [(24, False), (25, False), (26, True), (99, True)])
def test_nothing_is_said_with_few(losses: int, replaced: bool) -> None:
    """Each loss fades a little, so one more than the limit is needed."""
    guard = Guard()
    for _ in range(losses):
        guard.add(False, True)
    assert guard.replaced == replaced


def test_equal_targets_count_nothing() -> None:
    guard = Guard()
    for hit in (True, False) * 500:
        guard.add(hit, hit)
    assert guard == Guard()


def test_the_fusion_by_rank_is_served_instead() -> None:
    learner = BlendLearner(NAMES)
    learner.blender.learned = 5
    assert learner.served is learner.blender
    learner.guard.replaced = True
    assert learner.served is learner.by_rank and learner.served.learned == 0


def test_the_state_is_stored_to_the_bit() -> None:
    learner = BlendLearner(NAMES)
    learner.blender.learned, learner.guard = 5, Guard(1.5, 2.5, True, 3)
    again = BlendLearner(NAMES, learner.encode())
    assert again.encode() == learner.encode() and again.guard == learner.guard
    assert again.current() is again.blender
    other = BlendLearner(["popular"], learner.encode())
    assert (other.guard, other.blender.learned) == (Guard(), 0)


@pytest.mark.parametrize("stored", [b"\xff", b"\x90", b"\x92\xc4\x00\x90"])
def test_a_state_that_cannot_be_read_is_named_and_learning_begins_anew(
    stored: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    learner = BlendLearner(NAMES, stored)
    assert learner.encode() == BlendLearner(NAMES).encode()
    assert [record.message for record in caplog.records] == ["what was learned is not used"]
