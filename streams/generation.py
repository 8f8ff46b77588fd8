"""One generation in an ingest process: its towers, micro-steps and item-vector publisher.

Several may live in one process. Each has its own towers, embeddings (`e:<generation>`), item topic
and fence (`items@<generation>`); closing one leaves the others as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from typing_extensions import override

from eddyline.errors import EddylineError
from eddyline.schema.item_record import ItemRecord
from embeddings.bundle.bundle import Bundle
from streams.clicks.micro_steps import MicroSteps
from streams.ports import RecordPublisher


class NoPublisher(RecordPublisher):
    """Publishes nothing: for a generation that is only to learn from clicks."""

    @override
    def open(self, partition: int) -> None:
        pass

    @override
    def publish(self, records: Mapping[int, Sequence[ItemRecord]]) -> dict[int, EddylineError]:
        return {}


class Generation:
    """The parts of one live generation that the handlers use.

    name:      the generation's id
    publisher: where its item records go
    """

    def __init__(self, towers: Bundle, publisher: RecordPublisher | None = None) -> None:
        self.name = towers.generation
        self.towers = towers
        self.micro = MicroSteps(towers)
        self.publisher = publisher or NoPublisher()
        self._closes = ExitStack()
        self._closes.callback(self.publisher.close)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Publish in this event loop from here on; before the handlers open a partition."""
        self.publisher.attach(loop)

    async def detach(self) -> None:
        """End publishing in the attached event loop."""
        await self.publisher.detach()

    def close(self) -> None:
        """Close what belongs to this generation."""
        self._closes.close()
