"""Validation of records of `clicks`, `items` and `users`: the codec, and the partition of a record.

One rule for ingest, the archive, the trainer, the replay of dead letters and `eddyline replay`.
Deduplication of valid clicks is `eddyline.schema.deduplication`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from eddyline.errors import Rejected
from eddyline.schema import events, partial
from eddyline.schema.events import Click, Forget, Item, Merge, UserProfile
from eddyline.schema.partial import Omitted
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings

UserEvent = Click | Merge | Forget
_T = TypeVar("_T", Item, UserProfile)


def user_event(
    settings: Settings, partition: int, value: bytes | None, appended_ms: int
) -> tuple[UserEvent, bool]:
    """(event, whether it lies in its user's partition). Raises Rejected.

    An event outside its user's partition is stray: ingest forwards it, and it counts in its own
    partition. The key of the record is not read. appended_ms: the broker's time stamp.
    """
    event = events.decode_user_event(
        value, appended_ms=appended_ms, far_future_ms_max=settings.far_future_ms_max
    )
    return event, partition_of(event.user_id, settings.clicks_partitions) == partition


def item(
    settings: Settings,
    partition: int | None,
    key: bytes | None,
    value: bytes | None,
    appended_ms: int,
    omitted: Omitted | None = None,
) -> tuple[str, Item | None]:
    """(item id, item; None deletes the item). Raises Rejected.

    partition: of the record, None before it is sent; appended_ms: the broker's time stamp
    omitted:   gets the bad optional parts, which are left out
    """
    item_id = _id_of("item", key, partition, settings.items_partitions)
    if value is None:
        events.check_id("item_id", item_id)
        return item_id, None
    limits: dict[str, Any] = {
        "key": item_id,
        "appended_ms": appended_ms,
        "far_future_ms_max": settings.far_future_ms_max,
        "vector_dimension": settings.item_vector_dimension,
    }
    return item_id, _decoded(events.decode_item, partial.item, value, limits, omitted)


def profile(
    settings: Settings,
    partition: int | None,
    key: bytes | None,
    value: bytes | None,
    appended_ms: int,
    omitted: Omitted | None = None,
) -> tuple[str, UserProfile | None]:
    """(user id, profile; None forgets the user). Arguments and errors as for `item`."""
    user_id = _id_of("user", key, partition, settings.clicks_partitions)
    if value is None:
        events.check_id("user_id", user_id)
        return user_id, None
    limits: dict[str, Any] = {
        "key": user_id,
        "appended_ms": appended_ms,
        "far_future_ms_max": settings.far_future_ms_max,
    }
    return user_id, _decoded(events.decode_profile, partial.profile, value, limits, omitted)


def unsent(
    settings: Settings, topic: str, key: bytes | None, value: bytes | None
) -> tuple[UserEvent | Item | UserProfile | None, int]:
    """(event, its partition) of a record to be sent now; None is a delete. Raises Rejected.

    topic: `clicks`, `items` or `users`, without prefix
    """
    now_ms = time.time_ns() // 1_000_000
    if topic == "clicks":
        event, _ = user_event(settings, -1, value, now_ms)
        return event, partition_of(event.user_id, settings.clicks_partitions)
    if topic == "items":
        item_id, found = item(settings, None, key, value, now_ms)
        return found, partition_of(item_id, settings.items_partitions)
    user_id, user = profile(settings, None, key, value, now_ms)
    return user, partition_of(user_id, settings.clicks_partitions)


def _decoded(
    strictly: Callable[..., _T],
    partially: Callable[..., _T],
    value: bytes,
    limits: Mapping[str, Any],
    omitted: Omitted | None,
) -> _T:
    """The record by the strict decoder; if an optional part may be bad, without such parts."""
    try:
        return strictly(value, **limits)
    except Rejected as first:
        if first.reason not in partial.CURABLE:
            raise
        counts = Omitted() if omitted is None else omitted
        return partially(value, first, counts, **limits)


def _id_of(kind: str, key: bytes | None, partition: int | None, partitions: int) -> str:
    found = events.decode_key(key)
    if found is None:
        raise Rejected("no_key", "key", f"the record needs its {kind}'s id as key")
    own = partition_of(found, partitions)
    if partition is not None and partition != own:
        detail = (
            f"{events.quote(found)} belongs to partition {own}: use Kafka's murmur2 partitioner"
        )
        raise Rejected("wrong_partition", "key", detail)
    return found
