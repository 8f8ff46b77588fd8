"""Where the micro-steps of each generation begin: read and recorded before a process takes any."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import override

from eddyline.generations import Generations
from eddyline.schema.step_ranges import StepRanges, always, resolve

# (generation, partition of `clicks`) -> where its micro-steps are taken
Recorded = Mapping[tuple[str, int], StepRanges]


class StepRangeLog(Protocol):
    """The durable record of all ranges, and of generations' ends. Thread rule: one thread."""

    def read(self) -> Generations:
        """All that is recorded. Raises KafkaUnavailable, KafkaRefused, BundleError."""

    def write(self, ranges: Recorded) -> None:
        """Return once the ranges are stored. Raises KafkaUnavailable, KafkaRefused."""


@dataclass(frozen=True, slots=True)
class OpenedSlot:
    """A user slot that is read from its fence on.

    log:      of `clicks`, `str(LogId)`
    position: the first offset that the slot does not have yet
    stored:   generation -> its ranges, as the slot has them
    """

    partition: int
    log: str
    position: int
    stored: Mapping[str, StepRanges]


class StepRangeRule(Protocol):
    """Decides the ranges of opened slots."""

    def open(self, slots: Sequence[OpenedSlot], live: Sequence[str]) -> list[dict[str, StepRanges]]:
        """For each slot, the ranges by generation: those that the slot has, and the live ones.

        Raises KafkaUnavailable, KafkaRefused, BundleError; GenerationEnded where a live generation
        must not be used any more.
        """


class RecordedStepRanges(StepRangeRule):
    """The rule of processes that write state: what changes is recorded first."""

    def __init__(self, log: StepRangeLog) -> None:
        self._log = log

    @override
    def open(self, slots: Sequence[OpenedSlot], live: Sequence[str]) -> list[dict[str, StepRanges]]:
        found = self._log.read()
        found.check_usable(live, time.time_ns() // 1_000_000)
        recorded = found.ranges
        opened, changed = [], dict[tuple[str, int], StepRanges]()
        for slot in slots:
            mine = {name: found for (name, p), found in recorded.items() if p == slot.partition}
            ranges = resolve(slot.stored, mine, live, slot.log, slot.position)
            changed |= {
                (name, slot.partition): new
                for name, new in ranges.items()
                # The records of an ended generation are removed, and must not come back.
                if mine.get(name) != new and name not in found.ended
            }
            opened.append({n: r for n, r in ranges.items() if n in slot.stored or n in live})
        if changed:
            self._log.write(changed)
        return opened


class FixedStepRanges(StepRangeRule):
    """The rule of replays: as recorded. A generation without a record steps from the beginning."""

    def __init__(self, recorded: Recorded | None = None) -> None:
        self._recorded = recorded or {}

    @override
    def open(self, slots: Sequence[OpenedSlot], live: Sequence[str]) -> list[dict[str, StepRanges]]:
        return [{**slot.stored, **{name: self._of(name, slot) for name in live}} for slot in slots]

    def _of(self, generation: str, slot: OpenedSlot) -> StepRanges:
        found = self._recorded.get((generation, slot.partition))
        return found if found is not None and found.log == slot.log else always(slot.log)
