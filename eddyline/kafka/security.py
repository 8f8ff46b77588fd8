"""TLS and SASL: the options of kafka-python, aiokafka and Faust, made of the settings.

`eddyline.kafka.diagnostics` says why a broker refuses a client. The set-up is in docs/security.md.
"""

from __future__ import annotations

import ssl
from typing import Any

from eddyline.errors import SettingsError
from eddyline.process.files import check_readable
from eddyline.settings.kafka import KafkaSettings, uses_sasl, uses_tls


def tls_context(settings: KafkaSettings) -> ssl.SSLContext | None:
    """The TLS context of these settings, None without TLS. It verifies certificate and host name.

    Reads the files at each call, so that a later client gets a renewed certificate. Raises
    SettingsError, which names the setting and the file.
    """
    if not uses_tls(settings):
        return None
    for name in ("kafka_ca_file", "kafka_cert_file", "kafka_key_file"):
        check_readable(name, getattr(settings, name))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.kafka_ca_file:
        try:
            context.load_verify_locations(settings.kafka_ca_file)
        except (ssl.SSLError, OSError) as error:
            named = f"kafka_ca_file = {settings.kafka_ca_file!r}"
            raise SettingsError(
                f"{named}: holds no certificate in PEM form ({_reason(error)})"
            ) from None
    else:
        context.load_default_certs()
    if settings.kafka_cert_file:
        _load_certificate(context, settings)
    return context


def client_options(settings: KafkaSettings) -> dict[str, Any]:
    """Options of kafka-python and aiokafka for TLS and SASL. Raises SettingsError.

    They hold the password: keep them out of log lines.
    """
    options: dict[str, Any] = {"security_protocol": settings.kafka_security_protocol}
    if uses_tls(settings):
        options["ssl_context"] = tls_context(settings)
    if uses_sasl(settings):
        options |= {
            "sasl_mechanism": settings.kafka_sasl_mechanism,
            "sasl_plain_username": settings.kafka_sasl_username,
            "sasl_plain_password": settings.kafka_sasl_password,
        }
    return options


def principal(settings: KafkaSettings) -> str:
    """The client as the broker knows it, in words, for an error's message."""
    if uses_sasl(settings):
        return f"user {settings.kafka_sasl_username!r}"
    if settings.kafka_cert_file:
        return f"the owner of the certificate in {settings.kafka_cert_file!r}"
    return "a client without a name"


def _load_certificate(context: ssl.SSLContext, settings: KafkaSettings) -> None:
    """Load our certificate and its key. Raises SettingsError.

    The password is a function: without one OpenSSL would prompt at the terminal.
    """
    named = f"kafka_cert_file = {settings.kafka_cert_file!r}"
    if settings.kafka_key_file:
        named += f", kafka_key_file = {settings.kafka_key_file!r}"
    try:
        context.load_cert_chain(
            settings.kafka_cert_file,
            settings.kafka_key_file or None,
            lambda: settings.kafka_key_password,
        )
    except (ssl.SSLError, OSError, ValueError) as error:
        raise SettingsError(
            f"{named}: no certificate with its private key in PEM form, or kafka_key_password is "
            f"not the key's ({_reason(error)})"
        ) from None


def _reason(error: Exception) -> str:
    """OpenSSL's reason without its source line."""
    return (
        getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
    )
