"""Which small segments a new one takes in.

As in a log-structured merge tree, the fresh buffer becomes a small segment while a rebuild of the
main segment runs long, and merges with segments that are not much larger. So small segments stay
few, and an item is rebuilt only a few times. A new main segment takes in every item that it knows
and leaves the others in the small segments.
"""

from __future__ import annotations

from index.storage.index_version import IndexVersion
from index.writing.placement import Placement

# A segment of up to this many times the merged size is merged too. The sizes of the others grow at
# least by this factor, so an item is built at most log3(n / fresh) times, on average half of that.
MERGE_RATIO = 2


def segments_to_merge(version: IndexVersion, placement: Placement) -> list[int]:
    """Numbers of the small segments that the next one takes in, the youngest first."""
    numbers, total = [], version.fresh_count
    for segment in reversed(version.segments[1:]):
        live = placement.segments[segment.number].live
        # A mostly dead segment costs a search for little, so it is merged at any size.
        if live > MERGE_RATIO * total and 2 * live > segment.index.size:
            break
        numbers.append(segment.number)
        total += live
    return numbers
