"""When to fetch: after the batches of a small fetch are applied, not while they are.

aiokafka sends its next fetch as soon as records are taken from it. Under a steady trickle that
fetch returns the one or two records that came in this very moment; they would be a batch of their
own, at the full cost of one, and what came meanwhile would wait at the broker for the fetch after
it. So after a small fetch `FetchGate` holds the next one back until the app requests it, and
the app does so once its small batches are applied. After a larger fetch aiokafka reads ahead.

This is no back-pressure. A full queue (`dispatcher.QUEUE_BATCHES`) pauses its topic in
`consumer.BatchConsumer.on_buffer_full`.
"""

from __future__ import annotations

import asyncio

# More turns of the loop than a batch needs from the consumer to its handler. A pipeline that stands
# still (Redis is away, its thread is busy) does not hold up the fetches of the others.
TURNS_MAX = 20


class InFlightBatches:
    """The topics whose small batches are on their way to a handler in the app's loop.

    Thread rule: the app's loop.
    topics: those whose handlers block the loop until their batches are applied; others are not
            waited for
    """

    def __init__(self) -> None:
        self.topics: set[str] = set()
        self._in_flight: set[str] = set()

    def sent(self, topic: str) -> None:
        """Batches of the topic are on their way to its pipeline."""
        if topic in self.topics:
            self._in_flight.add(topic)

    def applied(self, topic: str) -> None:
        """The pipeline has applied its batches."""
        self._in_flight.discard(topic)

    async def wait(self) -> None:
        """Let the pipelines apply their batches, for at most `TURNS_MAX` turns of the loop."""
        for _ in range(TURNS_MAX):
            if not self._in_flight:
                return
            await asyncio.sleep(0)
