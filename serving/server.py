"""The gRPC server around the service: threads, limits, health, reflection, its port."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from eddyline.errors import EddylineError
from eddyline.settings import Settings
from serving.proto import retrieval_pb2, retrieval_pb2_grpc
from serving.service import Service

# A good request has about 300 bytes; a user id of 10 kB still gets a sentence, not a cut connection.
REQUEST_BYTES_MAX = 64 * 1024
NAME = retrieval_pb2.DESCRIPTOR.services_by_name["Retrieval"].full_name
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class PortTaken(EddylineError):
    """The address cannot be bound."""


class WorkerServer:
    """A started server; its health is NOT_SERVING until told otherwise. Thread rule: any thread."""

    def __init__(self, settings: Settings, service: Service) -> None:
        """Bind and start. Raises PortTaken."""
        threads = settings.worker_threads
        self._server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="query"),
            # As many as are answered at a time may wait; whoever comes then gets RESOURCE_EXHAUSTED.
            maximum_concurrent_rpcs=2 * threads,
            options=[
                # Off, or a second worker on the same port would take half of the first one's calls.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
            ],
        )
        # A health watch stays open; non-blocking, or each would hold one of the threads.
        self._health = health.HealthServicer(
            experimental_non_blocking=True, experimental_thread_pool=ThreadPoolExecutor(1, "health")
        )
        add_service = retrieval_pb2_grpc.add_RetrievalServicer_to_server
        add_service(service, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.set_serving(False)
        wanted = f"{settings.worker_host}:{settings.worker_port}"
        try:
            port = self._server.add_insecure_port(wanted)
        except RuntimeError:
            port = 0
        if not port:
            raise PortTaken(
                f"{wanted} cannot be bound: another process listens there, or it is not this machine's; "
                "set EDDYLINE_WORKER_PORT (0 takes a free one)"
            )
        self.address = f"{settings.worker_host}:{port}"
        self._server.start()

    def set_serving(self, serving: bool) -> None:
        """What the health service answers, for the server as a whole and for Retrieval."""
        for name in ("", NAME):
            self._health.set(name, SERVING if serving else NOT_SERVING)

    def stop(self, grace_s: float) -> None:
        """Take no more calls, let the running ones end, cut them after `grace_s`."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_s).wait(grace_s + 1)
