"""Errors that Kafka refuses us with while ingest runs.

aiokafka keeps them to itself, or raises them deep inside a fetch. `watch_consumer` finds them,
`translate_error` says what they mean, and `WithoutTraceback` keeps their stack traces out of the
log, as the process ends with one sentence.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from aiokafka.errors import KafkaError
from typing_extensions import override

from eddyline.errors import KafkaUnavailable
from eddyline.kafka import clients, diagnostics
from eddyline.settings.loader import Settings

# A missing right in the group is found within this.
_GROUP_CHECK_S = 1.0
# A password that is no longer valid is found within this; a check is one login.
_CONNECTION_CHECK_S = 10.0


class Watched(Protocol):
    """What is watched; `streams.app.IngestApp` is one."""

    async def check_group(self) -> None:
        """Raise the KafkaError that ended the work in the consumer group, if any."""


async def watch_consumer(settings: Settings, watched: Watched) -> None:
    """Raise KafkaRefused, or another error that ended the work in the group. Never returns.

    Where TLS or SASL is used, checks a new connection every ten seconds: open connections survive a
    change of the password, but no new one could be made.
    """
    clock = asyncio.get_running_loop().time
    check_at = clock() + _CONNECTION_CHECK_S
    while True:
        await asyncio.sleep(_GROUP_CHECK_S)
        try:
            await watched.check_group()
        except KafkaError as error:
            raise translate_error(settings, error) from None
        if settings.kafka_security_protocol != "PLAINTEXT" and clock() >= check_at:
            try:
                await asyncio.to_thread(diagnostics.check_connection, settings)
            except KafkaUnavailable:
                pass  # the consumer waits for Kafka
            check_at = clock() + _CONNECTION_CHECK_S


def translate_error(settings: Settings, error: Exception) -> Exception:
    """KafkaRefused for a missing right; any other error as it is."""
    return clients.translate_error(settings, error) if clients.lacks_right(error) else error


class WithoutTraceback(logging.Filter):
    """Drops log records with the stack trace of a missing right."""

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, Exception) and clients.lacks_right(error))
