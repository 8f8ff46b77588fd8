"""Connections and streams that stay open: health streams, pings, and the age of a connection."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from eddyline.settings.loader import Settings
from serving.rpc import health, server
from serving.rpc.client import open_channel
from serving.rpc.retrieval_service import RetrievalService
from serving.rpc.server import NAME, NOT_SERVING, SERVING, WorkerServer
from tests.unit.serving.direct_call import DirectCall

SETTINGS = Settings(worker_port=0)
# Of HTTP/2: types of frames.
SETTINGS_FRAME, HEADERS, PING, GOAWAY = 4, 1, 6, 7
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def wait_until(what: str, check: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for: {what}"
        time.sleep(0.01)


class Watching:
    """A stream of `Watch`; its statuses and its end."""

    def __init__(self, channel: grpc.Channel, name: str = "") -> None:
        self.statuses: list[int] = []
        self.code: grpc.StatusCode | None = None
        request = health_pb2.HealthCheckRequest(service=name)
        self.call = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=30)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            for response in self.call:
                self.statuses.append(response.status)
            self.code = grpc.StatusCode.OK
        except grpc.RpcError as error:
            self.code = error.code()


@pytest.fixture
def made() -> Iterator[WorkerServer]:
    one = WorkerServer(SETTINGS, RetrievalService(SETTINGS))
    yield one
    one.stop(1.0)


def check(channel: grpc.Channel, name: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=name)
    status: int = health_pb2_grpc.HealthStub(channel).Check(request, timeout=1).status
    return status


def test_a_stream_of_health_gets_every_change_and_its_end(made: WorkerServer) -> None:
    with open_channel(made.address) as channel:
        streams = [Watching(channel), Watching(channel, NAME), Watching(channel, "unknown")]
        wait_until("the first status", lambda: all(stream.statuses for stream in streams))
        made.set_serving(True)
        wait_until("the change", lambda: all(len(s.statuses) == 2 for s in streams[:2]))
        made.set_serving(True)  # no change, no message
        begun = time.monotonic()
        made.stop(5.0)
        for stream in streams:
            stream.thread.join(5)
        assert time.monotonic() - begun < 2, "open streams must not hold the end back"
        changes = [NOT_SERVING, SERVING, NOT_SERVING]
        assert [stream.statuses for stream in streams[:2]] == [changes, changes]
        assert streams[2].statuses == [health.SERVICE_UNKNOWN]
        assert {stream.code for stream in streams} == {grpc.StatusCode.OK}


def test_streams_of_health_are_limited_and_their_places_come_back(
    made: WorkerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "WATCHES_MAX", 3)
    with open_channel(made.address) as channel:
        streams = [Watching(channel) for _ in range(3)]
        wait_until("the streams", lambda: all(stream.statuses for stream in streams))
        refused = Watching(channel)
        refused.thread.join(5)
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert check(channel) == NOT_SERVING
        streams[0].call.cancel()
        streams[0].thread.join(5)
        last = Watching(channel)
        wait_until("the place", lambda: bool(last.statuses))
        for stream in (*streams, last):
            stream.call.cancel()


def test_nothing_is_serving_after_the_stop() -> None:
    """A coordinator's check of its shards may end later than the server begins to stop."""
    service = health.HealthService(lambda call, *args: call(*args))
    request = health_pb2.HealthCheckRequest()
    service.set("", SERVING)
    assert service.Check(request, DirectCall()).status == SERVING
    service.stop()
    service.set("", SERVING)
    assert service.Check(request, DirectCall()).status == NOT_SERVING


def test_an_unknown_service_is_not_found(made: WorkerServer) -> None:
    with open_channel(made.address) as channel, pytest.raises(grpc.RpcError) as failed:
        check(channel, "unknown")
    assert failed.value.code() is grpc.StatusCode.NOT_FOUND


class Raw:
    """A connection that speaks HTTP/2 by hand, with a flow-control window of its choice."""

    def __init__(self, address: str, window: int = 65_535) -> None:
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), timeout=0.2)
        self._bytes = b""
        setting = struct.pack("!HI", 4, window)
        self._socket.sendall(PREFACE + frame(SETTINGS_FRAME, setting))

    def ping(self) -> None:
        with suppress(OSError):  # `ended` finds out why
            self._socket.sendall(frame(PING, b"12345678"))

    def call(self, path: str, message: bytes, stream: int) -> None:
        """Send a request with literal headers, without indexing and without Huffman."""
        names = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "a",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        block = b"".join(
            b"\x00" + b"".join(bytes([len(part)]) + part.encode() for part in pair)
            for pair in names.items()
        )
        body = b"\x00" + struct.pack("!I", len(message)) + message
        sent = frame(HEADERS, block, flags=4, stream=stream) + frame(0, body, 1, stream)
        self._socket.sendall(sent)

    def ended(self) -> bytes | None:
        """The reason in GOAWAY, if one came, or the connection was closed."""
        try:
            while more := self._socket.recv(65_536):
                self._bytes += more
            return b"closed"
        except TimeoutError:
            pass
        except OSError:
            return b"closed"
        at = 0
        while at + 9 <= len(self._bytes):
            size = int.from_bytes(self._bytes[at : at + 3], "big")
            if self._bytes[at + 3] == GOAWAY:
                return self._bytes[at + 9 : at + 9 + size][8:]
            at += 9 + size
        return None

    def close(self) -> None:
        self._socket.close()


def frame(kind: int, payload: bytes, flags: int = 0, stream: int = 0) -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


def test_a_caller_that_does_not_read_stops_no_health_check(made: WorkerServer) -> None:
    raw = Raw(made.address, window=0)
    try:
        for stream in range(1, 2 * health.WATCH_THREADS + 4, 2):
            raw.call("/grpc.health.v1.Health/Watch", b"", stream)
        time.sleep(0.3)
        assert raw.ended() is None
        with open_channel(made.address) as channel:
            assert check(channel) == NOT_SERVING
            begun = time.monotonic()
            made.set_serving(True)
            assert time.monotonic() - begun < 5, "the caller never reads"
            assert check(channel) == SERVING
    finally:
        raw.close()


@pytest.mark.parametrize(("interval_s", "kept"), [(0.45, True), (0.03, False)])
def test_pings_are_allowed_at_the_documented_interval_and_not_faster(
    interval_s: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a call on the connection, as an idle client sends them."""
    assert server.CLIENT_KEEPALIVE_MS_MIN == 10_000
    monkeypatch.setattr(server, "CLIENT_KEEPALIVE_MS_MIN", 400)
    one = WorkerServer(SETTINGS, RetrievalService(SETTINGS))
    raw = Raw(one.address)
    try:
        for _ in range(8):
            raw.ping()
            time.sleep(interval_s)
        assert (raw.ended() is None) == kept
    finally:
        raw.close()
        one.stop(0.0)


def test_a_connection_is_replaced_at_its_age(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTION_AGE_MS", 500)
    monkeypatch.setattr(server, "CONNECTION_GRACE_MS", 300)
    one = WorkerServer(SETTINGS, RetrievalService(SETTINGS))
    try:
        with open_channel(one.address) as channel:
            stream = Watching(channel)
            wait_until("the end of the stream", lambda: stream.code is not None)
            assert stream.code is grpc.StatusCode.UNAVAILABLE
            assert check(channel) == NOT_SERVING  # the client connects again by itself
    finally:
        one.stop(0.0)
