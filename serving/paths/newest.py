"""The last fill: what is new in the catalogue, for whoever nothing else could be found."""

from __future__ import annotations

from collections.abc import Collection

from index.port import Index
from serving.fusion import Candidates

NAME = "newest"


def ask(index: Index, k: int, exclude: Collection[str]) -> Candidates:
    """The k newest live items by their own time that are not excluded."""
    hits = index.newest(k, exclude)
    return Candidates(hits, "" if len(hits) == k else f"only {len(hits)} live items are left")
