"""A primary that is demoted under kept connections is left; Sentinel names the next one."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import redis

from eddyline.errors import EddylineError
from eddyline.settings.loader import Settings
from eddyline.stores import layout, redis_client
from eddyline.stores.redis import RedisStore
from sandbox.servers import free_ports, valkey
from tests.integration.redis_servers import Server, wait_for
from tests.integration.test_crashes import assert_same_state, send_history

# The limit, and some time for a machine that has other work.
LEFT_S, SLACK_S = 2.0, 2.0
SERVICE = "the-state.1"


class Address:
    """One address in front of servers, as a load balancer has it: kept connections stay."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self.server.port))
                self._sockets += [client, server]
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65_536):
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listening.close()
        for one in self._sockets:
            one.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    """A primary and its replica."""
    ports = free_ports.choose_ports(tmp_path, ("primary", "replica"))
    options = {"repl-diskless-sync-delay": "0"}
    primary = Server(tmp_path / "primary", ports["primary"], options)
    follows = {"replicaof": f"127.0.0.1 {ports['primary']}"}
    replica = Server(tmp_path / "replica", ports["replica"], options | follows)
    try:
        primary.start()
        replica.start()
        wait_for("the replica", lambda: linked(replica))
        yield primary, replica
    finally:
        primary.kill()
        replica.kill()


def linked(replica: Server) -> bool:
    with contextlib.suppress(redis.RedisError), replica.client() as client:
        return client.info("replication").get("master_link_status") == "up"
    return False


def switch(primary: Server, replica: Server) -> None:
    """Change the roles, as an operator or a managed service does."""
    with primary.client() as one, replica.client() as other:
        other.replicaof("NO", "ONE")
        one.replicaof("127.0.0.1", replica.port)
        other.set("who", "the second")


@pytest.mark.parametrize("writes", [True, False])
def test_a_demoted_primary_is_left_within_two_seconds(
    pair: tuple[Server, Server], writes: bool
) -> None:
    primary, replica = pair
    address = Address(primary)
    settings = Settings(redis_url=f"redis://127.0.0.1:{address.port}/0")
    clients = [redis_client.client(settings) for _ in range(3)]
    try:
        clients[0].set("who", "the first")
        wait_for("the copy", lambda: all(client.get("who") == b"the first" for client in clients))
        address.server = replica
        switch(primary, replica)
        switched_s = time.monotonic()

        def at_the_second(client: redis.Redis) -> bool:
            with contextlib.suppress(redis.RedisError):
                if writes:
                    return bool(client.set("mine", "x"))
                return client.get("who") == b"the second"
            return False

        for client in clients:
            wait_for("the second server", lambda client=client: at_the_second(client))  # type: ignore[misc]
        assert time.monotonic() - switched_s < LEFT_S + SLACK_S
        with replica.client() as client:
            assert client.get("mine") == (b"x" if writes else None)
    finally:
        for client in clients:
            client.close()
        address.close()


def test_a_demoted_primary_without_a_successor_is_unavailable_not_old(
    pair: tuple[Server, Server],
) -> None:
    """Its address still leads to it: an old answer would look like a fresh one."""
    primary, replica = pair
    settings = Settings(redis_url=f"redis://127.0.0.1:{primary.port}/0")
    store = RedisStore(settings)
    try:
        store.claim_layout(layout.layout(settings))
        switch(primary, replica)
        deadline, errors = time.monotonic() + LEFT_S + SLACK_S, list[EddylineError]()
        while time.monotonic() < deadline and len(errors) < 20:
            try:
                store.layout()
                errors.clear()
            except EddylineError as error:
                errors.append(error)
            time.sleep(0.02)
        assert len(errors) == 20
        assert all("replica" in str(error) for error in errors)
    finally:
        store.close()


@pytest.fixture
def sentinel(pair: tuple[Server, Server], tmp_path: Path) -> Iterator[Server]:
    """One Sentinel with a password, which is enough to decide."""
    primary, _ = pair
    port = free_ports.choose_ports(tmp_path, ("sentinel",))["sentinel"]
    folder = tmp_path / "sentinel"
    folder.mkdir()
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\nrequirepass watchful\n"
        f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} 1\n"
        f"sentinel down-after-milliseconds {SERVICE} 1000\n"
        f"sentinel failover-timeout {SERVICE} 3000\n",
        encoding="utf-8",
    )
    server = Server(folder, port, {})
    server._argv = [str(valkey.program()[0]), str(config), "--sentinel"]
    server.start()

    def knows_both() -> bool:
        with contextlib.suppress(redis.RedisError), server.client(password="watchful") as client:
            found: Any = client.execute_command("SENTINEL MASTER", SERVICE)
            return int(found["num-slaves"]) == 1
        return False

    try:
        wait_for("Sentinel to know both", knows_both)
        yield server
    finally:
        server.kill()


def answers(settings: Settings) -> bool:
    store = RedisStore(settings)
    with contextlib.suppress(EddylineError), contextlib.closing(store):
        return store.layout() is not None
    return False


@pytest.mark.long
def test_what_sentinel_calls_the_primary_is_followed_and_nothing_is_lost(
    pair: tuple[Server, Server], sentinel: Server, fresh_settings: Settings, make_live: Any
) -> None:
    primary, replica = pair
    url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/{SERVICE}/0"
    settings = msgspec.structs.replace(
        fresh_settings, redis_url=url, redis_sentinel_password="watchful"
    )
    live = make_live(SimpleNamespace(settings=settings))
    send_history(live)
    live.applied(60)
    send_history(live, times=2)
    primary.kill()
    with replica.client() as client:
        wait_for("the failover", lambda: client.info("replication")["role"] == "master", 30)
        wait_for("Sentinel to name the new primary", lambda: answers(settings), 30)
        live.applied(90)
        assert assert_same_state(live) > 0
        assert client.dbsize() > 0
    # The dead one comes back and becomes a replica; nothing changes for us.
    primary.start()
    wait_for("the old primary to follow", lambda: linked(primary), 30)
    send_history(live)
    live.applied(60)
    assert assert_same_state(live) > 0


def test_a_wrong_password_of_sentinel_is_a_sentence(sentinel: Server) -> None:
    url = f"redis+sentinel://127.0.0.1:{sentinel.port}/{SERVICE}"
    store = RedisStore(Settings(redis_url=url, redis_sentinel_password="careless"))
    with pytest.raises(EddylineError) as caught:
        store.check()
    message = str(caught.value)
    assert "careless" not in message
    assert f"Sentinel names no primary {SERVICE!r}" in message
    assert "WRONGPASS" in message or "AuthenticationError" in message
    assert len(message) < 300
    store.close()
