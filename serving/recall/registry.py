"""The recall paths by name. A new path is one line here, and one in `settings.worker`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from serving.recall.again import AgainPath
from serving.recall.base import FILLS, RecallContext, RecallPath
from serving.recall.co_visits import CoVisitsBothPath, CoVisitsPath, NextPath
from serving.recall.interests import InterestsPath
from serving.recall.newest import NewestPath
from serving.recall.popular import PopularPath
from serving.recall.towers import TowersPath

PATHS: dict[str, Callable[[RecallContext], RecallPath]] = {
    TowersPath.name: TowersPath,  # the user's nearest items
    InterestsPath.name: InterestsPath,  # the nearest items of each group of the user's last items
    PopularPath.name: PopularPath,  # if the user is unknown, or has few live items around
    CoVisitsPath.name: CoVisitsPath,  # what users visited soon after the user's newest items
    CoVisitsBothPath.name: CoVisitsBothPath,  # or before them; less popular items first
    NextPath.name: NextPath,  # what they visited right after them
    AgainPath.name: AgainPath,  # what the user had before
    "popular_fast": partial(PopularPath, pace="fast"),  # of the last hundreds of events
    "popular_slow": partial(PopularPath, pace="slow"),  # of the last thousands
    NewestPath.name: NewestPath,  # fallback: returns as many as there are live items
}


def reads_co_visits(names: Iterable[str]) -> bool:
    """Whether one of these paths reads what all users visited."""
    return any(getattr(PATHS[name], "reads", ()) for name in names)


def make_paths(context: RecallContext, names: Sequence[str] | None = None) -> list[RecallPath]:
    """The recall paths of one generation: these, then those of `FILLS` that are not among them.

    names: default: those of the setting `recall_paths`
    """
    chosen = dict.fromkeys((*(names or context.settings.recall_path_names), *FILLS))
    return [PATHS[name](context) for name in chosen]
