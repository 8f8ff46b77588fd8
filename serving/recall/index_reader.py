"""What an answer is made from: the reading half of the index's port.

A worker answers from its own index; a coordinator from `ScatterGather`, which asks the shards.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from index.arrays import Vector
from index.filters import Filter
from index.port import Hit, IndexStats, Watermark


class IndexReader(Protocol):
    """Items that a query can read; see `index.port.Index` for each method. Thread rule: as the index's."""

    @property
    def dimension(self) -> int:
        """See `Index.dimension`."""

    def query(
        self, vector: Vector, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> list[Hit]:
        """See `Index.query`."""

    def vectors_of(self, item_ids: Sequence[str]) -> Vector:
        """See `Index.vectors_of`."""

    def describe(self, item_ids: Sequence[str], filters: Filter | None = None) -> list[Hit | None]:
        """See `Index.describe`."""

    def newest(
        self, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> list[Hit]:
        """See `Index.newest`."""

    def watermarks(self) -> Mapping[int, Watermark]:
        """See `Index.watermarks`."""

    def stats(self) -> IndexStats:
        """See `Index.stats`."""
