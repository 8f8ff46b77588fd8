"""What a store knows of popularity: buckets of event time, and sums that decay by events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from eddyline.schema.event_decay import EventDecay


@dataclass(frozen=True, slots=True)
class PopularBucket:
    """The top items of one popularity bucket.

    version: changes with every write; b"" if an older version of ingest wrote the bucket last
    counted: (UTF-8 of item ids, their thousandths of a click), most first; None: not read, since
             the caller knows this version
    """

    version: bytes
    counted: tuple[Sequence[bytes], Sequence[float]] | None = None


class EventSums(NamedTuple):
    """The top items of one epoch of a half-life, in any order.

    items: UTF-8 of item ids; sums: of weights, see `schema.event_decay`
    """

    decay: EventDecay
    epoch: int
    items: Sequence[bytes]
    sums: Sequence[float]


class SlotTrend(NamedTuple):
    """Popularity of a slot's items that decays by events.

    events: that were counted in the slot
    parts:  the current and the previous epoch of each half-life; empty ones may be absent
    """

    events: int = 0
    parts: tuple[EventSums, ...] = ()


# What is known of a slot that was never read.
NO_TREND = SlotTrend()
