"""How our clients show Kafka who they are: from the settings to options of kafka-python, aiokafka and Faust.

The one place that reads the `kafka_security_protocol`, `kafka_sasl_…`, `kafka_ca_file`, `kafka_cert_file` and
`kafka_key_…` settings. What a broker's refusal means is in `eddyline.kafka.diagnostics`; how to set all of it up is
in docs/security.md.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eddyline.errors import SettingsError

if TYPE_CHECKING:
    from eddyline.settings.loader import Settings

_SASL = ("SASL_PLAINTEXT", "SASL_SSL")
_TLS = ("SSL", "SASL_SSL")
_SASL_SETTINGS = ("kafka_sasl_mechanism", "kafka_sasl_username", "kafka_sasl_password")
_TLS_SETTINGS = ("kafka_ca_file", "kafka_cert_file", "kafka_key_file", "kafka_key_password")
# What a process of ours has to be told where its settings do not come from the environment.
NAMES = ("kafka_security_protocol", *_SASL_SETTINGS, *_TLS_SETTINGS)


def uses_sasl(settings: Settings) -> bool:
    """Whether clients log in with a name and a password."""
    return settings.kafka_security_protocol in _SASL


def uses_tls(settings: Settings) -> bool:
    """Whether connections are encrypted and the broker shows a certificate."""
    return settings.kafka_security_protocol in _TLS


def check(settings: Settings) -> None:
    """Raise SettingsError where these settings do not fit together or a file cannot be used.

    Names the settings, and never a password.
    """
    protocol = f"kafka_security_protocol = {settings.kafka_security_protocol!r}"
    if settings.kafka_security_protocol != "PLAINTEXT" and not settings.kafka_bootstrap_servers:
        raise SettingsError(
            f"{protocol}: needs kafka_bootstrap_servers; the local Kafka that stands in speaks PLAINTEXT"
        )
    if uses_sasl(settings):
        missing = [name for name in _SASL_SETTINGS if not getattr(settings, name)]
        if missing:
            raise SettingsError(f"{protocol}: needs {' and '.join(missing)}")
        scram = settings.kafka_sasl_mechanism.startswith("SCRAM")
        if scram and any(sign in settings.kafka_sasl_username for sign in ",="):
            # RFC 5802, section 5.1: a name would have to be escaped, which neither of our clients does.
            raise SettingsError(
                f"kafka_sasl_username = {settings.kafka_sasl_username!r}: with "
                f"{settings.kafka_sasl_mechanism} a name must have neither ',' nor '='"
            )
    else:
        _unused(settings, _SASL_SETTINGS, _SASL, protocol)
    if not uses_tls(settings):
        _unused(settings, _TLS_SETTINGS, _TLS, protocol)
    if settings.kafka_key_file and not settings.kafka_cert_file:
        raise SettingsError(f"kafka_key_file = {settings.kafka_key_file!r}: needs kafka_cert_file")
    if settings.kafka_key_password and not settings.kafka_cert_file:
        raise SettingsError("kafka_key_password: needs kafka_cert_file, and its key")
    tls_context(settings)


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """The TLS of these settings, None without TLS: certificates and host names are always verified.

    Reads the files anew, so that a client made later sees a renewed certificate. Raises SettingsError.
    """
    if not uses_tls(settings):
        return None
    for name in ("kafka_ca_file", "kafka_cert_file", "kafka_key_file"):
        _readable(name, getattr(settings, name))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.kafka_ca_file:
        try:
            context.load_verify_locations(settings.kafka_ca_file)
        except (ssl.SSLError, OSError) as error:
            named = f"kafka_ca_file = {settings.kafka_ca_file!r}"
            raise SettingsError(
                f"{named}: holds no certificate in PEM form ({_why(error)})"
            ) from None
    else:
        context.load_default_certs()
    if settings.kafka_cert_file:
        _show_certificate(context, settings)
    return context


def client_options(settings: Settings) -> dict[str, Any]:
    """What kafka-python and aiokafka are made with, beside addresses and time-outs. Raises SettingsError.

    Holds the password: not for a log line.
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


def principal(settings: Settings) -> str:
    """Who the broker takes us for, in words, for an error."""
    if uses_sasl(settings):
        return f"user {settings.kafka_sasl_username!r}"
    if settings.kafka_cert_file:
        return f"the owner of the certificate in {settings.kafka_cert_file!r}"
    return "a client without a name"


def _unused(
    settings: Settings, names: tuple[str, ...], protocols: tuple[str, str], protocol: str
) -> None:
    for name in names:
        if getattr(settings, name):
            raise SettingsError(
                f"{name} is set: needs kafka_security_protocol {' or '.join(protocols)}; {protocol}"
            )


def _show_certificate(context: ssl.SSLContext, settings: Settings) -> None:
    """Raises SettingsError. Without a password function OpenSSL would ask for one at the terminal."""
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
            f"{named}: no certificate with its private key in PEM form, or kafka_key_password is not the "
            f"key's ({_why(error)})"
        ) from None


def _readable(name: str, path: str) -> None:
    if not path:
        return
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise SettingsError(f"{name} = {path!r}: cannot be read: {error.strerror}") from None


def _why(error: Exception) -> str:
    """OpenSSL's reason without its source line."""
    return (
        getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
    )
