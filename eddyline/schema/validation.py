"""Which records of clicks, items and users are accepted: the codec, and the place where a record may lie.

One rule for whoever reads a topic. Whether an accepted click is a re-send is for `eddyline.schema.deduplication`.
"""

from __future__ import annotations

from eddyline.errors import Rejected
from eddyline.schema import events
from eddyline.schema.events import Click, Forget, Item, Merge, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings


def user_event(
    settings: Settings, partition: int, value: bytes | None, appended_ms: int
) -> Click | Merge | None:
    """The click or merge, or None where it is stray: ingest forwards it, and it counts in its own partition.

    None, too, where it says that a user was forgotten: who reads `users` knows.
    appended_ms: the broker's time stamp. Raises Rejected.
    """
    found = events.decode_user_event(
        value, appended_ms=appended_ms, far_future_ms_max=settings.far_future_ms_max
    )
    if (
        isinstance(found, Forget)
        or partition_of(found.user_id, settings.clicks_partitions) != partition
    ):
        return None
    return found


def item(
    settings: Settings, partition: int, key: bytes | None, value: bytes | None, appended_ms: int
) -> tuple[str, Item | None]:
    """(item id, the whole item; None deletes it). Raises Rejected."""
    item_id = _placed(key, "item", partition, settings.items_partitions)
    if value is None:
        events.check_id("item_id", item_id)
        return item_id, None
    found = events.decode_item(
        value,
        key=item_id,
        appended_ms=appended_ms,
        far_future_ms_max=settings.far_future_ms_max,
        vector_dimension=settings.item_vector_dimension,
    )
    return item_id, found


def profile(
    settings: Settings, partition: int, key: bytes | None, value: bytes | None, appended_ms: int
) -> tuple[str, UserProfile | None]:
    """(user id, his whole profile; None forgets him). Raises Rejected."""
    user_id = _placed(key, "user", partition, settings.clicks_partitions)
    if value is None:
        events.check_id("user_id", user_id)
        return user_id, None
    found = events.decode_profile(
        value, key=user_id, appended_ms=appended_ms, far_future_ms_max=settings.far_future_ms_max
    )
    return user_id, found


def _placed(key: bytes | None, kind: str, partition: int, partitions: int) -> str:
    found = events.decode_key(key)
    if found is None:
        raise Rejected("no_key", "key", f"the record needs its {kind}'s id as key")
    own = partition_of(found, partitions)
    if own != partition:
        detail = (
            f"{events.quote(found)} belongs to partition {own}: use Kafka's murmur2 partitioner"
        )
        raise Rejected("wrong_partition", "key", detail)
    return found
