"""Popularity decayed by events, in plain arithmetic: one number an item, halved step by step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from eddyline.schema.event_decay import EventDecay
from eddyline.stores.popularity import SlotTrend
from eddyline.stores.state_store import StateStore

# More than any slot counts.
ALL = 2**31 - 1
# A half-life of so many events, the longest one, decays nothing that a test can count.
NO_DECAY = 10**15


def decayed(items: Iterable[str], half_life: float) -> dict[str, float]:
    """Item -> its sum after these events, the newest of which weighs 1."""
    sums: dict[str, float] = {}
    for item in items:
        for other in sums:
            sums[other] *= 0.5 ** (1 / half_life)
        sums[item] = sums.get(item, 0.0) + 1.0
    return sums


def sums_of(trend: SlotTrend, decay: EventDecay) -> dict[str, float]:
    """The same of what a store answers."""
    sums: dict[str, float] = {}
    for part in trend.parts:
        if part.decay == decay:
            for item, total in zip(part.items, part.sums, strict=True):
                more = total * decay.scale(trend.events, part.epoch)
                sums[item.decode()] = sums.get(item.decode(), 0.0) + more
    return sums


def stored_counts(store: StateStore, slot: str, decays: Iterable[EventDecay]) -> dict[str, int]:
    """What a slot counts, in numbers that no order of the partitions changes.

    "events" -> the events of the slot, and for a half-life that is too long to decay anything
    item -> its events
    """
    wanted = [decay for decay in dict.fromkeys(decays) if decay.half_life_events >= NO_DECAY]
    trend = store.popular_trend(slot, wanted, ALL)
    counts = {
        f"item {item}": round(total)
        for decay in wanted
        for item, total in sums_of(trend, decay).items()
    }
    return {"events": trend.events, **counts} if trend.events else {}


def plain_counts(
    items: Mapping[str, int], decays: Iterable[EventDecay] = (EventDecay(NO_DECAY),)
) -> dict[str, int]:
    """The same of a plain count: item -> its events."""
    kept = any(decay.half_life_events >= NO_DECAY for decay in decays)
    named = {f"item {item}": n for item, n in items.items()} if kept else {}
    return {"events": sum(items.values()), **named} if items else {}
