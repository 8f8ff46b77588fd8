"""The bench's pipeline that only decodes keeps the port of real ones."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from benchmarks.ingest_peers import _Decode
from eddyline.schema.events import Click, encode
from eddyline.settings.loader import Settings
from streams.dispatcher import BatchDispatcher, HandlerThread, TopicPipeline
from streams.ports import Outcome
from tests.applying import batch_of


def test_it_opens_at_the_beginning_and_decodes_every_record() -> None:
    async def run() -> None:
        counted: list[int] = []
        meter: Any = type("Meter", (), {"add": lambda self, events: counted.append(events)})()
        pipeline = TopicPipeline("clicks", _Decode(Settings(), meter), HandlerThread("decode"))
        assert await pipeline.open({0: (3, 9), 1: (0, 0)}, {}) == {0: 3, 1: 0}
        click = encode(Click(user_id="u", item_id="i", at_ms=1_700_000_000_000))
        anything: Any = None
        dispatcher = BatchDispatcher(pipeline, anything, anything, 64, 1.0)
        records = [
            SimpleNamespace(
                topic="clicks", partition=0, offset=n, timestamp=1_700_000_000_000, value=click
            )
            for n in (3, 4)
        ]
        batch = batch_of(records)
        assert await dispatcher.apply([batch]) == [Outcome(records=2)]
        assert counted == [2]
        assert pipeline.handler.fences.find_diverged([0]) == []
        pipeline.thread.close()

    asyncio.run(run())
