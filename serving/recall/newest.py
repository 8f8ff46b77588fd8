"""The last fill: what is new in the catalogue, for whoever nothing else could be found."""

from __future__ import annotations

from collections.abc import Collection

from index.filters import Filter
from serving.recall.base import Candidates
from serving.recall.index_reader import IndexReader

NAME = "newest"


def recall(
    items: IndexReader, k: int, exclude: Collection[str], filters: Filter | None = None
) -> Candidates:
    """The k newest live items by their own time that pass the filter and are not excluded."""
    hits = items.newest(k, exclude, filters)
    which = "live items" if filters is None else "live items that pass the filter"
    return Candidates(hits, "" if len(hits) == k else f"only {len(hits)} {which} are left")
