"""Why Kafka refuses a client: one connection of our own, and a sentence that names the settings.

A refused Kafka client tries again until its time is over, and then reports the time-out, not the
reason. So `check_connection` does what a client does: TLS, versions, SASL. It runs before the first
client of a process and after each client that failed. It separates what waiting does not heal
(KafkaRefused) from what it may heal (KafkaUnavailable).

kafka-python encodes and decodes. The socket is ours: its clients hide the alert that ends TLS.
Requests have the oldest versions that say enough; every broker since 1.0 knows them.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kafka.errors import (
    IllegalSaslStateError,
    KafkaError,
    NoError,
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
    for_code,
)
from kafka.net.sasl import get_sasl_mechanism
from kafka.protocol.metadata import ApiVersionsRequest
from kafka.protocol.parser import KafkaProtocol
from kafka.protocol.sasl import SaslAuthenticateRequest, SaslHandshakeRequest

from eddyline import addresses
from eddyline.errors import KafkaRefused, KafkaUnavailable
from eddyline.kafka import security
from eddyline.settings.kafka import uses_sasl, uses_tls
from eddyline.settings.loader import Settings

# The longest check, all addresses together; it is never longer than a call to Kafka may take.
CHECK_S_MAX = 2.0
# Kafka's answers here have some hundred bytes; a server that announces more is no Kafka.
_ANSWER_BYTES_MAX = 64 * 1024
_RECEIVE_BYTES = 16 * 1024
_PORT = 9092
# OpenSSL's numbers for a certificate of another host or address.
_OTHER_NAME = (62, 64)


class _NotKafka(Exception):
    """The other end closed the connection, or its answer is not Kafka's."""


def check_connection(settings: Settings) -> None:
    """Return if one of the brokers accepts us. Thread rule: any thread.

    Raises KafkaRefused with the reason and the settings to look at, KafkaUnavailable if no broker
    answers in time, SettingsError if a file of certificates cannot be used.
    """
    deadline = time.monotonic() + min(CHECK_S_MAX, settings.kafka_timeout_ms / 1000)
    refused: KafkaRefused | None = None
    away = "no address"
    for address in settings.kafka_bootstrap_servers.split(","):
        try:
            BrokerProbe(settings, address.strip(), deadline).check()
            return
        except KafkaRefused as error:
            refused = refused or error
        except (_NotKafka, OSError, ValueError) as error:
            away = f"{address}: {error}"
    if refused is not None:
        raise refused
    raise KafkaUnavailable(f"Kafka does not answer: {away}")


@dataclass(frozen=True)
class BrokerProbe:
    """One address of one broker, and the time until which to try it (`time.monotonic`)."""

    settings: Settings
    address: str
    deadline: float

    def check(self) -> None:
        """Connect as the settings say. Raises KafkaRefused, _NotKafka, OSError, ValueError."""
        try:
            with self._connect() as plain, self._encrypt(plain) as connection:
                wire = Wire(connection)
                wire.call(ApiVersionsRequest(version=0))
                self._log_in(wire)
        except ssl.SSLCertVerificationError as error:
            raise self._distrusted(error) from None
        except (_NotKafka, OSError) as error:
            self._explain(error)
            raise

    def _log_in(self, wire: Wire) -> None:
        """Log in with SASL; without it, find out whether the broker demands it."""
        mechanism = self.settings.kafka_sasl_mechanism
        answer = wire.call(SaslHandshakeRequest(version=1, mechanism=mechanism or "PLAIN"))
        error, offered = for_code(answer.error_code), ", ".join(answer.mechanisms)
        if not uses_sasl(self.settings):
            if error in (NoError, UnsupportedSaslMechanismError):
                raise self._refused(
                    f"it demands a login by SASL ({offered}); set kafka_security_protocol to "
                    f"{'SASL_SSL' if self._tls else 'SASL_PLAINTEXT'}, kafka_sasl_mechanism, "
                    "kafka_sasl_username and kafka_sasl_password"
                )
        elif error is IllegalSaslStateError:
            raise self._refused(
                "this port knows no login by SASL; look at the port in kafka_bootstrap_servers, or "
                f"set kafka_security_protocol to {'SSL' if self._tls else 'PLAINTEXT'}"
            )
        elif error is UnsupportedSaslMechanismError:
            raise self._refused(
                f"it knows {offered}; kafka_sasl_mechanism = {mechanism!r} is none of these"
            )
        elif error is NoError:
            self._authenticate(wire)

    def _authenticate(self, wire: Wire) -> None:
        options = security.client_options(self.settings)
        login = get_sasl_mechanism(options["sasl_mechanism"])(host=self._host_port()[0], **options)
        user = f"kafka_sasl_username = {self.settings.kafka_sasl_username!r}"
        while not login.is_done():
            request = SaslAuthenticateRequest(version=0, auth_bytes=login.auth_bytes())
            answer = wire.call(request)
            error = for_code(answer.error_code)
            if error is SaslAuthenticationFailedError:
                raise self._refused(
                    "it does not know this user, or the password is wrong; look at "
                    f"{user}, kafka_sasl_password and kafka_sasl_mechanism = "
                    f"{self.settings.kafka_sasl_mechanism!r}"
                )
            if error is not NoError:
                raise _NotKafka(f"{error.__name__} during the login")
            try:
                login.receive(answer.auth_bytes)
            except (ValueError, KeyError):
                raise self._refused(
                    "it could not prove that it knows our password, so it may be another server; "
                    f"look at kafka_bootstrap_servers and {user}"
                ) from None

    def _explain(self, error: Exception) -> None:
        """Raise KafkaRefused if a second look shows why the connection ended; else return."""
        if isinstance(error, ConnectionRefusedError | TimeoutError | socket.gaierror):
            return
        if isinstance(error, ssl.SSLError) and (alert := _alert(error)):
            raise self._certificate_refused(alert) from None
        if not self._tls:
            if self._speaks_tls():
                raise self._refused(
                    "this port speaks TLS and we do not; set kafka_security_protocol to SSL or "
                    "SASL_SSL, and kafka_ca_file"
                ) from None
        elif self._speaks_plaintext():
            raise self._refused(
                "this port speaks no TLS; look at the port in kafka_bootstrap_servers, or set "
                "kafka_security_protocol to PLAINTEXT or SASL_PLAINTEXT"
            ) from None
        elif alert := self._alert_after_handshake():
            raise self._certificate_refused(alert) from None

    def _speaks_tls(self) -> bool:
        # Nothing is sent over this connection, so any certificate will do.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            with self._connect() as plain, context.wrap_socket(plain):
                return True
        except ssl.SSLError as error:
            return bool(_alert(error))
        except OSError:
            return False

    def _speaks_plaintext(self) -> bool:
        try:
            with self._connect() as plain:
                Wire(plain).call(ApiVersionsRequest(version=0))
        except (_NotKafka, OSError):
            return False
        return True

    def _alert_after_handshake(self) -> str:
        """With TLS 1.3 the alert about our certificate comes late, and is lost after we sent."""
        try:
            with self._connect() as plain, self._encrypt(plain) as connection:
                connection.recv(1)
        except ssl.SSLError as error:
            return _alert(error)
        except OSError:
            pass
        return ""

    @property
    def _tls(self) -> bool:
        return uses_tls(self.settings)

    def _host_port(self) -> tuple[str, int]:
        return addresses.split(self.address, _PORT)

    def _left_s(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time left")
        return left

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(self._host_port(), timeout=self._left_s())
        connection.settimeout(self._left_s())
        return connection

    @contextlib.contextmanager
    def _encrypt(self, plain: socket.socket) -> Iterator[socket.socket]:
        context = security.tls_context(self.settings)
        if context is None:
            yield plain
            return
        with context.wrap_socket(plain, server_hostname=self._host_port()[0]) as wire:
            yield wire

    def _refused(self, why: str) -> KafkaRefused:
        return KafkaRefused(f"Kafka at {self.address} refuses us: {why}")

    def _distrusted(self, error: ssl.SSLCertVerificationError) -> KafkaRefused:
        why = str(error.verify_message).rstrip(".")
        if error.verify_code in _OTHER_NAME:
            look = "kafka_bootstrap_servers must use a name that is in it"
        else:
            ca = self.settings.kafka_ca_file
            named = f" = {ca!r}" if ca else ", which is empty: the system's authorities"
            look = f"kafka_ca_file{named} must hold the authority that signed it"
        return KafkaRefused(
            f"Kafka at {self.address}: its certificate is not trusted ({why}); {look}"
        )

    def _certificate_refused(self, alert: str) -> KafkaRefused:
        own = self.settings.kafka_cert_file
        look = (
            f"kafka_cert_file = {own!r}, which its authority must have signed"
            if own
            else "kafka_cert_file and kafka_key_file, which are empty: it may demand a "
            "certificate of ours"
        )
        return self._refused(f"it ended the TLS connection ({alert}); look at {look}")


class Wire:
    """Kafka's protocol over a connected socket: one request, one answer."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._protocol = KafkaProtocol(
            client_id="eddyline", receive_message_max_bytes=_ANSWER_BYTES_MAX
        )

    def call(self, request: Any) -> Any:
        """The answer to a request, both kafka-python's. Raises _NotKafka and OSError."""
        try:
            self._protocol.send_request(request)
            self._connection.sendall(self._protocol.send_bytes())
            while True:
                content = self._connection.recv(_RECEIVE_BYTES)
                if not content:
                    raise _NotKafka("the connection was closed")
                if answers := self._protocol.receive_bytes(content):
                    return answers[0][1]
        except (KafkaError, ValueError, LookupError, struct.error) as error:
            raise _NotKafka(f"the answer is not Kafka's ({type(error).__name__})") from None


def _alert(error: ssl.SSLError) -> str:
    """The other end's TLS alert in words, "" if the error is none. Only TLS sends alerts."""
    reason = str(getattr(error, "reason", None) or "")
    _, found, name = reason.partition("ALERT_")
    return name.lower().replace("_", " ") if found else ""
