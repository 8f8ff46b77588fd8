"""Positions of an answer that are kept for young and for fresh items, chosen by Thompson sampling.

A fusion that learns from clicks gives an item without clicks no chance to get any. After Thompson,
"On the Likelihood that One Unknown Probability Exceeds Another" (Biometrika 1933): each candidate
draws from a Beta distribution whose mean is its place in the fused list and whose strength grows
with its clicks, and the highest draws are shown. Nothing else here is random, and the draw follows
from the user and the answer's impression id: the same answer can be made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from eddyline.schema.item_key import item_key
from eddyline.settings.loader import Settings
from index.arrays import Floats

YOUNG, FRESH = "young", "fresh"
# The mean draw of the first candidate of the fused list and of one behind it; between them it falls
# with the place. What this counts for, in clicks. With these, an item without clicks behind the
# list still comes before the first one in one draw of eighteen.
FIRST, LAST = 0.8, 0.2
PRIOR_CLICKS = 2.0
# Of all live items, so many of the newest are candidates whether a path returns them or not.
NEWEST = 50
_HOUR_MS = 3_600_000


class Quota(NamedTuple):
    """share: of the positions, above 0; kind: `YOUNG` or `FRESH`"""

    kind: str
    share: float


class Quotas(NamedTuple):
    """What the settings say; see there.

    every: one in so many answers has them
    clicks_max: of a young item; fresh_ms: greatest age of a fresh one
    items: share of the items that may be shown
    """

    listed: Sequence[Quota] = ()
    every: int = 1
    clicks_max: float = 20.0
    fresh_ms: int = 24 * _HOUR_MS
    items: float = 1.0

    def may_show(self, item_id: str) -> bool:
        """Whether the item is in the share that quotas show."""
        return self.items >= 1 or item_key(item_id) < self.items * 2**64


NO_QUOTAS = Quotas()


def quotas_of(settings: Settings) -> Quotas:
    """The quotas of the settings; a share of 0 is none."""
    shares = ((YOUNG, settings.quota_young), (FRESH, settings.quota_fresh))
    return Quotas(
        [Quota(kind, share) for kind, share in shares if share],
        settings.quota_every,
        settings.quota_young_clicks,
        settings.quota_fresh_h * _HOUR_MS,
        settings.quota_items,
    )


class Draw:
    """The chance of one answer. Thread rule: one thread."""

    def __init__(self, user_id: str, impression_id: str) -> None:
        """The same two give the same draws, in the same order."""
        seed = blake2b(f"{user_id}\0{impression_id}".encode(), digest_size=16, person=b"quota")
        self._seed = int.from_bytes(seed.digest(), "little")
        self._chance: np.random.Generator | None = None

    def has_quotas(self, quotas: Quotas) -> bool:
        """Whether this answer has quotas."""
        return bool(quotas.listed) and self._seed % quotas.every == 0

    def positions(self, k: int, share: float) -> list[int]:
        """Places, from 0, of the quota: the last of each 1 / share, and by chance one of the rest.

        An answer of 25 has two or three of a tenth: 9, 19, and in half of the answers 24.
        """
        whole = int(k * share)
        places = [int(np.ceil((n + 1) / share)) - 1 for n in range(whole)]
        if self._generator().random() < k * share - whole:
            places.append(k - 1)
        return [place for place in dict.fromkeys(places) if place < k]

    def order(self, ranks: Sequence[int], clicks: Sequence[float], pool: int) -> list[int]:
        """The candidates, the highest draw first.

        ranks: in the fused list, from 1; beyond `pool` for those that are not in it
        clicks: of each; pool: length of the list
        """
        place = (np.minimum(np.asarray(ranks, float), pool + 1) - 1) / max(1, pool)
        relevance: Floats = FIRST - (FIRST - LAST) * place
        strength = PRIOR_CLICKS + np.asarray(clicks, float)
        draws = self._generator().beta(relevance * strength, (1.0 - relevance) * strength)
        order: list[int] = np.argsort(-draws, kind="stable").tolist()
        return order

    def _generator(self) -> np.random.Generator:
        if self._chance is None:
            self._chance = np.random.default_rng(self._seed)
        return self._chance
