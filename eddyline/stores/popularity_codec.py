"""Popularity in Redis: keys and arguments of `count_clicks.lua`, and its reads.

The key schema is in `stores.redis`. They raise redis-py's errors; `stores.redis` translates them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, cast

import redis

from eddyline.schema.event_decay import EventDecay
from eddyline.stores.popularity import EventSums, PopularBucket, SlotTrend


def count_call(
    tag: str,
    counts: Mapping[int, Mapping[str, int]],
    buckets_kept: int,
    items_max: int,
    clicked: Sequence[str],
    decays: Sequence[EventDecay],
) -> tuple[list[str], list[Any]]:
    """Keys and arguments after those of the fence; see `StateStore.count_clicks`. tag: of the slot

    Keys name every key that grows: while a cluster moves the slot it refuses the whole script.
    """
    decays = [*dict.fromkeys(decays)]
    clicked = clicked if decays else ()
    keys = [f"{tag}:buckets", f"{tag}:trend"]
    keys += [_sums_key(tag, decay, parity) for decay in decays for parity in (0, 1)]
    keys += [f"{tag}:{kind}:{bucket}" for kind in ("popular", "version") for bucket in counts]
    slots = decays[0].item_slots if decays else 1
    args: list[Any] = [buckets_kept, f"{tag}:", items_max, slots, len(decays), len(clicked)]
    args += (decay.half_life_events for decay in decays)
    args += clicked
    for bucket, items in counts.items():
        args += (bucket, len(items), *chain.from_iterable(items.items()))
    return keys, args


def read_buckets(
    store: redis.Redis, tag: str, limit: int, known: Mapping[int, bytes]
) -> dict[int, PopularBucket]:
    """See `StateStore.popular_buckets`. tag: of the slot"""
    buckets = [int(b) for b in cast("list[bytes]", store.zrange(f"{tag}:buckets", 0, -1))]
    if not buckets:
        return {}
    # Read before the counts: a bucket that is written in between has another version next time.
    names = [f"{tag}:version:{bucket}" for bucket in buckets]
    stored = cast("list[bytes | None]", store.mget(names))
    found = {b: PopularBucket(v or b"") for b, v in zip(buckets, stored, strict=True)}
    changed = [bucket for bucket in buckets if known.get(bucket) != found[bucket].version]
    tops = _read_tops(store, [f"{tag}:popular:{bucket}" for bucket in changed], limit)
    for bucket, counts in zip(changed, tops, strict=True):
        found[bucket] = PopularBucket(found[bucket].version, counts)
    return found


def read_trend(
    store: redis.Redis, tag: str, decays: Sequence[EventDecay], limit: int, known: SlotTrend
) -> SlotTrend:
    """See `StateStore.popular_trend`. tag: of the slot"""
    # Read before the sums: what is written in between is read again next time.
    index = cast("list[tuple[bytes, float]]", store.zrange(f"{tag}:trend", 0, -1, withscores=True))
    written = {name.decode(): int(events) for name, events in index}
    events = written.get("events", 0)
    if events == known.events:
        return known
    kept = {part[:2]: part for part in known.parts} if events > known.events else {}
    parts: dict[tuple[EventDecay, int], EventSums | None] = {}
    for decay in dict.fromkeys(decays):
        if last := written.get(str(decay.half_life_events)):
            epoch = decay.epoch(last - 1)
            parts[decay, epoch] = None
            if epoch:
                # It had ended before the last read, so it is the same.
                ended = decay.epoch(known.events - 1) == epoch
                parts[decay, epoch - 1] = kept.get((decay, epoch - 1)) if ended else None
    missing = [at for at, part in parts.items() if part is None]
    tops = _read_tops(store, [_sums_key(tag, decay, epoch) for decay, epoch in missing], limit)
    for at, (items, sums) in zip(missing, tops, strict=True):
        parts[at] = EventSums(*at, items, sums)
    return SlotTrend(events, tuple(part for part in parts.values() if part is not None))


def _sums_key(tag: str, decay: EventDecay, epoch: int) -> str:
    return f"{tag}:trend:{decay.half_life_events}:{epoch % 2}"


def _read_tops(
    store: redis.Redis, keys: Sequence[str], limit: int
) -> list[tuple[list[bytes], list[float]]]:
    """(members, scores) of each sorted set, most first."""
    pipe: Any = store.pipeline(transaction=False)
    with pipe:
        for key in keys:
            # Raw, item and count in turn: redis-py's pairs cost three times as much.
            pipe.execute_command("ZREVRANGE", key, 0, limit - 1, "WITHSCORES")
        return [(answer[::2], [*map(float, answer[1::2])]) for answer in pipe.execute()]
