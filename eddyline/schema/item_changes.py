"""What an item is after a change: the rule of ingest and of the trainer (ADR 27).

A record of `items` is the whole item, or a patch where the settings or the map say so. A whole
record that lacks the title or every category of an item that has some was most likely meant as a
part of it, so it is refused.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET

from eddyline.errors import Rejected
from eddyline.schema.events import ATTRIBUTES_MAX, Item, ItemPatch, quote

# The fields that no record may empty: without them no tower and no reader knows what the item is.
_KEPT = ("title", "categories")
# A patch with one of these may be the first record of an item.
_BEGINS = ("title", "categories", "tags", "vector")
# What null sets a field to.
_EMPTY: dict[str, Any] = {"title": "", "categories": [], "tags": [], "vector": None}


def may_empty(item: Item | None) -> bool:
    """Whether what the item was before decides on the change."""
    return item is not None and not (item.title and item.categories)


def resulting(before: Item | None, change: Item | ItemPatch, refuse_emptied: bool) -> Item:
    """The item after a record. before: None for a new or a deleted item

    Raises Rejected (`would_empty`, `no_base`, `too_many_attributes`).
    """
    if isinstance(change, ItemPatch):
        return patched(before, change)
    return whole(before, change) if refuse_emptied else change


def whole(before: Item | None, item: Item) -> Item:
    """The item after a whole record.

    An unavailable item is in no answer, so a record that says so applies in any case; it keeps the
    title and the categories. Raises Rejected (`would_empty`).
    """
    if before is None:
        return item
    emptied = [name for name in _KEPT if getattr(before, name) and not getattr(item, name)]
    if not emptied:
        return item
    if not item.available:
        return msgspec.structs.replace(item, **{name: getattr(before, name) for name in emptied})
    raise Rejected(
        "would_empty",
        emptied[0],
        f"the item has {' and '.join(emptied)}, the record has none: is it a part of the item "
        "(items_patches)? refuse_emptied_items = false accepts it",
    )


def patched(before: Item | None, patch: ItemPatch) -> Item:
    """The item after a patch: idempotent, but patches of one item do not commute.

    Raises Rejected: `no_base` for a patch of an item that is not there, unless it has a title,
    labels or a vector; `too_many_attributes`.
    """
    if before is None:
        if not any(getattr(patch, name) for name in _BEGINS):
            detail = (
                f"{quote(patch.item_id)} is unknown or deleted, and the patch has no "
                f"{' or '.join(_BEGINS)}: its first record may be lost"
            )
            raise Rejected("no_base", "item_id", detail)
        before = Item(item_id=patch.item_id)
    changed: dict[str, Any] = {}
    for name, empty in _EMPTY.items():
        if (value := getattr(patch, name)) is not UNSET:
            changed[name] = empty if value is None else value
    for name in ("available", "at_ms"):
        if (value := getattr(patch, name)) is not UNSET:
            changed[name] = value
    if patch.attributes is None:
        changed["attributes"] = {}
    elif patch.attributes is not UNSET:
        merged = {**before.attributes, **patch.attributes}
        changed["attributes"] = {n: value for n, value in merged.items() if value is not None}
        if len(changed["attributes"]) > ATTRIBUTES_MAX:
            detail = f"the item would have more than {ATTRIBUTES_MAX}"
            raise Rejected("too_many_attributes", "attributes", detail)
    return msgspec.structs.replace(before, **changed)
