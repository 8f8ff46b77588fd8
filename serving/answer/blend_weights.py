"""The blender that a process answers with: the newest one that was published for its paths."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from serving.answer.blend_features import CONTEXTS, feature_names, rank_features
from serving.answer.blender import Blender, BlenderRejected

log = logging.getLogger(__name__)

# Of the record in the topic `blender`.
KEY = b"weights"


def start_blender(fused: Sequence[str]) -> Blender:
    """The blender of these paths that has learned nothing."""
    return Blender.start(CONTEXTS, feature_names(fused), rank_features(fused))


class CurrentBlender:
    """Begins with a fusion by rank. Thread rule: one thread takes, any thread calls.

    why: why the last published weights are not used; "" if they are, or there are none
    """

    def __init__(self, fused: Sequence[str], blender: Blender | None = None) -> None:
        """fused: names of the paths, in their order.

        blender: to begin with; one of other paths is not used
        """
        fresh = start_blender(fused)
        fits = blender is not None and _names(blender) == _names(fresh)
        self._blender = blender if blender is not None and fits else fresh
        self._taken: bytes | None = None
        self.why = ""

    def __call__(self) -> Blender:
        """The blender now."""
        return self._blender

    def take(self, value: bytes | None) -> None:
        """Use these weights; what cannot be used is logged, and the weights of before stay.

        value: `Blender.encode`; None where nothing is published
        """
        if value is None or value == self._taken:
            return
        self._taken = value
        try:
            found = Blender.decode(value)
            self._check(found)
        except BlenderRejected as error:
            self.why = str(error)
            log.warning("published weights of the blender are not used", extra={"reason": self.why})
            return
        self._blender, self.why = found, ""

    def _check(self, found: Blender) -> None:
        """Raise BlenderRejected for a blender of other paths."""
        have = self._blender
        if _names(found) == _names(have):
            return
        other = sorted(set(found.features) ^ set(have.features))
        which = f"; not in both: {', '.join(other[:4])}" if other else " in another order"
        raise BlenderRejected(f"the blender was learned for other recall paths{which}")


def _names(blender: Blender) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return blender.contexts, blender.features
