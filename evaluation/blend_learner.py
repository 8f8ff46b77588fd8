"""What learns the fusion: the blender, and a guard that has it replaced where it does harm.

The guard compares the blender with the fusion by rank that it began as, on the same targets. Of
those that one of both has among the first ten and the other has not, it counts wins and losses of
the blender, old ones less (sign test; a target loses half of its weight in `HALF_LIFE` targets).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import sqrt

import msgspec

from serving.answer.blend_weights import CurrentBlender, start_blender
from serving.answer.blender import Blender, BlenderRejected

log = logging.getLogger(__name__)

HALF_LIFE = 2_000
# More losses than wins by so many standard deviations: it is replaced. It is looked at after each
# target; one that is as good as the other was not replaced in 3 million simulated targets.
HARM_Z = 5.0
# With fewer wins and losses nothing is said.
COUNTED_MIN = 25.0
_KEPT = 0.5 ** (1 / HALF_LIFE)


class Guard(msgspec.Struct, array_like=True):
    """The counts. replaced: whether the fusion by rank answers; times: how often it began to."""

    wins: float = 0.0
    losses: float = 0.0
    replaced: bool = False
    times: int = 0

    def add(self, learned: bool, by_rank: bool) -> None:
        """Count a target. learned, by_rank: whether it is among the first ten of each."""
        self.wins = self.wins * _KEPT + (learned and not by_rank)
        self.losses = self.losses * _KEPT + (by_rank and not learned)
        counted = self.wins + self.losses
        if self.replaced:
            self.replaced = self.losses > self.wins
        elif counted >= COUNTED_MIN and self.losses - self.wins > HARM_Z * sqrt(counted):
            self.replaced = True
            self.times += 1


class _Stored(msgspec.Struct, array_like=True, frozen=True):
    blender: bytes
    guard: Guard


def _decoded(stored: bytes) -> tuple[Blender | None, Guard]:
    try:
        found = msgspec.msgpack.decode(stored, type=_Stored)
        return Blender.decode(found.blender), found.guard
    except (msgspec.MsgspecError, BlenderRejected) as error:
        log.warning("what was learned is not used", extra={"reason": str(error)})
        return None, Guard()


class BlendLearner:
    """The blender of some recall paths while it learns. Thread rule: one thread.

    current: holds the blender, for the fusion; blender: as it has learned so far
    by_rank: the fusion by rank, which has learned nothing; guard: compares both
    """

    def __init__(self, fused: Sequence[str], stored: bytes = b"") -> None:
        """stored: `encode` of before, to go on with.

        One of other paths is not used, nor one that cannot be read, which is logged.
        """
        before, guard = _decoded(stored) if stored else (None, Guard())
        self.by_rank = start_blender(fused)
        self.current = CurrentBlender(fused, before)
        self.blender = self.current()
        self.guard = guard if self.blender is before else Guard()

    @property
    def served(self) -> Blender:
        """What workers are to answer with."""
        return self.by_rank if self.guard.replaced else self.blender

    def encode(self) -> bytes:
        """The state, to go on with."""
        return msgspec.msgpack.encode(_Stored(self.blender.encode(), self.guard))
