"""The rank of a target among all live items: 1 + the items scored higher + half the ties."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from serving.answer.fusion import FusedOrder
from serving.recall.base import PathScores

Ints = npt.NDArray[np.int64]
Ranks = npt.NDArray[np.float64]
# The rank of a target that the path never returns.
NEVER = np.inf


def ranks(scored: PathScores, targets: Ints, excluded: Sequence[Ints]) -> Ranks:
    """The rank of the target of each request.

    targets:  int64 (n,), places of the items
    excluded: for each request the places of the items that do not compete, each once; an excluded
              target is never returned
    """
    scores, error = scored.scores, scored.error
    n = np.arange(len(targets))
    own = scores[n, targets]
    low, high = (own - error)[:, None], (own + error)[:, None]
    higher = np.count_nonzero(scores > high, axis=1).astype(np.float64)
    close = np.count_nonzero(scores >= low, axis=1) - higher
    result = np.empty(len(targets))
    for number, target in enumerate(targets.tolist()):
        out, row = excluded[number], scores[number]
        if own[number] == -np.inf or (len(out) and (out == target).any()):
            result[number] = NEVER
            continue
        if len(out):
            theirs = row[out]
            higher[number] -= np.count_nonzero(theirs > high[number])
        ties = 0.0
        if close[number] > 1:
            more, ties = _among_close(scored, number, target, out)
            higher[number] += more
        result[number] = 1 + higher[number] + ties / 2
    return result


def fused_rank(order: FusedOrder, target: int, excluded: Ints) -> float:
    """The rank of the target in a fusion's order, for one request."""
    tiers = order.tiers
    tier = int(tiers[target])
    if tier == len(order.scores):
        return NEVER
    scored = order.scores[tier]
    before = np.count_nonzero(tiers < tier) - np.count_nonzero(tiers[excluded] < tier)
    # What is in another tier does not compete within this one.
    others = np.flatnonzero(tiers != tier)
    outside = np.union1d(others, excluded) if len(others) else excluded
    within = ranks(scored, np.array([target]), [outside])[0]
    return float(before + within)


def _among_close(scored: PathScores, number: int, target: int, excluded: Ints) -> tuple[int, int]:
    """(items scored higher, ties) among those whose scores are as close as the error."""
    row, error = scored.scores[number], scored.error
    own = row[target]
    close = (row >= own - error) & (row <= own + error)
    close[excluded] = False
    close[target] = False
    # Thousands of items may tie, as those without any event do.
    if scored.exact is None:
        return 0, int(np.count_nonzero(close))
    places = np.flatnonzero(close)
    exact = scored.exact(number, np.append(places, target))
    return (
        int(np.count_nonzero(exact[:-1] > exact[-1])),
        int(np.count_nonzero(exact[:-1] == exact[-1])),
    )
