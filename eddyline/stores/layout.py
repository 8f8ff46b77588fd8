"""The layout of the state: what its numbers and names mean, and the version of its format.

The key schema is in `stores.redis`, the bytes of a history in `schema.user_history`.
"""

from __future__ import annotations

from eddyline.settings.loader import Settings
from eddyline.stores.state_store import Layout

# Increases when keys in Redis or records in our topics change their meaning.
LAYOUT_VERSION = 3


def layout(settings: Settings) -> Layout:
    """The layout of these settings."""
    return Layout(
        LAYOUT_VERSION,
        settings.clicks_partitions,
        settings.items_partitions,
        settings.item_slots,
        settings.popular_bucket_s,
        settings.id_form,
    )
