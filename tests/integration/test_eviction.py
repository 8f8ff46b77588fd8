"""Redis that may evict keys after a change of its configuration, under a running ingest."""

from __future__ import annotations

import contextlib

import pytest

from eddyline.stores import redis_client
from tests.integration.conftest import OwnServers

pytestmark = pytest.mark.timeout(120)


def test_ingest_ends_when_redis_may_evict_keys(make_live, own_valkey: OwnServers) -> None:
    live = make_live(own_valkey, with_worker=False)
    log = live.supervisor.log_file("ingest")
    with contextlib.closing(redis_client.client(live.settings)) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        live.wait_for(
            "ingest to refuse it",
            lambda: "has maxmemory-policy allkeys-lru" in log.read_text(encoding="utf-8"),
            30,
        )
        client.config_set("maxmemory-policy", "noeviction")
