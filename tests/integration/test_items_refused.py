"""Refused records of items that are newer than what is shown: listed, counted, hidden if so set."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
import pytest

from cli.commands import items as commands_items
from eddyline.kafka import topics
from eddyline.kafka.producers import now_ms
from eddyline.schema.events import Item
from eddyline.stores.redis import RedisStore
from serving.proto import retrieval_pb2 as pb

pytestmark = pytest.mark.timeout(180)


def listed(live: Any, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    commands_items.refused(live.settings, limit=100)
    return capsys.readouterr().out


def shown(live: Any, item_id: str) -> bool:
    return bool(live.client().retrieve("nobody", 3, filters=pb.Filters(allow=[item_id])).items)


def refuse(live: Any, item_id: str) -> str:
    """Send a record whose availability cannot be read; its coordinates."""
    value = msgspec.json.encode({"item_id": item_id, "title": "new", "available": "sold"})
    partition, offset = live.raw(topics.ITEMS, value, key=item_id.encode())
    return f"{live.settings.prefixed(topics.ITEMS)}/{partition}/{offset}"


def test_they_are_listed_with_what_is_shown(live, capsys) -> None:
    item_id = f"refused-{uuid.uuid4().hex[:8]}"
    live.item(Item(item_id=item_id, title="old", categories=["c"], at_ms=now_ms()))
    at = refuse(live, item_id)
    live.applied()
    live.wait_for("the list", lambda: item_id in listed(live, capsys))
    lines = listed(live, capsys).splitlines()
    number = next(n for n, line in enumerate(lines) if line.startswith(item_id))
    assert lines[number] == f"{item_id}  {at}  bad_field"
    assert '"title":"old"' in lines[number + 1] and shown(live, item_id)
    store = RedisStore(live.settings)
    assert store.count_refused_items(["i0"]) >= 1
    # Of the log, compaction would keep the refused record alone: what is shown follows it.
    values = [r.value for r in live.read(topics.ITEMS) if r.key == item_id.encode()]
    assert b'"old"' in values[-1] and len(values) == 3
    live.item(Item(item_id=item_id, title="good", categories=["c"], at_ms=now_ms()))
    live.wait_for("the end of it", lambda: item_id not in listed(live, capsys))
    store.close()


def test_they_are_hidden_over_a_crash_until_a_good_record_comes(make_live, capsys) -> None:
    live = make_live(hide_refused_items="true")
    item_id = live.dataset.items[0].item_id
    live.wait_for("the item", lambda: shown(live, item_id))
    refuse(live, item_id)
    live.wait_for("the refused item to go", lambda: not shown(live, item_id))
    live.kill("ingest")
    live.wait_for("the list", lambda: "shown: nothing" in listed(live, capsys))
    live.applied(60)
    assert not shown(live, item_id)
    live.item(msgspec.structs.replace(live.dataset.items[0], title="good"))
    live.wait_for("the item to be back", lambda: shown(live, item_id), 30)
    live.wait_for("the end of it", lambda: item_id not in listed(live, capsys))
