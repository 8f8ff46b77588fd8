"""Clients of Redis connect at their first command."""

from __future__ import annotations

import pytest
from redis import exceptions

from eddyline.settings.loader import Settings
from eddyline.stores import redis_client


def test_nothing_is_connected_before_the_first_command() -> None:
    for url, cluster in (("redis://127.0.0.1:1", False), ("redis://127.0.0.1:1,127.0.0.1:2", True)):
        client = redis_client.client(Settings(redis_url=url, redis_cluster=cluster))
        with pytest.raises(exceptions.ConnectionError):
            client.get("key")
        client.close()
