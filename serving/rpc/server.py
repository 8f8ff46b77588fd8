"""The gRPC server around the services: threads, limits, health, reflection, port."""

from __future__ import annotations

import errno
import socket
import time
from typing import Literal

import grpc
from grpc_health.v1 import health_pb2_grpc

from eddyline import addresses
from eddyline.errors import SettingsError
from eddyline.schema.events import ID_BYTES_MAX
from eddyline.settings.answers import LIMITS_MAX
from eddyline.settings.loader import Settings
from index.filters import LIST_IDS_MAX, RANGES_MAX, TERMS_MAX, TEXT_VALUES_MAX
from serving.proto import shard_pb2, shard_pb2_grpc
from serving.rpc import (
    call_pools,
    converters,
    health,
    retrieval_service,
    server_reflection,
    shard_service,
)
from serving.rpc.call_pools import CallPool, CallPools
from serving.rpc.health import NOT_SERVING, SERVING
from serving.rpc.retrieval_service import NAME, RetrievalService
from serving.rpc.shard_service import ShardService
from serving.rules import cursor

# An id or a name on the wire: tag, length and two bytes of bounds around it.
_TEXT_BYTES = ID_BYTES_MAX + 8
# The largest request whose fields are all within their limits, and room for an error message about
# one that is not: two lists of ids, five of terms, texts of attributes, ranges, the session,
# limits, the cursor and the user.
REQUEST_BYTES_MAX = (
    (2 * LIST_IDS_MAX + 5 * TERMS_MAX) * _TEXT_BYTES
    + 2 * RANGES_MAX * (TEXT_VALUES_MAX + 1) * _TEXT_BYTES
    + RANGES_MAX * (_TEXT_BYTES + 32)
    + converters.SESSION_EVENTS_MAX * 2 * _TEXT_BYTES
    + LIMITS_MAX * _TEXT_BYTES
    + cursor.CHARS_MAX
    + 64 * 1024
)
# A batch of requests, most of which are far from their limits.
BATCH_BYTES_MAX = 8 * 1024 * 1024
# A request of a coordinator has the same filters, and in addition the items of a user's history
# twice (excluded, and what the vector was made of), or a piece of the popular list, and what rules
# bar: about as much again in filters, and the items that it leaves out.
SHARD_REQUEST_BYTES_MAX = 2 * REQUEST_BYTES_MAX + (
    shard_service.IDS_MAX + 2 * shard_service.EXCLUDED_MAX
) * (_TEXT_BYTES + 10)
# Health and Stats are short; so many may wait.
CONTROL_CALLS_MAX = 64
# An idle connection is asked whether it lives, and ended if it does not answer.
KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 60_000, 20_000
# Clients may ask as often as this; one that asks more often loses its connection.
CLIENT_KEEPALIVE_MS_MIN = 10_000
# A connection is replaced after this time, so no stream is open for longer; its running calls have
# this long to end. gRPC varies the age by a tenth.
CONNECTION_AGE_MS, CONNECTION_GRACE_MS = 1_800_000, 120_000
SHARD_NAME = shard_pb2.DESCRIPTOR.services_by_name["Shard"].full_name


class PortTaken(SettingsError):
    """The address of the settings cannot be bound."""


# The processes of a killed keeper notice it within a second, and end with their running calls.
LEAVE_S = 10.0


class SharedPort:
    """The worker's port, reserved for the processes of one worker; this one does not listen."""

    def __init__(self, settings: Settings, wait_s: float = LEAVE_S) -> None:
        """Raises PortTaken, also if other processes share it and do not leave within `wait_s`."""
        host, number = addresses.bare_host(settings.worker_host), settings.worker_port
        deadline = time.monotonic() + wait_s
        while True:
            try:
                self._socket, port = _reserve(host, number)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    address = addresses.joined(host, number)
                    raise PortTaken(_taken(address, "worker")) from None
            time.sleep(LEAVE_S / 50)
        self.address = addresses.joined(host, port)

    def close(self) -> None:
        """Release the port."""
        self._socket.close()


class WorkerServer:
    """A started server; its health is NOT_SERVING until `set_serving`. Thread rule: any thread."""

    def __init__(
        self,
        settings: Settings,
        service: RetrievalService,
        shard: ShardService | None = None,
        *,
        role: Literal["worker", "coordinator"] = "worker",
        port: SharedPort | None = None,
    ) -> None:
        """Bind and start. Raises PortTaken.

        shard: answers a coordinator; None: the server has no shard service
        role:  whose host and port of the settings to bind
        port:  shared with the other processes of this worker, instead of the one of the settings
        """
        threads = settings.worker_threads
        host = addresses.bare_host(getattr(settings, f"{role}_host"))
        part = shard is not None and not shard.assignment.whole
        # A worker of one shard does not answer users: its Retrieval stays NOT_SERVING.
        self._served = ("", SHARD_NAME if part else NAME)
        # As many calls may wait as run at a time; further ones get RESOURCE_EXHAUSTED.
        # A coordinator's calls wait for its shards.
        at_first = threads if role == "coordinator" else settings.worker_first_threads
        queries = CallPool("query", threads, 2 * threads, at_first=at_first)
        watches = CallPool("watch", health.WATCH_THREADS, health.WATCHES_MAX)
        self._pools = CallPools(queries, _other_pools(threads, watches))
        self._server = grpc.server(
            queries,
            interceptors=[self._pools],
            options=[
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", CLIENT_KEEPALIVE_MS_MIN),
                ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
                ("grpc.max_connection_age_grace_ms", CONNECTION_GRACE_MS),
                # Off for one process: a second worker on this port would take half of the calls.
                ("grpc.so_reuseport", int(port is not None)),
                (
                    "grpc.max_receive_message_length",
                    BATCH_BYTES_MAX
                    if shard is None
                    else max(
                        BATCH_BYTES_MAX, SHARD_REQUEST_BYTES_MAX + 2 * settings.k_max * _TEXT_BYTES
                    ),
                ),
            ],
        )
        self._health = health.HealthService(watches.submit)
        retrieval_service.add_to_server(service, self._server)
        names = [NAME, health.SERVICE_NAME]
        if shard is not None:
            add_shard = shard_pb2_grpc.add_ShardServicer_to_server
            add_shard(shard, self._server)  # type: ignore[no-untyped-call]
            names.append(SHARD_NAME)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        server_reflection.add_to_server(names, self._server)
        for name in {"", NAME, *self._served}:
            self._health.set(name, NOT_SERVING)
        number: int = getattr(settings, f"{role}_port")
        address = addresses.joined(host, number) if port is None else port.address
        try:
            bound = self._server.add_insecure_port(address)
        except RuntimeError:
            bound = 0
        if not bound:
            raise PortTaken(_taken(address, role))
        self.address = addresses.joined(host, bound)
        self._server.start()

    def set_serving(self, serving: bool) -> None:
        """Set the health of the server as a whole and of the service that it offers."""
        for name in self._served:
            self._health.set(name, SERVING if serving else NOT_SERVING)

    def stop(self, grace_s: float) -> None:
        """Refuse new calls, let the running ones end, cancel them after `grace_s`."""
        self._health.stop()
        self._server.stop(grace_s).wait(grace_s + 1)
        self._pools.close()


def _other_pools(threads: int, watches: CallPool) -> dict[str, CallPool]:
    """Full method name -> its pool, for calls that must not use a query's thread.

    threads: of the calls of coordinators; as many may wait
    """
    shards = CallPool("shard", threads, 2 * threads)
    streams = call_pools.REFLECTION_STREAMS_MAX
    reflections = CallPool("reflection", streams, streams)
    return {
        f"/{health.SERVICE_NAME}/Check": CallPool("health", 1, CONTROL_CALLS_MAX),
        f"/{health.SERVICE_NAME}/Watch": watches,
        f"/{NAME}/Stats": CallPool("stats", 1, CONTROL_CALLS_MAX),
        f"/{SHARD_NAME}/Vectors": shards,
        f"/{SHARD_NAME}/Candidates": shards,
        f"/{SHARD_NAME}/Terms": shards,
    } | {f"/{name}/ServerReflectionInfo": reflections for name in server_reflection.SERVICE_NAMES}


def _reserve(host: str, port: int) -> tuple[socket.socket, int]:
    """(a socket that reserves the port for all that share it, its number). Raises OSError."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        alone.bind(address)
        found = alone.getsockname()
    kept = socket.socket(family, kind)
    try:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        kept.bind(found)
    except BaseException:
        kept.close()
        raise
    return kept, int(found[1])


def _taken(address: str, role: str) -> str:
    return (
        f"{address} cannot be bound: another process listens there, or it is not this machine's; "
        f"set EDDYLINE_{role.upper()}_PORT (0 takes a free one)"
    )
