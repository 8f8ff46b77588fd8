"""When to fetch: once what was fetched before is applied, not beside it.

aiokafka sends its next fetch as soon as records are taken from it. Under a steady trickle that one brings the
record or two that came in this very moment; they were a chunk of their own, at all the cost of one, and what
came meanwhile waited at the broker for the fetch after it. So after a small fetch the next one is held back
until the app asks for more, and it asks once its small chunks are applied. After a larger one aiokafka reads
ahead, as it is made to.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiokafka.consumer.fetcher import Fetcher

# A lane that stands still (Redis away, its thread at work) does not keep the others from being fetched: so
# many turns of the loop are more than a haul needs from the consumer to its ingest function.
TURNS_MAX = 20


class FetchGate:
    """Holds back the next fetch of aiokafka's fetcher. Thread rule: the loop of the consumer."""

    def __init__(self, fetcher: Fetcher) -> None:
        self.fetcher = fetcher
        self._held = False
        self._actions = fetcher._get_actions_per_node
        fetcher._get_actions_per_node = self._gated

    def hold(self) -> None:
        """No fetch from here on; in the step in which records are taken, before the fetcher goes on."""
        self._held = True

    def open(self) -> None:
        """Fetch."""
        if self._held:
            self._held = False
            self.fetcher._notify(self.fetcher._wait_consume_future)

    def _gated(self, assignment: Any) -> tuple[Any, ...]:
        requests, *others = self._actions(assignment)
        return ([] if self._held else requests, *others)


class InFlightBatches:
    """Which lanes were handed chunks that they apply in the app's loop itself, and have not yet.

    Thread rule: the app's loop.
    quick: the topics of these lanes
    """

    def __init__(self) -> None:
        self.quick: set[str] = set()
        self._waiting: set[str] = set()

    def over(self, topic: str) -> None:
        """A haul of the topic is on its way to its lane."""
        if topic in self.quick:
            self._waiting.add(topic)

    def applied(self, topic: str) -> None:
        """The lane has done what it had."""
        self._waiting.discard(topic)

    async def all_applied(self) -> None:
        """Let the lanes have their turn."""
        for _ in range(TURNS_MAX):
            if not self._waiting:
                return
            await asyncio.sleep(0)
