"""The recall paths, in the order in which the cascade calls them. A new path is one line here."""

from __future__ import annotations

from collections.abc import Callable

from serving.recall.base import RecallContext, RecallPath
from serving.recall.newest import NewestPath
from serving.recall.popular import PopularPath
from serving.recall.towers import TowersPath

PATHS: tuple[Callable[[RecallContext], RecallPath], ...] = (
    TowersPath,  # the user's nearest items
    PopularPath,  # if the user is unknown, or has few live items around
    NewestPath,  # fallback: returns as many as there are live items
)


def make_paths(context: RecallContext) -> list[RecallPath]:
    """The recall paths of one generation."""
    return [path(context) for path in PATHS]
