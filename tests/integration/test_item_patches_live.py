"""Patches of items on real servers: over a crash, an emptied Redis and a topic that loses them."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from kafka.admin import ConfigResource, ConfigResourceType

from eddyline.kafka import reading, topic_checks, topics
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from serving.proto import retrieval_pb2 as pb
from streams.operations.state_replay import remove_namespace

pytestmark = pytest.mark.timeout(300)


def test_patches_hold_exactly_once_and_in_order(fresh_settings: Settings, make_live: Any) -> None:
    patched = msgspec.structs.replace(fresh_settings, items_patches=True)
    live = make_live(SimpleNamespace(settings=patched), items_patches="true")
    assert [f for f in topic_checks.check_topics(live.settings) if "items" in f.topic] == []
    item_id, store = f"patched-{uuid.uuid4().hex[:8]}", RedisStore(live.settings)
    live.opened.callback(store.close)

    def send(**fields: Any) -> None:
        value = msgspec.json.encode({"item_id": item_id, **fields})
        live.raw(topics.ITEMS, value, key=item_id.encode())

    def state() -> dict[str, Any]:
        found = store.read_item_metadata([item_id], 1).get(item_id)
        return {} if found is None else msgspec.json.decode(found.body)

    def shown(price: int) -> bool:
        match = pb.Filters(allow=[item_id], ranges=[_range("price", price)])
        return bool(live.client().retrieve("nobody", 3, filters=match).items)

    send(attributes={"price": 1})  # of nothing
    send(title="t", categories=["c"], attributes={"price": 1, "seen": 0})
    for n in range(1, 40):
        send(attributes={"price": n, f"n{n % 7}": n})
        if n == 20:
            live.kill("ingest")
    send(attributes={"seen": None}, title="u")
    live.applied(60)
    want = {"price": 39} | {f"n{n % 7}": n for n in range(1, 40)}
    live.wait_for("the last patch", lambda: state().get("title") == "u", 30)
    assert state()["attributes"] == want and state()["categories"] == ["c"]
    live.wait_for("the price in the answers", lambda: shown(39))
    assert not shown(38)
    letters = reading.read(live.settings, topics.DEAD_LETTERS)
    # A killed ingest may write a letter again, under the same coordinates.
    assert [*{r.key: dict(r.headers)["reason"] for r in letters}.values()] == [b"no_base"]

    before = state()
    remove_namespace(live.settings, live.settings.namespace)
    live.kill("ingest")
    live.wait_for("Redis to be filled again", lambda: state() == before, 60)

    with topics.open_admin(live.settings) as admin:
        name = live.settings.prefixed(topics.ITEMS)
        compact = {"cleanup.policy": "compact"}
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, configs=compact)])
    findings = live.wait_for("the finding", lambda: topic_checks.check_topics(live.settings))
    assert any("it carries patches" in str(one) for one in findings)


def _range(name: str, price: int) -> Any:
    return pb.Range(attribute=name, min=price, max=price)
