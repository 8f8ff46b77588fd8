"""Settings of Kafka: addresses, security, topics."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from eddyline.errors import SettingsError
from eddyline.settings.field import within

KafkaProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
KafkaMechanism = Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]
TopicName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]*\Z", max_length=249)]

_SASL = ("SASL_PLAINTEXT", "SASL_SSL")
_TLS = ("SSL", "SASL_SSL")
_SASL_NAMES = ("kafka_sasl_mechanism", "kafka_sasl_username", "kafka_sasl_password")
_TLS_NAMES = ("kafka_ca_file", "kafka_cert_file", "kafka_key_file", "kafka_key_password")
# The settings of security. A process that is started without our environment needs them passed on.
SECURITY_NAMES = ("kafka_security_protocol", *_SASL_NAMES, *_TLS_NAMES)


class KafkaSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Kafka, as every process uses it."""

    kafka_bootstrap_servers: str = ""
    """Kafka's addresses, `host:port,…`. Empty: the local Kafka that `eddyline up` or the demo
    started."""
    kafka_timeout_ms: Annotated[int, within(100, 600_000)] = 10_000
    """How long one call to Kafka may take."""

    # Security: docs/security.md
    kafka_security_protocol: KafkaProtocol = "PLAINTEXT"
    """The protocol of connections to Kafka: `SSL` is TLS, `SASL_…` logs in by name and password."""
    kafka_sasl_mechanism: KafkaMechanism = ""
    """The login mechanism; only with `SASL_…`."""
    kafka_sasl_username: Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]*\Z", max_length=1_000)] = (
        ""
    )
    """The user's name at Kafka."""
    kafka_sasl_password: Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]*\Z", max_length=1_000)] = (
        ""
    )
    """The user's password at Kafka."""
    kafka_ca_file: str = ""
    """PEM file of the authorities that may sign Kafka's certificate. Empty: those of the system."""
    kafka_cert_file: str = ""
    """PEM file of our own certificate, if Kafka demands one (mTLS)."""
    kafka_key_file: str = ""
    """PEM file of its private key. Empty: the key is in `kafka_cert_file`."""
    kafka_key_password: Annotated[str, Meta(max_length=1_000)] = ""
    """Password of the private key. Empty: it is not encrypted."""

    # Topics: partitions are fixed when the topics are made
    clicks_topic: TopicName = ""
    """An existing topic that is read as `clicks`, under its own name. Empty: `clicks` with the
    namespace in front, which Eddyline makes."""
    items_topic: TopicName = ""
    """An existing topic that is read as `items`."""
    users_topic: TopicName = ""
    """An existing topic that is read as `users`."""
    clicks_partitions: Annotated[int, within(1, 4_096)] = 8
    """Partitions of `clicks` and `users`: the most ingest processes that can share the clicks.
    Fixed when the topics are made."""
    items_partitions: Annotated[int, within(1, 1_024)] = 4
    """Partitions of `items` and of `item-vectors`. Fixed when the topics are made."""
    replication_factor: Annotated[int, within(1, 9)] = 1
    """Copies of each topic that Eddyline makes."""
    clicks_retention_h: Annotated[int, within(1, 87_600)] = 168
    """How long Kafka keeps clicks."""
    dead_letters_retention_h: Annotated[int, within(1, 87_600)] = 720
    """How long Kafka keeps dead letters."""
    answers_retention_h: Annotated[int, within(1, 87_600)] = 168
    """How long Kafka keeps the answers of sampled users."""

    # Schema registry: docs/feeds/maps.md
    registry_url: Annotated[str, Meta(pattern=r"^(https?://.+)?\Z", max_length=1_000)] = ""
    """Address of the schema registry, for maps with `encoding = "registry"`:
    `https://host:port`."""
    registry_user: Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f:]*\Z", max_length=1_000)] = ""
    """The user's name (or API key) at the registry; empty does not log in."""
    registry_password: Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]*\Z", max_length=1_000)] = ""
    """The user's password (or secret) at the registry."""
    registry_ca_file: str = ""
    """PEM file of the authorities that may sign the registry's certificate. Empty: those of the
    system."""
    registry_timeout_ms: Annotated[int, within(100, 60_000)] = 5_000
    """How long one request to the registry may take."""


def uses_sasl(settings: KafkaSettings) -> bool:
    """Whether clients log in with a name and a password."""
    return settings.kafka_security_protocol in _SASL


def uses_tls(settings: KafkaSettings) -> bool:
    """Whether connections are encrypted and the broker has a certificate."""
    return settings.kafka_security_protocol in _TLS


def check(settings: KafkaSettings) -> None:
    """Raise SettingsError if the settings of security contradict each other, or topics' names do.

    The message names the settings, never a password. `kafka.security.tls_context` checks the files.
    """
    own = [settings.clicks_topic, settings.items_topic, settings.users_topic]
    for name in own:
        if name and own.count(name) > 1:
            raise SettingsError(
                f"{name!r} is the topic of more than one of clicks, items and users"
            )
    protocol = f"kafka_security_protocol = {settings.kafka_security_protocol!r}"
    if settings.kafka_security_protocol != "PLAINTEXT" and not settings.kafka_bootstrap_servers:
        raise SettingsError(
            f"{protocol}: needs kafka_bootstrap_servers; the local Kafka speaks PLAINTEXT"
        )
    if uses_sasl(settings):
        missing = [name for name in _SASL_NAMES if not getattr(settings, name)]
        if missing:
            raise SettingsError(f"{protocol}: needs {' and '.join(missing)}")
        scram = settings.kafka_sasl_mechanism.startswith("SCRAM")
        if scram and any(sign in settings.kafka_sasl_username for sign in ",="):
            # RFC 5802, section 5.1: the name would have to be escaped, which neither client does.
            raise SettingsError(
                f"kafka_sasl_username = {settings.kafka_sasl_username!r}: with "
                f"{settings.kafka_sasl_mechanism} a name must have neither ',' nor '='"
            )
    else:
        _check_unused(settings, _SASL_NAMES, _SASL)
    if not uses_tls(settings):
        _check_unused(settings, _TLS_NAMES, _TLS)
    if settings.kafka_key_file and not settings.kafka_cert_file:
        raise SettingsError(f"kafka_key_file = {settings.kafka_key_file!r}: needs kafka_cert_file")
    if settings.kafka_key_password and not settings.kafka_cert_file:
        raise SettingsError("kafka_key_password: needs kafka_cert_file, and its key")


def _check_unused(
    settings: KafkaSettings, names: tuple[str, ...], protocols: tuple[str, str]
) -> None:
    for name in names:
        if getattr(settings, name):
            raise SettingsError(
                f"{name} is set: needs kafka_security_protocol {' or '.join(protocols)}; "
                f"kafka_security_protocol = {settings.kafka_security_protocol!r}"
            )
