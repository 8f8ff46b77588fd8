"""Hits as columns: an object per item only where one is used.

A query that fuses ten lists of a hundred items looks at a few of them as objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from typing_extensions import override

from index.arrays import Floats, Ints, Names
from index.port import Hit, hit_of


class HitColumns(Sequence[Hit]):
    """Hits of a live index, best first, each item once. Thread rule: any thread; immutable.

    names:  object array, label -> item id
    labels: int64 (n,), the items' numbers in their index, the same in all its versions while they
            live
    facts:  int64 (n, 3): at_ms, written_us and offset, as in `Hit`
    scores: float64 (n,), as `Hit.score`
    """

    __slots__ = ("_hits", "facts", "labels", "names", "scores")

    def __init__(self, names: Names, labels: Ints, facts: Ints, scores: Floats) -> None:
        self.names = names
        self.labels = labels
        self.facts = facts
        self.scores = scores
        self._hits: list[Hit] | None = None

    @property
    def ids(self) -> list[str]:
        """The item ids."""
        found: list[str] = self.names[self.labels].tolist()
        return found

    def _made(self) -> list[Hit]:
        if self._hits is None:
            columns = zip(self.ids, self.scores.tolist(), *self.facts.T.tolist(), strict=True)
            self._hits = list(map(hit_of, columns))
        return self._hits

    @override
    def __len__(self) -> int:
        return len(self.scores)

    @overload
    def __getitem__(self, at: int) -> Hit: ...

    @overload
    def __getitem__(self, at: slice) -> HitColumns: ...

    @override
    def __getitem__(self, at: int | slice) -> Hit | HitColumns:
        if isinstance(at, slice):
            return HitColumns(self.names, self.labels[at], self.facts[at], self.scores[at])
        if self._hits is not None:
            return self._hits[at]
        item_id, score = self.names[self.labels[at]], float(self.scores[at])
        return hit_of((item_id, score, *self.facts[at].tolist()))

    @override
    def __iter__(self) -> Iterator[Hit]:
        return iter(self._made())

    @override
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HitColumns | list | tuple):
            return NotImplemented
        return self._made() == list(other)

    __hash__ = None  # type: ignore[assignment]

    @override
    def __repr__(self) -> str:
        return repr(self._made())
