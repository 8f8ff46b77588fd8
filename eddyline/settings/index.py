"""Settings of the vector index and its recall guard."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from eddyline.settings.field import about

BackendName = Literal["hnswlib", "faiss-flat", "faiss-ivf", "faiss-ivfpq", "faiss-hnsw", "annoy"]


class IndexSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The index of a query worker."""

    index_main: Annotated[
        BackendName,
        about(
            "The library of the main index; `faiss-…` and `annoy` need their extra. Which one "
            "when: docs/benchmarks.md."
        ),
    ] = "hnswlib"
    index_exact_below: Annotated[
        int,
        about(
            "Up to this many vectors, every query is an exact scan and no graph is built.",
            0,
            1_000_000_000,
        ),
    ] = 12_000
    index_m: Annotated[int, about("hnswlib's M: links of a node.", 2, 128)] = 16
    index_ef_construction: Annotated[
        int, about("hnswlib's ef_construction: breadth of the search while building.", 2, 10_000)
    ] = 200
    index_ef: Annotated[
        int, about("hnswlib's ef: breadth of the search while querying.", 1, 10_000)
    ] = 200
    index_fresh_max: Annotated[
        int,
        about(
            "This many fresh vectors outside the graph start a rebuild in the background.",
            1,
            10_000_000,
        ),
    ] = 4_096
    index_tier_above: Annotated[
        int,
        about(
            "During a long rebuild, more fresh vectors than this get a graph of their own, a "
            "second segment; 0 is never.",
            0,
            1_000_000_000,
        ),
    ] = 32_768

    # The recall guard
    index_recall_share: Annotated[
        float,
        about(
            "Share of the queries that the recall guard repeats exactly; 0 turns the guard off.",
            0,
            1,
        ),
    ] = 0.01
    index_recall_floor: Annotated[
        float, about("Below this recall, the guard raises the work of each query.", 0, 1)
    ] = 0.95
    index_recall_samples: Annotated[
        int, about("The fewest compared queries that the guard decides by.", 2, 100_000)
    ] = 200
    index_recall_cpu_percent_max: Annotated[
        float, about("The most of one core that the recall guard uses.", 0.01, 100)
    ] = 2.0
    index_ef_max: Annotated[
        int, about("The highest search breadth that the recall guard sets.", 1, 100_000)
    ] = 1_600
