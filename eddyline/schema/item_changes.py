"""What an item is after a change: the rule of ingest and of the trainer.

A record of `items` is the whole item. One that lacks the title or every category of an item that
has some was most likely meant as a part of it, so it is refused.
"""

from __future__ import annotations

import msgspec

from eddyline.errors import Rejected
from eddyline.schema.events import Item

# The fields that no record may empty: without them no tower and no reader knows what the item is.
_KEPT = ("title", "categories")


def may_empty(item: Item | None) -> bool:
    """Whether what the item was before decides on the change."""
    return item is not None and not (item.title and item.categories)


def resulting(before: Item | None, item: Item) -> Item:
    """The item after a whole record. before: None for a new or a deleted item

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
