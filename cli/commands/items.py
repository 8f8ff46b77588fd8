"""`eddyline items`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from cli.commands.dead_letters import printable
from cli.console import console
from eddyline.schema.partitioning import item_slots
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import ItemMetadata, StateStore

# The shown part of an item.
_SHOWN_BYTES = 500


def refused(settings: Settings, *, limit: int) -> None:
    """Print items with a refused record that is newer than their state. Raises StoreUnavailable."""
    store = RedisStore(settings)
    try:
        for item_id, item in islice(_refused(settings, store), limit):
            if (one := item.refused) is None:
                continue
            at = f"{settings.prefixed('items')}/{one.partition}/{one.offset}"
            console.print(printable(f"{item_id}  {at}  {one.reason}".encode(), _SHOWN_BYTES))
            shown = "nothing: the item is hidden" if one.hidden else _shown(item)
            console.print(f"  shown: {shown}")
        count = store.count_refused_items(item_slots(settings.item_slots))
        console.print(f"{count:,} items have a refused record that is newer than what is shown")
    finally:
        store.close()


def _refused(settings: Settings, store: StateStore) -> Iterator[tuple[str, ItemMetadata]]:
    seen = set[str]()
    for slot in item_slots(settings.item_slots):
        for page in store.refused_items(slot):
            new = [item_id for item_id in page if item_id not in seen]
            seen.update(new)
            yield from store.read_item_metadata(new, settings.item_slots).items()


def _shown(item: ItemMetadata) -> str:
    return f"offset {item.offset}, {printable(item.body, _SHOWN_BYTES)}"
