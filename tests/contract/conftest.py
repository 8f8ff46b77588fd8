"""Every `StateStore`: a new adapter is one more parameter here."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import msgspec
import pytest

from eddyline.stores.memory import MemoryStore
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import StateStore


@pytest.fixture(params=["memory", "redis", "cluster"])
def store(request: pytest.FixtureRequest) -> Iterator[StateStore]:
    """An empty store."""
    if request.param == "memory":
        made: StateStore = MemoryStore()
    elif request.param == "cluster":
        settings = request.getfixturevalue("cluster_settings")
        made = RedisStore(msgspec.structs.replace(settings, namespace=f"t-{uuid.uuid4().hex[:12]}"))
    else:
        made = RedisStore(request.getfixturevalue("fresh_settings"))
    yield made
    made.close()
