"""Ports on the loopback address, kept in `<data_dir>/run/ports.json`; one that others took is replaced.

They lie below the range from which the kernel takes the ports of outgoing connections. In that range a client
that keeps trying a server which is down can connect to itself, and the server then never gets its port back.
"""

from __future__ import annotations

import random
import socket
import time
from pathlib import Path

import msgspec

from eddyline.errors import LocalServerError
from eddyline.process.files import read_if_exists, write_atomically

LOWEST = 15_000
# Linux' and the IANA's lower ends of the range of outgoing connections, for systems that do not tell.
EPHEMERAL_DEFAULT = 32_768
# A server that has just been killed with its supervisor may hold its port for some milliseconds more.
PATIENCE_S = 1.5
TRIES = 200


def choose_port(run_dir: Path, names: tuple[str, ...]) -> dict[str, int]:
    """A free port for each name: the kept one where it can be bound, else a new one, which is kept from now "
    "on.

    Raises LocalServerError where no port can be bound at all.
    """
    path = run_dir / "ports.json"
    kept = _kept(path)
    chosen: dict[str, int] = {}
    for name in names:
        port = kept.get(name)
        chosen[name] = (
            port
            if port and _becomes_free(port)
            else _new(set(kept.values()) | set(chosen.values()))
        )
    if {**kept, **chosen} != kept:
        write_atomically(path, msgspec.json.encode({**kept, **chosen}))
    return chosen


def is_free(port: int) -> bool:
    """Whether a server could bind 127.0.0.1:port now."""
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as servers do: TIME_WAIT does not count
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def _kept(path: Path) -> dict[str, int]:
    try:
        return msgspec.json.decode(read_if_exists(path) or b"{}", type=dict[str, int])
    except msgspec.DecodeError:
        return {}


def _becomes_free(port: int) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not (free := is_free(port)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return free


def _new(taken: set[int]) -> int:
    highest = _ephemeral_from() - 1
    for _ in range(TRIES):
        port = random.randint(min(LOWEST, highest // 2), highest)
        if port not in taken and is_free(port):
            return port
    raise LocalServerError(
        f"choosing a port: none of {TRIES} tried on 127.0.0.1 can be bound; is the loopback interface up?"
    )


def _ephemeral_from() -> int:
    try:
        low = int(
            Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0]
        )
    except (OSError, ValueError, IndexError):
        return EPHEMERAL_DEFAULT
    return low if low > 4_096 else EPHEMERAL_DEFAULT
