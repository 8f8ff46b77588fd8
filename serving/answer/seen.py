"""Which items a user had that no answer shows: by kind of event, for ever or for a time.

What counts is the user's list, the session, and what the user had beyond the list. The time of the
latter is known to the minute, and an event of the list counts alike for all kinds that hide it.
"""

from __future__ import annotations

import math

import numpy as np

from eddyline.schema import seen_items
from eddyline.schema.events import KINDS
from eddyline.schema.item_key import cached_keys_of, item_key
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import UserState
from index.arrays import Floats
from index.port import IndexReader
from serving.recall.base import Hidden

_DONE = {"cart": "put into the cart", "purchase": "bought"}
_UNITS = (("day", 86_400_000), ("hour", 3_600_000), ("minute", 60_000), ("second", 1_000))


class SeenPolicy:
    """How long items stay hidden from a user who had them. Thread rule: any thread.

    hides_all: whether all kinds hide for ever; keeps_most: whether dislikes alone do
    """

    def __init__(self, settings: Settings, *, hides: bool | None = None) -> None:
        """hides: what `seen_items` says; None: as the settings have it"""
        if hides is None:
            hides = settings.seen_items == "hide"
        policy = settings.seen_kinds
        default_s = dict.fromkeys(KINDS, math.inf if hides else 0.0) | {"dislike": math.inf}
        hidden_s = [policy.get(kind, default_s[kind]) for kind in KINDS]
        self._hidden_ms: Floats = 1_000.0 * np.array(hidden_s)
        self._items_max = settings.seen_items_max
        self.hides_all = all(one == math.inf for one in hidden_s)
        self.keeps_most = not policy and not hides

    def hidden(self, user: UserState, index: IndexReader, now_ms: int) -> Hidden:
        """What is hidden now. now_ms: the time of the query, milliseconds since 1970"""
        entries = user.history.entries
        since = None if self.hides_all else self._since(now_ms)
        if since is None:
            ids = {entry.item_id for entry in entries}
        else:
            of_kind = since.tolist()
            ids = {entry.item_id for entry in entries if entry.at_ms > of_kind[entry.kind]}
        if not user.seen:
            return Hidden(ids)
        beyond = seen_items.decode(user.seen, self._items_max)
        keys = beyond.keys
        if since is not None:
            keys = keys[beyond.at_ms > since[beyond.kinds]]
        every = np.concatenate((cached_keys_of(ids), keys))
        ids.update(index.live_ids(keys))
        return Hidden(ids, every)

    def why(self, user: UserState, item_id: str, now_ms: int) -> str:
        """Why this item is hidden; "" if it is not."""
        key, beyond = item_key(item_id), seen_items.decode(user.seen, self._items_max)
        same = beyond.keys == key
        had = [(e.at_ms, e.kind) for e in user.history.entries if e.item_id == item_id]
        had += zip(beyond.at_ms[same].tolist(), beyond.kinds[same].tolist(), strict=True)
        since = self._since(now_ms)
        hiding = [(at_ms, kind) for at_ms, kind in had if at_ms > since[kind]]
        if not hiding:
            return ""
        # The one that hides it longest; of several the last one.
        at_ms, kind = max(hiding, key=lambda one: (one[0] - since[one[1]], one))
        name = KINDS[kind]
        done = _DONE.get(name) or (f"{name}d" if name.endswith("e") else f"{name}ed")
        left_ms = at_ms - since[kind]
        ends = "it does not come back"
        if left_ms < math.inf:
            ends = f"it comes back in {_shown(left_ms)}"
        return f"seen: {done} {_shown(now_ms - at_ms)} ago, {ends}"

    def _since(self, now_ms: int) -> Floats:
        """float64 (kinds,): later events of a kind hide their item."""
        return np.where(self._hidden_ms > 0, now_ms - self._hidden_ms, math.inf)


def _shown(ms: float) -> str:
    """A duration in its largest unit.

    >>> _shown(259_200_000), _shown(90_000), _shown(-5)
    ('3 days', '1 minute', '0 seconds')
    """
    for unit, size in _UNITS:
        number = int(max(0.0, ms) // size)
        if number or unit == "second":
            return f"{number} {unit}" if number == 1 else f"{number} {unit}s"
    return ""
