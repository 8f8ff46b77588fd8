"""Real servers that a test sets up itself: a cluster of Valkey processes, one with users, one
behind TLS.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from sandbox.servers import free_ports, supervisor, valkey

# A node that is silent for so long is taken for dead by the others.
NODE_TIMEOUT_MS = 2_000
MEET_AGAIN_S = 2.0
SLOTS = 16_384


class Server:
    """One server process on the loopback address. It ends with this process."""

    def __init__(
        self, folder: Path, port: int, options: dict[str, str], program: Path | None = None
    ) -> None:
        self.port = port
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        program = program or valkey.program()[0]
        kept = {
            "bind": "127.0.0.1",
            "port": str(port),
            "dir": str(folder),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
        }
        self._argv = [
            str(program),
            *(a for k, v in (kept | options).items() for a in (f"--{k}", v)),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def as_tls(self) -> None:
        """Listen with TLS only."""
        at = self._argv.index("--port")
        self._argv[at : at + 2] = ["--port", "0", "--tls-port", str(self.port)]

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self, **options: object) -> redis.Redis:
        retry = Retry(NoBackoff(), 0)
        return redis.Redis(port=self.port, socket_timeout=5, retry=retry, protocol=2, **options)  # type: ignore[arg-type]

    def start(self) -> None:
        """Start it and wait until it listens (it may still be loading its file)."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(supervisor.SHIM), str(os.getpid()), *self._argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        wait_for(f"{self.name} to listen", lambda: not free_ports.is_free(self.port))

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


class RealCluster:
    """Several servers that form one cluster, the slots shared out evenly over the primaries."""

    def __init__(
        self, folder: Path, primaries: int, replicas: int, options: dict[str, str]
    ) -> None:
        count = primaries * (1 + replicas)
        names = tuple(f"{kind}{n}" for n in range(count) for kind in ("node", "bus"))
        chosen = free_ports.choose_ports(folder, names)
        self.primaries = primaries
        self.servers = [
            Server(
                folder / f"node{n}",
                chosen[f"node{n}"],
                {
                    "cluster-enabled": "yes",
                    "cluster-config-file": "nodes.conf",
                    "cluster-port": str(chosen[f"bus{n}"]),
                    "cluster-node-timeout": str(NODE_TIMEOUT_MS),
                    "cluster-allow-replica-migration": "no",
                    "repl-diskless-sync-delay": "0",
                }
                | options,
            )
            for n in range(count)
        ]
        self._buses = [chosen[f"bus{n}"] for n in range(count)]

    @property
    def url(self) -> str:
        return "redis://" + ",".join(server.name for server in self.servers) + "/0"

    def start(self) -> None:
        for server in self.servers:
            server.start()
        clients = [server.client() for server in self.servers]
        ids = [str(client.execute_command("CLUSTER MYID"), "ascii") for client in clients]
        for n, client in enumerate(clients):
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", n + 1)
            if n < self.primaries:
                first, after = n * SLOTS // self.primaries, (n + 1) * SLOTS // self.primaries
                client.execute_command("CLUSTER ADDSLOTSRANGE", first, after - 1)
        met_at = 0.0

        def met() -> bool:
            """Introduce every node to every other, and again after a while: one may be missed."""
            nonlocal met_at
            if all(map(self._known, clients)):
                return True
            if time.monotonic() - met_at > MEET_AGAIN_S:
                met_at = time.monotonic()
                for n, client in enumerate(clients):
                    for other, bus in zip(self.servers[:n], self._buses, strict=False):
                        client.execute_command("CLUSTER MEET", "127.0.0.1", other.port, bus)
            return False

        wait_for("the nodes to know each other", met, 30)
        for n in range(self.primaries, len(clients)):
            clients[n].execute_command("CLUSTER REPLICATE", ids[n % self.primaries])
        for client in clients:
            client.close()
        self.wait_ok()

    def wait_ok(self, timeout_s: float = 60) -> None:
        """Wait until every running node reports a whole cluster with linked replicas."""
        running = {server.port for server in self.servers if server._process is not None}
        wait_for(
            "the cluster to be whole",
            lambda: all(self._ok(server, running) for server in self.servers),
            timeout_s,
        )

    def owner(self, tag: str) -> Server:
        """The server whose slots hold this tag, as the first server that answers sees it."""
        for server in self.servers:
            with contextlib.suppress(redis.RedisError), server.client() as client:
                slot = int(client.execute_command("CLUSTER KEYSLOT", f"{{{tag}}}"))
                for first, last, primary, *_ in client.execute_command("CLUSTER", "SLOTS"):
                    if first <= slot <= last:
                        return next(s for s in self.servers if s.port == primary[1])
        raise AssertionError("no server of the cluster answers")

    def tags(self, tags: Sequence[str]) -> dict[str, Server]:
        return {tag: self.owner(tag) for tag in tags}

    def stop(self) -> None:
        for server in self.servers:
            server.kill()

    def _known(self, client: redis.Redis) -> bool:
        rows = client.execute_command("CLUSTER NODES").values()
        known = [row for row in rows if not {"handshake", "noaddr"} & {*row["flags"].split(",")}]
        return len(known) == len(self.servers)

    @staticmethod
    def _ok(server: Server, running: set[int]) -> bool:
        if server._process is None:
            return True
        try:
            with server.client() as client:
                if client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
                    return False
                rows = client.execute_command("CLUSTER", "SLOTS")
                if {node[1] for row in rows for node in row[2:]} != running:
                    return False
                info = client.info("replication")
                return info["role"] == "master" or info["master_link_status"] == "up"
        except redis.RedisError:
            return False


def wait_for(what: str, check: Callable[[], object], timeout_s: float = 60) -> None:
    """Poll until the check returns something true."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for: {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def real_cluster(
    folder: Path, *, primaries: int = 3, replicas: int = 0, **options: str
) -> Iterator[RealCluster]:
    """A cluster on loopback that ends with the block. options: the server's, `_` for `-`."""
    made = RealCluster(
        folder, primaries, replicas, {k.replace("_", "-"): v for k, v in options.items()}
    )
    try:
        made.start()
        yield made
    finally:
        made.stop()


@contextlib.contextmanager
def real_server(folder: Path, **options: str) -> Iterator[Server]:
    """One server on loopback; it ends with the block."""
    chosen = free_ports.choose_ports(folder, ("server", "bus"))
    port = chosen["server"]
    if options.get("cluster_enabled") == "yes":
        # The default, 10,000 above the server's, may be the port of a client's connection.
        options["cluster_port"] = str(chosen["bus"])
    made = Server(folder / "server", port, {k.replace("_", "-"): v for k, v in options.items()})
    try:
        made.start()
        wait_for("the server to answer", lambda: valkey.answers(port) or "requirepass" in options)
        yield made
    finally:
        made.kill()


@contextlib.contextmanager
def tls_terminator(port: int, context: ssl.SSLContext) -> Iterator[int]:
    """A port on loopback that speaks TLS and hands what is inside to a server that was built
    without it.

    Certificates, keys and handshakes are real; the bundled server is such a one.
    """
    stop, threads = threading.Event(), list[threading.Thread]()

    def serve(outer: socket.socket) -> None:
        # A refused handshake and a client that breaks off are what the tests ask for.
        with outer, contextlib.suppress(OSError):
            outer.settimeout(5)
            with context.wrap_socket(outer, server_side=True) as tls:
                with socket.create_connection(("127.0.0.1", port), 5) as inner:
                    pump(tls, inner)

    def pump(tls: ssl.SSLSocket, inner: socket.socket) -> None:
        while not stop.is_set():
            ready = [tls] if tls.pending() else select.select([tls, inner], [], [], 0.1)[0]
            for source in ready:
                piece = source.recv(65_536)
                if not piece:
                    return
                (inner if source is tls else tls).sendall(piece)

    def accept() -> None:
        while not stop.is_set():
            if select.select([listening], [], [], 0.1)[0]:
                threads.append(threading.Thread(target=serve, args=(listening.accept()[0],)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listening.getsockname()[1]
        finally:
            stop.set()
            accepting.join(10)
            for thread in threads:
                thread.join(10)


def tls_program() -> Path | None:
    """A server on the PATH that was built with TLS; None where there is none."""
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is None:
            continue
        asked = subprocess.run(
            [found, "--port", "0", "--tls-port", "1", "--tls-cert-file", "/none"],
            capture_output=True,
            text=True,
            timeout=20,
            cwd="/",
        )
        # Both end at once: one without TLS says "failed finding TLS support", one with it misses a
        # file.
        if "Failed to configure TLS" in asked.stdout:
            return Path(found)
    return None
