"""The row of the blender, which learns from every event after it was ranked."""

from __future__ import annotations

import numpy as np
from typing_extensions import override

from evaluation.blend_learner import BlendLearner
from evaluation.engine import Engine
from evaluation.rows import LIST_LENGTH, ProductRow, Query
from serving.answer.blend import Blend, Prepared
from serving.answer.blend_features import Matrix


class BlendRow(ProductRow):
    """The answer by the blender over the recall paths of the settings.

    A target that no path has among its candidates teaches nothing. It stands among the items behind
    the candidates, whose order is not looked at: its rank is the middle of them.

    learner: with what it has learned so far
    """

    def __init__(
        self,
        product: Engine,
        name: str,
        scored: int,
        *,
        learned: bytes = b"",
        learns_every: int = 1,
    ) -> None:
        """learned: see `BlendLearner`; learns_every: one of n targets"""
        super().__init__(product, [name], scored)
        settings = product.settings
        paths = settings.recall_path_names
        self.learner = BlendLearner(paths, learned)
        self._fusion = Blend(paths, self.learner.current, candidates=settings.path_candidates)
        self._paths = [product.path(path) for path in paths]
        self._results = self.results[name]
        self._every = learns_every
        # (user, candidates, target) of this time: learned from once all of it is ranked.
        self._waiting: list[tuple[str, Prepared, int]] = []

    @override
    def score(self, query: Query) -> None:
        product, items = self.product, self.product.items
        product.list_popularity()
        request = product.request(query.user, LIST_LENGTH)._replace(
            excluded={items.ids[place] for place in query.excluded}, now_ms=query.at_ms
        )
        prepared = self._fusion.prepare(self._paths, request, product.index)
        learner, q, x = self.learner, prepared.q, prepared.x
        scores, ids = learner.blender.scores(q, x), prepared.table.ids
        wanted = items.ids[query.target]
        target = ids.index(wanted) if wanted in ids else None
        competing = len(items.ids) - len(query.excluded)
        rank = self._results.ranks[query.number] = _rank(scores, target, competing)
        by_rank = _rank(learner.by_rank.scores(q, x), target, competing)
        learner.guard.add(rank <= LIST_LENGTH, by_rank <= LIST_LENGTH)
        if target is not None and query.number % self._every == 0:
            self._waiting.append((query.user_id, prepared, target))
        if query.wants_list:
            order = sorted(range(len(ids)), key=lambda at: (-scores[at], ids[at]))
            self._results.lists[query.number] = [ids[at] for at in order[:LIST_LENGTH]]

    @override
    def learn(self, begin: int, end: int) -> None:
        self.step()

    def step(self) -> None:
        """Learn from the targets that were ranked since the last call.

        In the order of the users: it depends on no partition.
        """
        waiting, self._waiting = self._waiting, []
        for _, prepared, target in sorted(waiting, key=lambda one: one[0]):
            self.learner.blender.learn(prepared.q, prepared.x, target)


def _rank(scores: Matrix, target: int | None, competing: int) -> float:
    """The target's rank among the items that compete: 1 + those above + half of the ties."""
    if target is None:
        return len(scores) + (competing - len(scores) + 1) / 2
    above = np.count_nonzero(scores > scores[target])
    # numpy's numbers would spread into what is stored.
    return float(1 + above + (np.count_nonzero(scores == scores[target]) - 1) / 2)
