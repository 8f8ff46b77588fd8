"""kafka-python clients: their options, and what their errors mean."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar

from kafka.errors import KafkaError

from eddyline.errors import EddylineError, KafkaRefused, KafkaUnavailable, Rejected
from eddyline.kafka import diagnostics, kafka_python_decoding, security
from eddyline.settings.loader import Settings

_T = TypeVar("_T")
# A poll of a consumer that pauses partitions returns all that was fetched, and a fetch has so many
# bytes of each: kafka-python 3.0.12 never goes on with a partition that is paused while a rest of
# its records is left.
ALL_FETCHED = 2**31 - 1
PARTITION_FETCH_BYTES = 262_144
# Every client of kafka-python is made with the options of this file.
kafka_python_decoding.install()


def client_options(settings: Settings) -> dict[str, Any]:
    """Options of every kafka-python client: addresses, security, and time-outs that end.

    Raises SettingsError if a file of certificates cannot be used.
    """
    return security.client_options(settings) | {
        "bootstrap_servers": settings.kafka_bootstrap_servers.split(","),
        "request_timeout_ms": max(settings.kafka_timeout_ms, 1_000),
        "bootstrap_timeout_ms": settings.kafka_timeout_ms,
        "reconnect_backoff_max_ms": settings.backoff_ms_max,
    }


def connect(settings: Settings, make: Callable[..., _T], **more: Any) -> _T:
    """A client of kafka-python, made with `client_options` and more.

    With TLS or SASL the first client of a process checks the connection before, so that a wrong
    password is reported at once. Raises KafkaRefused, KafkaUnavailable.
    """
    if settings.kafka_security_protocol != "PLAINTEXT":
        with suppress(KafkaUnavailable):
            _checked_once(settings)
    try:
        return make(**client_options(settings) | more)
    except (KafkaError, OSError) as error:
        raise translate_error(settings, error) from None


@lru_cache(maxsize=4)
def _checked_once(settings: Settings) -> None:
    """Check the connection; skipped after the first success in this process."""
    diagnostics.check_connection(settings)


def translate_error(settings: Settings, error: Exception, at: str = "") -> EddylineError:
    """KafkaRefused if an operator has to decide, Rejected (`too_large`) for the size of a record,
    else KafkaUnavailable.

    at: names what was called, for the message; default: the servers

    Checks the connection to find out, which takes two seconds at most.
    """
    where = at or f"Kafka at {settings.kafka_bootstrap_servers}"
    if lacks_right(error):
        return KafkaRefused(
            f"{where}: {security.principal(settings)} lacks a right ({error}); "
            "docs/security.md lists those that Eddyline needs"
        )
    if is_too_large(error):
        raised = "raise max.message.bytes of its topic"
        return Rejected("too_large", "", f"{where} refuses the size of a record: {raised}")
    try:
        diagnostics.check_connection(settings)
    except KafkaRefused as refused:
        return refused
    except KafkaUnavailable:
        pass
    return KafkaUnavailable(f"{where}: {type(error).__name__}: {error}")


def lacks_right(error: Exception) -> bool:
    """Whether Kafka denied a right. kafka-python wraps some errors, so the text decides."""
    return "AuthorizationFailed" in f"{type(error).__name__} {error}"


def is_too_large(error: BaseException) -> bool:
    """Whether client or broker refused the size of a record. Either client; some errors wrap it."""
    text = f"{type(error).__name__} {error}"
    return "MessageSizeTooLarge" in text or "RecordListTooLarge" in text
