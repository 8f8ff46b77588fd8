"""Patches of items, as the load sends them: some fields, null for those that it removes."""

from __future__ import annotations

import json
import random
from typing import Any

from eddyline.schema.events import Item


def draw(rng: random.Random, item: Item, number: int, now_ms: int) -> bytes:
    """A patch of an item. Of a deleted item, it begins a new one only if it has title or labels.

    number: makes its values its own
    """
    fields: dict[str, Any] = {}
    some: dict[str, tuple[float, tuple[Any, ...]]] = {
        # A number is no title: it is left out, and the title stays.
        "title": (0.3, (f"{item.title} {number}", f"{item.title} {number}", None, 7)),
        "categories": (0.1, (list(item.categories),)),
        "tags": (0.2, ([*item.tags, f"t{number % 9}"], [], None)),
        "available": (0.2, (True, True, False, None)),
        "at_ms": (0.3, (now_ms,)),
    }
    for name, (share, values) in some.items():
        if rng.random() < share:
            fields[name] = rng.choice(values)
    if rng.random() < 0.6:
        values = (number, number / 2, f"text {number}", None, [number])
        fields["attributes"] = {
            name: rng.choice(values) for name in ("price", "year", "size") if rng.random() < 0.5
        }
    return json.dumps({"item_id": item.item_id, **fields}).encode()
