"""The second tier: while the main index is long in building, fresh items get small graphs of their own.

As in a log-structured merge tree: where the fresh buffer is full it becomes a tier, and tiers that are not
much larger than what is built anyway are built into it, so that there are few, and an item is built again
only a few times. A new main index takes in all that it knows; what a tier alone knows stays there.
"""

from __future__ import annotations

from index.storage.state import IndexVersion
from index.writing.placement import Placement

# A tier up to so many times larger than what is merged is merged, too: the sizes of those that stay grow at
# least by this factor, so an item is built log3(n / fresh) times at most, on the average half of it.
MERGE_RATIO = 2


def segments_to_merge(state: IndexVersion, place: Placement) -> list[int]:
    """The numbers of the tiers that a new one takes in, the youngest first."""
    numbers, total = [], state.fresh_count
    for graph in reversed(state.graphs[1:]):
        standing = place.built[graph.number].standing
        # One that mostly does not count is a search for little.
        if standing > MERGE_RATIO * total and 2 * standing > graph.main.size:
            break
        numbers.append(graph.number)
        total += standing
    return numbers
