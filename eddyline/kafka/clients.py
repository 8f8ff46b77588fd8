"""kafka-python clients: their options, and what their errors mean."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar

from kafka.errors import KafkaError

from eddyline.errors import EddylineError, KafkaRefused, KafkaUnavailable
from eddyline.kafka import diagnostics, security
from eddyline.settings.loader import Settings

_T = TypeVar("_T")


def client_options(settings: Settings) -> dict[str, Any]:
    """What every kafka-python client is made with: addresses, time-outs that do end, and who we are.

    Raises SettingsError where a file of certificates cannot be used.
    """
    return security.client_options(settings) | {
        "bootstrap_servers": settings.kafka_bootstrap_servers.split(","),
        "request_timeout_ms": max(settings.kafka_timeout_ms, 1_000),
        "bootstrap_timeout_ms": settings.kafka_timeout_ms,
        "reconnect_backoff_max_ms": settings.backoff_ms_max,
    }


def connect(settings: Settings, make: Callable[..., _T], **more: Any) -> _T:
    """A client of kafka-python, made with `client_options` and more. Raises KafkaRefused, KafkaUnavailable.

    The first one of a process that uses TLS or SASL knocks before, so that a wrong password is told at once.
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
    """Knock until once let in."""
    diagnostics.check_connection(settings)


def translate_error(settings: Settings, error: Exception, at: str = "") -> EddylineError:
    """What an error of kafka-python means: KafkaRefused where a person has to decide, else KafkaUnavailable.

    at: what was spoken to, by default the servers. Asks Kafka itself, which takes two seconds at most.
    """
    where = at or f"Kafka at {settings.kafka_bootstrap_servers}"
    if lacks_right(error):
        return KafkaRefused(
            f"{where}: {security.principal(settings)} lacks a right ({error}); "
            "docs/security.md lists those that Eddyline needs"
        )
    try:
        diagnostics.check_connection(settings)
    except KafkaRefused as refused:
        return refused
    except KafkaUnavailable:
        pass
    return KafkaUnavailable(f"{where}: {type(error).__name__}: {error}")


def lacks_right(error: Exception) -> bool:
    """Whether Kafka says so; kafka-python wraps some of these errors into others, so the words count."""
    return "AuthorizationFailed" in f"{type(error).__name__} {error}"
