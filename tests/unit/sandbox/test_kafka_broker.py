"""What `eddyline up` tells Kafka's own tools."""

from __future__ import annotations

import uuid

import pytest

from sandbox.servers import kafka_broker


def test_a_cluster_id_never_looks_like_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([uuid.UUID(int=0xF8 << 120), uuid.UUID(int=0xF9 << 120), uuid.UUID(int=5)])
    monkeypatch.setattr(uuid, "uuid4", lambda: next(drawn))
    assert kafka_broker.new_cluster_id() == "AAAAAAAAAAAAAAAAAAAABQ"
    assert next(drawn, None) is None


def test_a_cluster_id_is_sixteen_bytes_in_url_safe_letters() -> None:
    assert all(len(kafka_broker.new_cluster_id()) == 22 for _ in range(100))
