"""Where the judge takes micro-steps: where ingest does, as the topic `generations` records it."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from eddyline.schema.step_ranges import FOREVER, StepRanges
from streams.clicks.step_ranges import OpenedSlot, Recorded, StepRangeRule


class FollowedStepRanges(StepRangeRule):
    """The recorded ranges; before ingest has recorded any, all offsets from the first one on.

    recorded: replaced as a whole; slots that were opened before keep what they have
    """

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded

    @override
    def open(self, slots: Sequence[OpenedSlot], live: Sequence[str]) -> list[dict[str, StepRanges]]:
        return [{**slot.stored, **{name: self._of(name, slot) for name in live}} for slot in slots]

    def _of(self, generation: str, slot: OpenedSlot) -> StepRanges:
        found = self.recorded.get((generation, slot.partition))
        if found is not None and found.log == slot.log:
            return found
        default = StepRanges(slot.log, ((slot.position, FOREVER),))
        return slot.stored.get(generation, default)
