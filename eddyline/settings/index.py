"""Settings of the vector index and its recall guard."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from eddyline.settings.field import within

BackendName = Literal["hnswlib", "faiss-flat", "faiss-ivf", "faiss-ivfpq", "faiss-hnsw", "annoy"]


class IndexSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The index of a query worker."""

    index_main: BackendName = "hnswlib"
    """The library of the main index; `faiss-…` and `annoy` need their extra. Which one when:
    docs/benchmarks.md."""
    index_exact_below: Annotated[int, within(0, 1_000_000_000)] = 12_000
    """Up to this many vectors, every query is an exact scan and no graph is built."""
    index_m: Annotated[int, within(2, 128)] = 16
    """hnswlib's M: links of a node."""
    index_ef_construction: Annotated[int, within(2, 10_000)] = 200
    """hnswlib's ef_construction: breadth of the search while building."""
    index_ef: Annotated[int, within(1, 10_000)] = 200
    """hnswlib's ef: breadth of the search while querying."""
    index_fresh_max: Annotated[int, within(1, 10_000_000)] = 4_096
    """This many fresh vectors outside the graph start a rebuild in the background."""
    index_tier_above: Annotated[int, within(0, 1_000_000_000)] = 32_768
    """During a long rebuild, more fresh vectors than this get a graph of their own, a second
    segment; 0 is never."""

    # The recall guard
    index_recall_share: Annotated[float, within(0, 1)] = 0.01
    """Share of the queries that the recall guard repeats exactly; 0 turns the guard off."""
    index_recall_floor: Annotated[float, within(0, 1)] = 0.95
    """Below this recall, the guard raises the work of each query."""
    index_recall_samples: Annotated[int, within(2, 100_000)] = 200
    """The fewest compared queries that the guard decides by."""
    index_recall_cpu_percent_max: Annotated[float, within(0.01, 100)] = 2.0
    """The most of one core that the recall guard uses."""
    index_ef_max: Annotated[int, within(1, 100_000)] = 1_600
    """The highest search breadth that the recall guard sets."""
