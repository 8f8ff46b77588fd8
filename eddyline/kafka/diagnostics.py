"""Why Kafka does not let us in: one connection, spoken to by hand, and a sentence that names the settings.

A Kafka client that is refused tries again until its time is over and reports that time, not the reason. So
before a process' first client, and after each one that failed, `knock` does what the client would: TLS, which
versions there are, SASL. It tells what waiting does not heal (KafkaRefused) from what it may
(KafkaUnavailable). Requests are in the oldest versions that say enough, so every broker since 1.0 knows them.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

from kafka.net.sasl import get_sasl_mechanism

from eddyline.errors import KafkaRefused, KafkaUnavailable
from eddyline.kafka import security
from eddyline.settings.kafka import uses_sasl, uses_tls
from eddyline.settings.loader import Settings

# One knock, all addresses together, and never longer than a call to Kafka may take.
KNOCK_S_MAX = 2.0
# Kafka's answers here have some hundred bytes; what claims more is no Kafka.
_ANSWER_BYTES_MAX = 64 * 1024
_PORT = 9092
_CLIENT_ID = b"eddyline"
# The protocol's numbers of requests (key, version) and of errors.
_SASL_HANDSHAKE, _API_VERSIONS, _SASL_AUTHENTICATE = (17, 1), (18, 0), (36, 0)
_UNSUPPORTED_MECHANISM, _ILLEGAL_SASL_STATE, _SASL_FAILED = 33, 34, 58
# OpenSSL's numbers for a certificate that is for another host or address.
_OTHER_NAME = (62, 64)


class _NotKafka(Exception):
    """The other end closed the connection, or its answer is none of Kafka's."""


def check_connection(settings: Settings) -> None:
    """Return where one of the brokers lets us in. Thread rule: any thread.

    Raises KafkaRefused with the reason and the settings to look at, KafkaUnavailable where none answers in
    time, SettingsError where a file of certificates cannot be used.
    """
    deadline = time.monotonic() + min(KNOCK_S_MAX, settings.kafka_timeout_ms / 1000)
    refused: KafkaRefused | None = None
    away = "no address"
    for address in settings.kafka_bootstrap_servers.split(","):
        try:
            BrokerProbe(settings, address.strip(), deadline).enter()
            return
        except KafkaRefused as error:
            refused = refused or error
        except (_NotKafka, OSError, ValueError, struct.error) as error:
            away = f"{address}: {error}"
    if refused is not None:
        raise refused
    raise KafkaUnavailable(f"Kafka does not answer: {away}")


@dataclass(frozen=True)
class BrokerProbe:
    """One address of one broker."""

    settings: Settings
    address: str
    deadline: float

    def enter(self) -> None:
        """Connect as the settings say. Raises KafkaRefused, _NoKafka, OSError, ValueError."""
        try:
            with self._connected() as plain, self._encrypted(plain) as wire:
                _ask(wire, _API_VERSIONS, b"")
                self._log_in(wire)
        except ssl.SSLCertVerificationError as error:
            raise self._distrusted(error) from None
        except (_NotKafka, OSError) as error:
            self._explain(error)
            raise

    def _log_in(self, wire: socket.socket) -> None:
        wanted = self.settings.kafka_sasl_mechanism
        answer = _Answer(_ask(wire, _SASL_HANDSHAKE, _text((wanted or "PLAIN").encode())))
        error, offered = answer.int16(), ", ".join(answer.texts())
        sasl = uses_sasl(self.settings)
        if not sasl and error in (0, _UNSUPPORTED_MECHANISM):
            raise self._refused(
                f"it asks for a login by SASL ({offered}); set kafka_security_protocol to "
                f"{'SASL_SSL' if self._tls else 'SASL_PLAINTEXT'}, kafka_sasl_mechanism, kafka_sasl_username "
                "and kafka_sasl_password"
            )
        if not sasl:
            return
        if error == _ILLEGAL_SASL_STATE:
            raise self._refused(
                "this port knows no login by SASL; look at the port in kafka_bootstrap_servers, or set "
                f"kafka_security_protocol to {'SSL' if self._tls else 'PLAINTEXT'}"
            )
        if error == _UNSUPPORTED_MECHANISM:
            raise self._refused(
                f"it knows {offered}; kafka_sasl_mechanism = {wanted!r} is none of these"
            )
        if error == 0:
            self._prove(wire)

    def _prove(self, wire: socket.socket) -> None:
        options = security.client_options(self.settings)
        login = get_sasl_mechanism(options["sasl_mechanism"])(host=self._host_port()[0], **options)
        user = f"kafka_sasl_username = {self.settings.kafka_sasl_username!r}"
        while not login.is_done():
            token = login.auth_bytes()
            answer = _Answer(_ask(wire, _SASL_AUTHENTICATE, struct.pack(">i", len(token)) + token))
            error = answer.int16()
            if error == _SASL_FAILED:
                raise self._refused(
                    f"it does not know this user, or the password is another one; look at {user}, "
                    f"kafka_sasl_password and kafka_sasl_mechanism = {self.settings.kafka_sasl_mechanism!r}"
                )
            if error:
                raise _NotKafka(f"error {error} during the login")
            answer.text()
            try:
                login.receive(answer.data())
            except (ValueError, KeyError):
                raise self._refused(
                    f"it could not prove that it knows our password, so it may be another server; look at "
                    f"kafka_bootstrap_servers and {user}"
                ) from None

    def _explain(self, error: Exception) -> None:
        """Raise KafkaRefused where a second look shows why the connection ended; else return."""
        if isinstance(error, ConnectionRefusedError | TimeoutError | socket.gaierror):
            return
        if isinstance(error, ssl.SSLError) and (alert := _alert(error)):
            raise self._not_welcome(alert) from None
        if not self._tls:
            if self._speaks_tls():
                raise self._refused(
                    "this port speaks TLS and we do not; set kafka_security_protocol to SSL or SASL_SSL, and "
                    "kafka_ca_file"
                ) from None
        elif self._speaks_plainly():
            raise self._refused(
                "this port speaks no TLS; look at the port in kafka_bootstrap_servers, or set "
                "kafka_security_protocol to PLAINTEXT or SASL_PLAINTEXT"
            ) from None
        elif alert := self._alert_after_handshake():
            raise self._not_welcome(alert) from None

    def _speaks_tls(self) -> bool:
        context = ssl.SSLContext(
            ssl.PROTOCOL_TLS_CLIENT
        )  # nothing is sent over it, so it trusts anyone
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            with self._connected() as plain, context.wrap_socket(plain):
                return True
        except ssl.SSLError as error:
            return bool(_alert(error))
        except OSError:
            return False

    def _speaks_plainly(self) -> bool:
        try:
            with self._connected() as plain:
                return len(_ask(plain, _API_VERSIONS, b"")) > 2
        except (_NotKafka, OSError, struct.error):
            return False

    def _alert_after_handshake(self) -> str:
        """Under TLS 1.3 the verdict on our certificate comes later, and is lost if we have sent something."""
        try:
            with self._connected() as plain, self._encrypted(plain) as wire:
                wire.recv(1)
        except ssl.SSLError as error:
            return _alert(error)
        except OSError:
            pass
        return ""

    @property
    def _tls(self) -> bool:
        return uses_tls(self.settings)

    def _host_port(self) -> tuple[str, int]:
        host, colon, port = self.address.rpartition(":")
        name = host.strip("[]") if colon else port
        if not name:
            raise ValueError("the address is empty")
        return name, int(port) if colon else _PORT

    def _left_s(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time left")
        return left

    def _connected(self) -> socket.socket:
        connection = socket.create_connection(self._host_port(), timeout=self._left_s())
        connection.settimeout(self._left_s())
        return connection

    @contextlib.contextmanager
    def _encrypted(self, plain: socket.socket) -> Iterator[socket.socket]:
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
            look = (
                f"kafka_ca_file = {ca!r}"
                if ca
                else "kafka_ca_file, which is empty: the system's authorities"
            )
            look += " must hold the authority that signed it"
        return KafkaRefused(
            f"Kafka at {self.address}: its certificate is not trusted ({why}); {look}"
        )

    def _not_welcome(self, alert: str) -> KafkaRefused:
        mine = self.settings.kafka_cert_file
        own = (
            f"kafka_cert_file = {mine!r}, which its authority must have signed"
            if mine
            else (
                "kafka_cert_file and kafka_key_file, which are empty: it may ask for a certificate of ours"
            )
        )
        return self._refused(f"it ended the TLS connection ({alert}); look at {own}")


class _Answer:
    """The fields of an answer, in their order."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def int16(self) -> int:
        return int(self._number(">h"))

    def text(self) -> str:
        return self._bytes(self.int16()).decode("utf-8", "replace")

    def texts(self) -> list[str]:
        count = self._number(">i")
        return [self.text() for _ in range(min(count, len(self._content)))]

    def data(self) -> bytes:
        return self._bytes(self._number(">i"))

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self._content, self._at)
        self._at += struct.calcsize(form)
        return int(value)

    def _bytes(self, length: int) -> bytes:
        start = self._at
        self._at += max(0, length)
        if self._at > len(self._content):
            raise _NotKafka("an answer is shorter than it says")
        return self._content[start : self._at]


def _ask(wire: socket.socket, request: tuple[int, int], body: bytes) -> bytes:
    """Send one request; its answer after the correlation id. Raises _NoKafka and OSError."""
    message = struct.pack(">hhi", *request, 0) + _text(_CLIENT_ID) + body
    wire.sendall(struct.pack(">i", len(message)) + message)
    (size,) = struct.unpack(">i", _exactly(wire, 4))
    if not 4 <= size <= _ANSWER_BYTES_MAX:
        raise _NotKafka("the answer is none of Kafka's")
    return _exactly(wire, size)[4:]


def _exactly(wire: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = wire.recv(size - len(content))
        if not part:
            raise _NotKafka("the connection was closed")
        content += part
    return content


def _text(content: bytes) -> bytes:
    return struct.pack(">h", len(content)) + content


def _alert(error: ssl.SSLError) -> str:
    """The other end's TLS alert in words, "" where the error is none: only TLS speakers send them."""
    reason = str(getattr(error, "reason", None) or "")
    _, found, name = reason.partition("ALERT_")
    return name.lower().replace("_", " ") if found else ""
