"""Popularity that decays by events: what an event weighs, and the epochs that bound the sums.

An item slot numbers the events that count for its items: 0, 1, 2, …. Every `half_life` further
events halve the weight of an event. A stored sum never decays itself (forward decay, Cormode et al.
2009): event number t of an epoch that begins at b adds 2^((t − b) / half-life) to its item, and a
reader scales the sums. An epoch has 32 half-lives, so a weight is below 2^32. The current and the
previous epoch are kept: an event that is left out weighs less than 2^-32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from eddyline.settings.loader import Settings

EPOCH_HALF_LIVES = 32


class EventDecay(NamedTuple):
    """One half-life.

    half_life_events: of all slots together, as in the settings; item_slots: number of slots

    >>> decay = EventDecay(10, item_slots=2)
    >>> decay.half_life, decay.epoch_events, decay.epoch(160), decay.weight(165)
    (5.0, 160.0, 1, 2.0)
    >>> decay.scale(166, 1) * decay.weight(165), decay.scale(171, 1) * decay.weight(165)
    (1.0, 0.5)
    """

    half_life_events: int
    item_slots: int = 1

    @property
    def half_life(self) -> float:
        """Events of one slot."""
        return self.half_life_events / self.item_slots

    @property
    def epoch_events(self) -> float:
        """Events of one slot in an epoch."""
        return EPOCH_HALF_LIVES * self.half_life

    def epoch(self, number: int) -> int:
        """The epoch of an event of one slot."""
        return math.floor(number / self.epoch_events)

    def weight(self, number: int) -> float:
        """What the event adds to the sum of its item in its epoch."""
        return float(2.0 ** ((number - self.epoch(number) * self.epoch_events) / self.half_life))

    def scale(self, events: int, epoch: int) -> float:
        """The factor of an epoch's sums after so many events: the newest one weighs 1."""
        return float(2.0 ** ((epoch * self.epoch_events - events + 1) / self.half_life))


def decays(settings: Settings) -> tuple[EventDecay, EventDecay]:
    """(fast, slow). They may be equal."""
    return (
        EventDecay(settings.popular_fast_half_life_events, settings.item_slots),
        EventDecay(settings.popular_slow_half_life_events, settings.item_slots),
    )
