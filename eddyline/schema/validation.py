"""Validation of records of `clicks`, `items` and `users`: the codec, and the partition of a record.

One rule for ingest, the archive, the trainer, the replay of dead letters and `eddyline replay`.
Deduplication of valid clicks is `eddyline.schema.deduplication`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar

import msgspec

from eddyline.errors import Rejected, SettingsError
from eddyline.schema import events, partial
from eddyline.schema.events import Click, Forget, Item, ItemPatch, Merge, UserProfile
from eddyline.schema.id_form import in_form
from eddyline.schema.mapping import mapper, registry
from eddyline.schema.mapping.mapper import Mapper
from eddyline.schema.partial import Omitted
from eddyline.schema.partitioning import partition_of, partition_of_bytes
from eddyline.schema.records import MAPPED, Record, mark_of
from eddyline.settings.loader import Settings

UserEvent = Click | Merge | Forget
# A record of `items`; None deletes the item.
ItemEvent = Item | ItemPatch | None
_T = TypeVar("_T", Item, ItemPatch, UserProfile)


def user_event(
    settings: Settings,
    partition: int,
    value: bytes | None,
    appended_ms: int,
    origin_ms: int | None = None,
) -> tuple[UserEvent, bool]:
    """(event, whether it lies in its user's partition). Raises Rejected.

    An event outside its user's partition is stray: ingest forwards it, and it counts in its own
    partition. The key of the record is not read.
    appended_ms: the broker's time stamp; origin_ms: that of the first append, see
    `events.origin_ms`. It stands in for a time that is left out
    """
    _check_stamp(appended_ms)
    event = events.decode_user_event(
        value,
        appended_ms=appended_ms,
        far_future_ms_max=settings.far_future_ms_max,
        id_form=settings.id_form,
    )
    if isinstance(event, Forget):
        return event, partition_of(event.user_id, settings.clicks_partitions) == partition
    return _checked(settings, partition, event, appended_ms, origin_ms)


def _checked(
    settings: Settings,
    partition: int,
    event: Click | Merge,
    appended_ms: int,
    origin_ms: int | None,
) -> tuple[Click | Merge, bool]:
    """As `user_event`, of a decoded event: its time and its user."""
    if not event.at_ms:
        event = msgspec.structs.replace(
            event, at_ms=appended_ms if origin_ms is None else origin_ms
        )
    elif event.at_ms < settings.at_ms_min and not (
        isinstance(event, Click) and events.is_moved(event)
    ):
        raise _too_early(event.at_ms, settings)
    _check_user(settings, "user_id", event.user_id)
    if isinstance(event, Merge):
        _check_user(settings, "merge_into", event.merge_into)
    return event, partition_of(event.user_id, settings.clicks_partitions) == partition


def item(
    settings: Settings,
    partition: int | None,
    key: bytes | None,
    value: bytes | None,
    appended_ms: int,
    omitted: Omitted | None = None,
    patches: bool = False,
) -> tuple[str, ItemEvent, bool]:
    """(item id, item or patch; None deletes it, whether it lies in its partition). Raises Rejected.

    A record outside its partition is stray: ingest forwards it, and it counts in its own partition.
    So is one whose key is another spelling of the id (`id_form`): it counts under the id.
    partition:   of the record, None before it is sent
    appended_ms: the broker's time stamp
    omitted:     gets the bad optional parts, which are left out
    patches:     whether the value is a patch, see `carries_patches`
    """
    sent_id, item_id, own = _id_of(settings, "item", key, partition, settings.items_partitions)
    if value is None:
        events.id_in_form("item_id", sent_id, settings.id_form)
        return item_id, None, own  # a delete needs no time
    _check_stamp(appended_ms)
    limits: dict[str, Any] = {
        "key": sent_id,
        "appended_ms": appended_ms,
        "far_future_ms_max": settings.far_future_ms_max,
        "id_form": settings.id_form,
        "vector_dimension": settings.item_vector_dimension,
    }
    found: Item | ItemPatch
    if patches:
        found = _decoded(events.decode_patch, partial.patch, value, limits, omitted)
    else:
        found = _decoded(events.decode_item, partial.item, value, limits, omitted)
    if 0 < (at_ms := found.at_ms or 0) < settings.at_ms_min:
        raise _too_early(at_ms, settings)
    return item_id, found, own


def profile(
    settings: Settings,
    partition: int | None,
    key: bytes | None,
    value: bytes | None,
    appended_ms: int,
    omitted: Omitted | None = None,
) -> tuple[str, UserProfile | None, bool]:
    """(user id, profile; None forgets the user, whether it lies in its partition).

    Arguments and errors as for `item`.
    """
    sent_id, user_id, own = _id_of(settings, "user", key, partition, settings.clicks_partitions)
    _check_stamp(appended_ms)
    if value is None:
        events.id_in_form("user_id", sent_id, settings.id_form)
        return user_id, None, own
    limits: dict[str, Any] = {
        "key": sent_id,
        "appended_ms": appended_ms,
        "far_future_ms_max": settings.far_future_ms_max,
        "id_form": settings.id_form,
    }
    found = _decoded(events.decode_profile, partial.profile, value, limits, omitted)
    if 0 < found.at_ms < settings.at_ms_min:
        raise _too_early(found.at_ms, settings)
    _check_user(settings, "user_id", user_id)
    return user_id, found, own


def map_of(settings: Settings, topic: str) -> Mapper | None:
    """The map of `clicks`, `items` or `users`; None where records are in Eddyline's own format."""
    name = getattr(settings, f"{topic}_map")
    if not name:
        return None
    return mapper.of(name, topic, registry.access(settings) if settings.registry_url else None)


def carries_patches(settings: Settings) -> bool:
    """Whether records of `items` are patches, by the setting or the map."""
    return _are_patches(settings, map_of(settings, "items"))


def check_may_send(settings: Settings, topic: str) -> None:
    """Raise SettingsError for items whose partitions another system's producer decides on.

    topic: `clicks`, `items` or `users`, without prefix
    """
    found = map_of(settings, topic)
    if found is not None and found.by_key:
        raise SettingsError(
            f"items_map = {settings.items_map!r} has partition = 'key': only the producer of "
            f"{settings.prefixed(topic)} may write items"
        )


def own_records(settings: Settings, topic: str, record: Record) -> Sequence[Record]:
    """The records in Eddyline's own format that a record of a topic becomes. Raises Rejected.

    That is the record itself where the topic has no map, or the record has the mark.
    topic: `clicks`, `items` or `users`, without prefix
    """
    return _own_records(map_of(settings, topic), record)


def user_events(
    settings: Settings, record: Record, by_map: Mapper | None = None
) -> list[tuple[Record, UserEvent, bool]]:
    """(record in Eddyline's own format, event, whether it lies in its user's partition).

    Of any record of `clicks`; as `user_event` otherwise. Raises Rejected for the whole record.
    by_map: what `map_of` returns, of a caller that reads many records
    """
    found, partition = [], record.partition
    by_map = by_map or map_of(settings, "clicks")
    if by_map is not None and (click := by_map.click(record)) is not None:
        appended_ms, origin_ms = click.timestamp, events.origin_ms(click.headers)
        _check_stamp(appended_ms)
        events.check_time(click.event.at_ms, appended_ms, settings.far_future_ms_max)
        spelled = events.in_id_form(click.event, settings.id_form)
        return [(click, *_checked(settings, partition, spelled, appended_ms, origin_ms))]
    for one in _own_records(by_map, record):
        origin_ms = events.origin_ms(one.headers)
        event, here = user_event(settings, partition, one.value, one.timestamp, origin_ms)
        found.append((one, event, here))
    return found


def item_changes(
    settings: Settings, record: Record, omitted: Omitted | None = None
) -> list[tuple[str, ItemEvent, bool]]:
    """What `item` returns, of each change in any record of `items`. Raises Rejected.

    Where the map says that the producer's key decides on the partition, it is compared with that.
    """
    found = map_of(settings, "items")
    partition: int | None = record.partition
    patches = _are_patches(settings, found)
    if found is not None and found.by_key:
        partition = None
        if (mark := mark_of(record.headers)) is None:
            _check_key(settings, record)
        elif mark != MAPPED[1]:
            detail = "the map of items has partition = 'key': only its own producer may write items"
            raise Rejected("wrong_partition", "key", detail)
    return [
        item(settings, partition, one.key, one.value, one.timestamp, omitted, patches)
        for one in _own_records(found, record)
    ]


def named_items(settings: Settings, record: Record) -> list[tuple[str, bool]]:
    """(item id, whether the record lies in its partition) of each item that a record names.

    Of a record that `item_changes` refuses: as far as its key or the map shows an id.
    """
    found, partition = map_of(settings, "items"), record.partition
    named: list[tuple[str, bool]] = []
    with suppress(Rejected):
        keys = [record.key]
        if found is not None and mark_of(record.headers) is None:
            keys = [item_id.encode() for item_id in found.named(record)]
        if found is not None and found.by_key:
            _check_key(settings, record)
        for key in keys:
            place = None if found is not None and found.by_key else partition
            sent_id, item_id, own = _id_of(settings, "item", key, place, settings.items_partitions)
            events.id_in_form("item_id", sent_id, settings.id_form)
            named.append((item_id, own))
    return named


def profiles(
    settings: Settings, record: Record, omitted: Omitted | None = None
) -> list[tuple[str, UserProfile | None, bool]]:
    """What `profile` returns, of each change in any record of `users`. Raises Rejected."""
    return [
        profile(settings, record.partition, one.key, one.value, one.timestamp, omitted)
        for one in own_records(settings, "users", record)
    ]


def unsent(
    settings: Settings,
    topic: str,
    key: bytes | None,
    value: bytes | None,
    origin_ms: int | None = None,
) -> tuple[UserEvent | Item | ItemPatch | UserProfile | None, int]:
    """(event, its partition) of a record to be sent now; None is a delete. Raises Rejected.

    topic:     `clicks`, `items` or `users`, without prefix
    origin_ms: of the first append, as in `user_event`; None: it was not appended before
    """
    now_ms = time.time_ns() // 1_000_000
    if topic == "clicks":
        event, _ = user_event(settings, -1, value, now_ms, origin_ms)
        return event, partition_of(event.user_id, settings.clicks_partitions)
    if topic == "items":
        patches = carries_patches(settings)
        item_id, found, _ = item(settings, None, key, value, now_ms, patches=patches)
        return found, partition_of(item_id, settings.items_partitions)
    user_id, user, _ = profile(settings, None, key, value, now_ms)
    return user, partition_of(user_id, settings.clicks_partitions)


def _check_stamp(appended_ms: int) -> None:
    """Raise Rejected for a record without a time stamp: Kafka has -1 then."""
    if appended_ms < 0:
        detail = "the record has no time stamp: set message.timestamp.type=LogAppendTime"
        raise Rejected("no_timestamp", "", f"{detail} for its topic")


def unsent_record(
    settings: Settings, topic: str, record: Record
) -> list[tuple[UserEvent | Item | ItemPatch | UserProfile | None, int]]:
    """What `unsent` returns, of each event of a record that has its place in the topic."""
    return [
        unsent(settings, topic, one.key, one.value, events.origin_ms(one.headers))
        for one in own_records(settings, topic, record)
    ]


def _are_patches(settings: Settings, by_map: Mapper | None) -> bool:
    return settings.items_patches or (by_map is not None and by_map.patches)


def _own_records(by_map: Mapper | None, record: Record) -> Sequence[Record]:
    if by_map is None or mark_of(record.headers) is not None:
        return (record,)
    return by_map.records(record)


def _too_early(at_ms: int, settings: Settings) -> Rejected:
    detail = f"{at_ms} is before at_ms_min = {settings.at_ms_min}"
    if settings.at_ms_min <= at_ms * 1_000 <= events.AT_MS_MAX:
        detail += ": are these seconds? Milliseconds are expected"
    return Rejected("too_early", "at_ms", detail)


def _check_user(settings: Settings, field: str, user_id: str) -> None:
    """Raise Rejected where the id means no one: all such events would be one user's."""
    if _is_refused(user_id, settings.user_ids_refused):
        detail = f"{events.quote(user_id)} means no user: it is in user_ids_refused"
        raise Rejected("placeholder_id", field, detail)


@lru_cache(maxsize=65_536)
def _is_refused(user_id: str, user_ids: str) -> bool:
    return user_id.casefold() in _refused(user_ids)


@lru_cache(maxsize=8)
def _refused(user_ids: str) -> frozenset[str]:
    return frozenset(one.strip().casefold() for one in user_ids.split(",") if one.strip())


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


def _check_key(settings: Settings, record: Record) -> None:
    """Raise Rejected unless the record lies where Kafka's partitioner puts its key."""
    if record.key is None:
        raise Rejected("no_key", "key", "the record needs a key: it decides on the partition")
    own = partition_of_bytes(record.key, settings.items_partitions)
    if record.partition != own:
        detail = (
            f"{events.quote(record.key)} belongs to partition {own}: use Kafka's murmur2 "
            "partitioner"
        )
        raise Rejected("wrong_partition", "key", detail)


def _id_of(
    settings: Settings, kind: str, key: bytes | None, partition: int | None, partitions: int
) -> tuple[str, str, bool]:
    """(the id in the key, the id in its form, whether the record has its place). Raises Rejected.

    A record under another spelling has its place under the id in its form: compaction must see all
    records of an id as those of one key, or a delete would not remove the others.
    """
    found = events.decode_key(key)
    if found is None:
        raise Rejected("no_key", "key", f"the record needs its {kind}'s id as key")
    own = in_form(found, settings.id_form)
    has_place = own == found and partition == partition_of(own, partitions)
    return found, own, partition is None or has_place
