"""Kafka's security: settings that fit together, options of clients, answers of strange servers."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from kafka.protocol.metadata import ApiVersionsRequest

from eddyline.errors import KafkaRefused, KafkaUnavailable, SettingsError
from eddyline.kafka import clients, diagnostics, producers, security
from eddyline.settings.loader import Settings, load
from streams.consumer.consumer import consumer_options

SECRET = "Zwiebelfisch-7"
SERVERS = {"kafka_bootstrap_servers": "127.0.0.1:9094"}
LOGIN = SERVERS | {
    "kafka_security_protocol": "SASL_PLAINTEXT",
    "kafka_sasl_mechanism": "SCRAM-SHA-256",
    "kafka_sasl_username": "ann",
    "kafka_sasl_password": SECRET,
}
TLS = SERVERS | {"kafka_security_protocol": "SSL"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An authority, a certificate, its key in the clear and encrypted, another key, other text."""
    folder, authority = tmp_path_factory.mktemp("certificates"), trustme.CA()
    mine, other = authority.issue_cert("ann@example.org"), authority.issue_cert("bob@example.org")
    key = serialization.load_pem_private_key(mine.private_key_pem.bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(SECRET.encode()),
    )
    contents = {
        "ca": authority.cert_pem.bytes(),
        "cert": mine.cert_chain_pems[0].bytes(),
        "locked": locked,
        "key": mine.private_key_pem.bytes(),
        "other": other.private_key_pem.bytes(),
        "nothing": b"nothing",
        "both": mine.private_key_and_cert_chain_pem.bytes(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: str(folder / name) for name in contents}


def read(values: dict[str, str], folder: Path) -> Settings:
    environ = {f"EDDYLINE_{name.upper()}": value for name, value in values.items()}
    settings = load(environ, folder=folder)
    security.tls_context(settings)
    return settings


def refused(values: dict[str, str], folder: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        read(values, folder)
    assert SECRET not in str(caught.value)
    return str(caught.value)


def test_nothing_changes_for_a_kafka_that_asks_for_nothing(tmp_path: Path) -> None:
    settings = read(SERVERS, tmp_path)
    assert security.client_options(settings) == {"security_protocol": "PLAINTEXT"}


@pytest.mark.parametrize("protocol", ["SASL_PLAINTEXT", "SASL_SSL"])
def test_sasl_without_its_settings_names_all_that_are_missing(
    protocol: str, tmp_path: Path
) -> None:
    sentence = refused(SERVERS | {"kafka_security_protocol": protocol}, tmp_path)
    assert f"kafka_security_protocol = '{protocol}'" in sentence
    for name in ("kafka_sasl_mechanism", "kafka_sasl_username", "kafka_sasl_password"):
        assert name in sentence
        missing = {**LOGIN, "kafka_security_protocol": protocol, name: ""}
        assert refused(missing, tmp_path).endswith(f"needs {name}")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"kafka_sasl_mechanism": "PLAIN"}, ["kafka_sasl_mechanism", "SASL_PLAINTEXT or SASL_SSL"]),
        ({"kafka_sasl_username": "ann"}, ["kafka_sasl_username", "SASL_SSL"]),
        ({"kafka_sasl_password": SECRET}, ["kafka_sasl_password", "SASL_SSL"]),
        ({"kafka_ca_file": "ca.pem"}, ["kafka_ca_file", "SSL or SASL_SSL"]),
        ({"kafka_cert_file": "cert.pem"}, ["kafka_cert_file", "SSL or SASL_SSL"]),
        ({"kafka_key_password": SECRET}, ["kafka_key_password", "SSL or SASL_SSL"]),
        (TLS | {"kafka_sasl_mechanism": "PLAIN"}, ["kafka_sasl_mechanism", "'SSL'"]),
        (TLS | {"kafka_ca_file": "/no/ca.pem"}, ["kafka_ca_file = '/no/ca.pem'", "No such file"]),
        (TLS | {"kafka_cert_file": "/no/c.pem"}, ["kafka_cert_file = '/no/c.pem'", "No such file"]),
        (TLS | {"kafka_key_file": "/no/k.pem"}, ["kafka_key_file", "needs kafka_cert_file"]),
        (TLS | {"kafka_key_password": SECRET}, ["kafka_key_password", "needs kafka_cert_file"]),
        ({"kafka_security_protocol": "ssl"}, ["kafka_security_protocol = 'ssl'"]),
        (TLS | {"kafka_bootstrap_servers": ""}, ["kafka_bootstrap_servers", "'SSL'"]),
        (LOGIN | {"kafka_sasl_mechanism": "SCRAM-SHA-1"}, ["kafka_sasl_mechanism = 'SCRAM-SHA-1'"]),
        (LOGIN | {"kafka_sasl_username": "a,b"}, ["kafka_sasl_username = 'a,b'", "SCRAM-SHA-256"]),
        (LOGIN | {"kafka_sasl_username": "a=b"}, ["kafka_sasl_username = 'a=b'"]),
        (LOGIN | {"kafka_sasl_password": SECRET + "\n"}, ["kafka_sasl_password", "(hidden)"]),
    ],
)
def test_settings_that_do_not_fit_are_named(
    more: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    sentence = refused(SERVERS | more, tmp_path)
    assert [word for word in words if word not in sentence] == []


def test_a_name_with_a_comma_is_fine_for_plain(tmp_path: Path) -> None:
    settings = read(
        LOGIN | {"kafka_sasl_mechanism": "PLAIN", "kafka_sasl_username": "a,b=c"}, tmp_path
    )
    assert security.client_options(settings)["sasl_plain_username"] == "a,b=c"


@pytest.mark.parametrize("name", ["kafka_sasl_username", "kafka_sasl_password"])
def test_the_limit_of_a_name_and_of_a_password(name: str, tmp_path: Path) -> None:
    for length in (999, 1_000):
        assert len(getattr(read(LOGIN | {name: "n" * length}, tmp_path), name)) == length
    for length in (1_001, 100_000):
        assert name in refused(LOGIN | {name: "n" * length}, tmp_path)


def test_files_that_are_no_certificates_are_named(files: dict[str, str], tmp_path: Path) -> None:
    cert = {"kafka_cert_file": files["cert"]}
    bad = (
        ({"kafka_ca_file": files["nothing"]}, ["kafka_ca_file", files["nothing"]]),
        ({"kafka_cert_file": files["nothing"]}, ["kafka_cert_file", files["nothing"]]),
        (cert, ["kafka_cert_file"]),
        (cert | {"kafka_key_file": files["other"]}, ["kafka_key_file", files["other"]]),
        (cert | {"kafka_key_file": files["locked"]}, ["kafka_key_password"]),
        ({"kafka_ca_file": str(tmp_path)}, ["kafka_ca_file", "directory"]),
    )
    for more, words in bad:
        sentence = refused(TLS | more, tmp_path)
        assert [word for word in words if word not in sentence] == []


def test_a_certificate_with_its_key_in_one_file_in_two_and_encrypted(
    files: dict[str, str], tmp_path: Path
) -> None:
    for more in (
        {"kafka_cert_file": files["both"]},
        {"kafka_cert_file": files["cert"], "kafka_key_file": files["key"]},
        {
            "kafka_cert_file": files["cert"],
            "kafka_key_file": files["locked"],
            "kafka_key_password": SECRET,
        },
    ):
        context = security.tls_context(read(TLS | {"kafka_ca_file": files["ca"]} | more, tmp_path))
        assert context is not None and len(context.get_ca_certs()) == 1
        assert context.check_hostname and context.verify_mode == ssl.CERT_REQUIRED
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("protocol", ["SASL_PLAINTEXT", "SASL_SSL", "SSL"])
def test_ingest_gets_what_kafka_python_gets(
    protocol: str, files: dict[str, str], tmp_path: Path
) -> None:
    values = {**(LOGIN if "SASL" in protocol else SERVERS), "kafka_security_protocol": protocol}
    if "SSL" in protocol:
        values["kafka_ca_file"] = files["ca"]
    settings = read(values, tmp_path)
    ours, theirs = security.client_options(settings), consumer_options(settings, "member")
    contexts = ours.pop("ssl_context", None), theirs.pop("ssl_context", None)
    assert ours.items() <= theirs.items() and ours["security_protocol"] == protocol
    assert all(isinstance(context, ssl.SSLContext) for context in contexts) == ("SSL" in protocol)
    assert SECRET not in repr(settings)


def test_a_missing_right_is_known_in_all_its_forms() -> None:
    from kafka import errors

    denied = (
        errors.TopicAuthorizationFailedError("clicks"),
        errors.GroupAuthorizationFailedError("g"),
        errors.TransactionalIdAuthorizationFailedError(),
        errors.KafkaError("Unexpected error in …: [Error 31] ClusterAuthorizationFailedError"),
    )
    settings = Settings(kafka_bootstrap_servers="127.0.0.1:1", kafka_sasl_username="ann")
    for error in denied:
        assert isinstance(clients.translate_error(settings, error), KafkaRefused)
    away = clients.translate_error(settings, errors.KafkaTimeoutError("slow"), "topic t")
    assert isinstance(away, KafkaUnavailable) and str(away).startswith("topic t: KafkaTimeoutError")


# A server that is none: each connection is answered by `answer(what was read)`, then closed.


@contextlib.contextmanager
def server(answer: Callable[[bytes], bytes | None]) -> Iterator[Settings]:
    """answer: None keeps silent and the connection open."""
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    sent = answer(connection.recv(65_536))
                    if sent is None:
                        kept.append(connection)
                        continue
                    connection.sendall(sent)
                    connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield Settings(
                kafka_bootstrap_servers=f"127.0.0.1:{listening.getsockname()[1]}",
                kafka_timeout_ms=500,
            )
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            for connection in kept:
                connection.close()


def frame(content: bytes) -> bytes:
    return struct.pack(">i", len(content)) + content


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SSL"])
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\0",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        frame(b"123"),
        struct.pack(">i", -1),
        b"\xff" * 60_000,
    ],
)
def test_an_answer_that_is_none_of_kafkas_is_no_refusal(sent: bytes, protocol: Any) -> None:
    with server(lambda _: sent) as settings, pytest.raises(KafkaUnavailable):
        diagnostics.check_connection(
            msgspec.structs.replace(settings, kafka_security_protocol=protocol)
        )


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SSL"])
def test_a_server_that_keeps_silent_is_waited_for_no_longer_than_a_call_may_take(
    protocol: Any,
) -> None:
    with server(lambda _: None) as settings:
        settings = msgspec.structs.replace(settings, kafka_security_protocol=protocol)
        begun = time.monotonic()
        with pytest.raises(KafkaUnavailable):
            diagnostics.check_connection(settings)
        # The server never answers; the margin is for a busy machine.
        assert 0.4 < time.monotonic() - begun < 20


def test_the_limit_of_an_answer() -> None:
    limit = diagnostics._ANSWER_BYTES_MAX
    for size, accepted in (
        (limit - 1, True),
        (limit, True),
        (limit + 1, False),
        (2**31 - 1, False),
    ):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(5)
            theirs.settimeout(5)
            answer = struct.pack(">ii", size, 1) + b"\0" * (min(size, limit) - 4)
            sender = threading.Thread(target=theirs.sendall, args=(answer,))
            sender.start()
            if accepted:
                assert diagnostics.Wire(ours).call(ApiVersionsRequest(version=0)).error_code == 0
            else:
                with pytest.raises(diagnostics._NotKafka):
                    diagnostics.Wire(ours).call(ApiVersionsRequest(version=0))
                ours.recv(limit, socket.MSG_WAITALL)
            sender.join(5)


def test_addresses_without_a_host_or_a_good_port_are_no_refusal() -> None:
    for address in ("", "nowhere:port", "127.0.0.1:1", "a.invalid:9092,"):
        with pytest.raises(KafkaUnavailable):
            diagnostics.check_connection(
                Settings(kafka_bootstrap_servers=address, kafka_timeout_ms=300)
            )


def test_one_broker_that_lets_us_in_is_enough() -> None:
    versions, state = struct.pack(">hi", 0, 0), struct.pack(">hi", 34, 0)

    def broker(sent: bytes) -> bytes:
        correlation_id = sent[8:12]
        return frame(correlation_id + (versions if sent[4:6] == b"\0\x12" else state))

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    for _ in range(2):
                        connection.sendall(broker(connection.recv(4_096)))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        diagnostics.check_connection(
            Settings(kafka_bootstrap_servers=f"127.0.0.1:1,127.0.0.1:{listening.getsockname()[1]}")
        )
        thread.join(5)


def test_the_password_is_in_no_log_line(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    with server(lambda _: b"") as at:
        settings = read(LOGIN | {"kafka_bootstrap_servers": at.kafka_bootstrap_servers}, tmp_path)
        with pytest.raises(KafkaUnavailable):
            clients.connect(
                msgspec.structs.replace(settings, kafka_timeout_ms=300), producers.KafkaProducer
            )
    assert SECRET not in caplog.text
