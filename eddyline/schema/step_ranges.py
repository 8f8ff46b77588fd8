"""At which offsets of a partition of `clicks` a generation takes micro-steps. One rule for all.

An ingest process takes the steps of the generations that it has loaded, from its position on. So a
generation's embeddings depend on where its steps began, and where they paused (another process had
the partition, without this generation). Both are recorded: in the topic `generations`, before the
first step, and in the user slot, with the step's own write. ADR 20 has the reasons.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec

# The end of a range that goes on.
FOREVER = 2**63 - 1


class StepRanges(msgspec.Struct, frozen=True, array_like=True):
    """Of one generation and one partition of `clicks`.

    log:    which log the offsets belong to, `str(LogId)`; "": any, in state of older versions
    ranges: (first offset, offset after the last or FOREVER), ascending, with gaps between them
    """

    log: str
    ranges: tuple[tuple[int, int], ...] = ()

    def covers(self, offset: int) -> bool:
        """Whether the generation takes the steps of the record at this offset.

        >>> ranges = StepRanges("log", ((3, 5), (8, FOREVER)))
        >>> [offset for offset in range(10) if ranges.covers(offset)]
        [3, 4, 8, 9]
        """
        return any(first <= offset < end for first, end in self.ranges)

    def before(self, offset: int, log: str) -> list[tuple[int, int]]:
        """The ranges below an offset; none of another log."""
        clipped = [(first, min(end, offset)) for first, end in self._of(log)]
        return [(first, end) for first, end in clipped if first < end]

    def since(self, offset: int, log: str) -> list[tuple[int, int]]:
        """The ranges from an offset on; none of another log."""
        clipped = [(max(first, offset), end) for first, end in self._of(log)]
        return [(first, end) for first, end in clipped if first < end]

    def _of(self, log: str) -> tuple[tuple[int, int], ...]:
        return self.ranges if self.log in (log, "") else ()


def always(log: str) -> StepRanges:
    """From the beginning of the log on."""
    return StepRanges(log, ((0, FOREVER),))


def resolve(
    stored: Mapping[str, StepRanges],
    recorded: Mapping[str, StepRanges],
    live: Collection[str],
    log: str,
    position: int,
) -> dict[str, StepRanges]:
    """The ranges of every generation, by a process that reads a partition from `position` on.

    stored:   of the user slot: what was done to the state that is there; true below `position`
    recorded: of the topic: where the state went back (Redis was emptied, or is an older copy), the
              same steps are taken again from `position` on
    live:     the generations that this process has loaded: they go on for ever. Of other
              generations the process takes no steps

    >>> resolve({}, {}, ["2"], "log", 7)["2"].ranges == ((7, FOREVER),)
    True
    >>> old = {"1": always("log")}
    >>> resolve(old, old, ["2"], "log", 7)["1"].ranges
    ((0, 7),)
    """
    found = {}
    for generation in sorted({*stored, *recorded, *live}):
        ranges = stored.get(generation, StepRanges(log)).before(position, log)
        if generation in live:
            ranges += recorded.get(generation, StepRanges(log)).since(position, log)
            ranges.append((max(position, ranges[-1][1] if ranges else 0), FOREVER))
        found[generation] = StepRanges(log, _joined(ranges))
    return found


def _joined(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for first, end in ranges:
        if first >= end:
            continue
        if joined and joined[-1][1] == first:
            first = joined.pop()[0]
        joined.append((first, end))
    return tuple(joined)
