"""The last fill: what is new in the catalogue, for whoever nothing else could be found."""

from __future__ import annotations

from collections.abc import Collection

from index.filters import Filter
from serving.catalogue import Catalogue
from serving.fusion import Candidates

NAME = "newest"


def ask(items: Catalogue, k: int, exclude: Collection[str], asked: Filter | None = None) -> Candidates:
    """The k newest live items by their own time that pass the filter and are not excluded."""
    hits = items.newest(k, exclude, asked)
    which = "live items" if asked is None else "live items that pass the filter"
    return Candidates(hits, "" if len(hits) == k else f"only {len(hits)} {which} are left")
