"""Every setting that the stored numbers depend on is part of the layout."""

from __future__ import annotations

import msgspec
import pytest

from eddyline.settings.loader import Settings
from eddyline.stores.layout import layout


@pytest.mark.parametrize(
    "name", ["clicks_partitions", "items_partitions", "item_slots", "popular_bucket_s"]
)
def test_a_setting_that_gives_the_state_its_meaning_is_in_the_layout(name: str) -> None:
    base = Settings()
    changed = msgspec.structs.replace(base, **{name: getattr(base, name) + 1})
    assert layout(changed) != layout(base)
    assert getattr(layout(changed), name) == getattr(base, name) + 1
