"""The page on operations names every metric of ingest, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from aiokafka import TopicPartition
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from eddyline.kafka.unreadable import UnreadableBatch
from eddyline.schema.partial import Omitted
from eddyline.stores.memory import MemoryStore
from streams.clicks.user_cache import UserCache
from streams.dispatcher import HandlerThread, TopicPipeline
from streams.metrics import IngestCollector
from streams.ports import Outcome

PAGE = Path(__file__).parents[3] / "docs" / "operations.md"


def test_the_page_names_every_metric_and_no_other() -> None:
    handler: Any = SimpleNamespace(omitted=Omitted({("attributes", "null"): 4}))
    pipeline = TopicPipeline(
        "shop.clicks", handler, HandlerThread("clicks"), outcome=Outcome(records=3, applied=2)
    )
    app: Any = SimpleNamespace(
        pipelines=[pipeline],
        paused=lambda: {"shop.clicks": 1},
        queued=lambda: {"shop.clicks": 5},
        lag=lambda: {TopicPartition("shop.clicks", 3): 7},
        stopped=lambda: [UnreadableBatch("shop.clicks", 4, 9, 9, 9, "codec", "unknown", b"")],
    )
    registry = CollectorRegistry()
    ended: Any = SimpleNamespace(removed=6)
    idle: Any = SimpleNamespace(removed=8)
    deleted: Any = SimpleNamespace(removed=9)
    cache = UserCache(MemoryStore(), ["1"], 10)
    visits: Any = SimpleNamespace(lost=10)
    registry.register(IngestCollector(app, cache, ended, idle, deleted, visits, lambda: 8))
    text = generate_latest(registry).decode()
    pipeline.thread.close()
    served = set(re.findall(r"^(eddyline_\w+)", text, re.MULTILINE))
    assert served == set(re.findall(r"eddyline_ingest_\w+", PAGE.read_text(encoding="utf-8")))
    assert 'eddyline_ingest_lag_records{partition="3",topic="shop.clicks"} 7.0' in text
    assert 'eddyline_ingest_records_total{outcome="applied",topic="shop.clicks"} 2.0' in text
    assert 'eddyline_ingest_queued_chunks{topic="shop.clicks"} 5.0' in text
    assert 'eddyline_ingest_paused_partitions{topic="shop.clicks"} 1.0' in text
    assert "eddyline_ingest_ended_embeddings_removed_total 6.0" in text
    assert "eddyline_ingest_items_refused 8.0" in text
    assert "eddyline_ingest_idle_users_removed_total 8.0" in text
    assert "eddyline_ingest_deleted_items_removed_total 9.0" in text
    assert "eddyline_ingest_co_visits_lost_offsets_total 10.0" in text
    stopped = 'eddyline_ingest_partition_stopped{partition="4",reason="codec",topic="shop.clicks"} '
    assert f"{stopped}1.0" in text
    left_out = 'eddyline_ingest_omitted_parts_total{part="attributes",reason="null",topic='
    assert f'{left_out}"shop.clicks"}} 4.0' in text
