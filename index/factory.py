"""Live indexes, made from their settings."""

from __future__ import annotations

from index.backends.hnswlib import HnswBackend
from index.live import LiveIndex


class HnswIndex(LiveIndex):
    """The live index on hnswlib; see `index.live`."""

    def __init__(
        self,
        dimension: int,
        *,
        m: int = 16,
        ef_construction: int = 200,
        ef: int = 200,
        exact_below: int = 12_000,
        fresh_max: int = 4_096,
        tier_above: int = 0,
    ) -> None:
        """m, ef_construction, ef: hnswlib's; exact_below, fresh_max, tier_above: see `LiveIndex`."""
        main = HnswBackend(m=m, ef_construction=ef_construction, ef=ef)
        super().__init__(
            dimension,
            main.build,
            breadth=ef,
            exact_below=exact_below,
            fresh_max=fresh_max,
            tier_above=tier_above,
        )
