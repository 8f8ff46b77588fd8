"""The port that the processes of one worker share: reserved, never taken from another process."""

from __future__ import annotations

import socket
import sys
import threading
import time

import msgspec
import pytest

from eddyline.settings.loader import Settings
from serving.rpc.server import PortTaken, SharedPort

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux spreads connections")
ANY = Settings(worker_port=0)


def at(address: str) -> Settings:
    return msgspec.structs.replace(ANY, worker_port=int(address.rsplit(":", 1)[1]))


def test_it_is_kept_and_others_may_listen_who_share_it() -> None:
    port = SharedPort(ANY)
    host, number = port.address.split(":")
    with socket.socket() as sharing, socket.socket() as alone:
        sharing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sharing.bind((host, int(number)))
        sharing.listen()
        with pytest.raises(OSError):
            alone.bind((host, int(number)))
        with socket.create_connection((host, int(number)), timeout=5):
            pass
    port.close()


@pytest.mark.parametrize("shared", [0, 1])
def test_a_port_of_another_program_is_refused_shared_or_not(shared: int) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(PortTaken, match=f"{address} cannot be bound.*EDDYLINE_WORKER_PORT"):
            SharedPort(at(address), wait_s=0.3)


def test_it_waits_for_those_who_are_about_to_leave() -> None:
    first = SharedPort(ANY)
    leaving = threading.Timer(0.5, first.close)
    leaving.start()
    begun = time.monotonic()
    second = SharedPort(at(first.address), wait_s=10)
    assert second.address == first.address and 0.4 < time.monotonic() - begun < 5
    second.close()
    leaving.join()


def test_an_address_that_is_not_this_machines_is_refused_at_once() -> None:
    begun = time.monotonic()
    with pytest.raises(PortTaken):
        SharedPort(msgspec.structs.replace(ANY, worker_host="192.0.2.1"), wait_s=30)
    assert time.monotonic() - begun < 5
