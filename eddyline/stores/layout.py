"""How settings cut the state: the layout, and its version."""

from __future__ import annotations

from eddyline.settings.loader import Settings
from eddyline.stores.state_store import Layout

# Counts up when keys in Redis or records in our topics change their meaning.
LAYOUT_VERSION = 2


def layout(settings: Settings) -> Layout:
    """How these settings cut the state."""
    return Layout(
        LAYOUT_VERSION, settings.clicks_partitions, settings.items_partitions, settings.item_slots
    )
