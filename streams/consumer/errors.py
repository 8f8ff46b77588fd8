"""What Kafka refuses while ingest runs: aiokafka keeps it to itself or raises it deep inside Faust.

`watch` looks for it, `meant` says what it means, `WithoutTraceback` keeps its stack traces out of the log, for the
process ends with one sentence. Leans on aiokafka's group coordinator, see `tests/unit/test_refusals.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from aiokafka.errors import KafkaError

from eddyline.errors import KafkaUnavailable
from eddyline.kafka import clients, diagnostics
from eddyline.settings.loader import Settings

# A missing right in the group is told within this.
_LOOK_S = 1.0
# A password that no longer holds is told within this; a knock is one login.
_KNOCK_S = 10.0


class Watched(Protocol):
    """The thread of the consumer, `streams.consumer.thread.ConsumerThread`."""

    _consumer: Any

    async def call_thread(self, fun: Any, /, *args: Any) -> Any:
        """Await the call in the thread's own loop."""


async def watch_consumer(settings: Settings, thread_of: Callable[[], Watched]) -> None:
    """Raise what Kafka refuses: KafkaRefused, or what else ended the work in the group. Never returns.

    Where TLS or SASL is used, knocks every ten seconds: connections that are open stay so when a password
    changes, but nothing could be opened anew.
    """
    clock = asyncio.get_running_loop().time
    knock_at = clock() + _KNOCK_S
    while True:
        await asyncio.sleep(_LOOK_S)
        thread = thread_of()
        if thread._consumer is not None and thread._consumer._coordinator is not None:
            try:
                await thread.call_thread(_check, thread._consumer._coordinator)
            except KafkaError as error:
                raise translate_error(settings, error) from None
        if settings.kafka_security_protocol != "PLAINTEXT" and clock() >= knock_at:
            try:
                await asyncio.to_thread(diagnostics.check_connection, settings)
            except KafkaUnavailable:
                pass  # it is waited for elsewhere
            knock_at = clock() + _KNOCK_S


async def _check(coordinator: Any) -> None:
    coordinator.check_errors()


def translate_error(settings: Settings, error: Exception) -> Exception:
    """KafkaRefused for a missing right; any other error as it is."""
    return clients.translate_error(settings, error) if clients.lacks_right(error) else error


class WithoutTraceback(logging.Filter):
    """Drops log records that bring the stack trace of a missing right."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be written."""
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, Exception) and clients.lacks_right(error))
