"""The port of recall paths."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from index.port import Hit


class Candidates(NamedTuple):
    """What a path names, best first. why: one clause on why it is fewer than it was asked for, else ""."""

    hits: Sequence[Hit]
    why: str = ""


class RecallPath(NamedTuple):
    """A way to name candidates for the user in question.

    ask: (k, exclude) -> at most k live items, none of them excluded
    """

    name: str
    ask: Callable[[int, Collection[str]], Candidates]
