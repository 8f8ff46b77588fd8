"""Ports on the loopback address, kept in `<data_dir>/run/ports.json`; a port in use is replaced.

They are below the kernel's range for outgoing connections: inside it, a client that keeps trying a
dead server can connect to itself, and the server never gets its port back.
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
# Linux's start of the range of outgoing connections, for systems that do not publish theirs.
EPHEMERAL_DEFAULT = 32_768
# A server that was just killed with its supervisor may hold its port for some milliseconds.
RELEASE_S = 1.5
TRIES = 200


def choose_ports(run_dir: Path, names: tuple[str, ...]) -> dict[str, int]:
    """A free port for each name: the kept port if it can be bound, else a new one, which is kept.

    Raises LocalServerError if no port can be bound at all.
    """
    path = run_dir / "ports.json"
    kept = _kept(path)
    chosen: dict[str, int] = {}
    for name in names:
        port = kept.get(name)
        if not port or not _becomes_free(port):
            port = _new_port({*kept.values(), *chosen.values()})
        chosen[name] = port
    if {**kept, **chosen} != kept:
        write_atomically(path, msgspec.json.encode({**kept, **chosen}))
    return chosen


def is_free(port: int) -> bool:
    """Whether a server could bind 127.0.0.1:port now."""
    with socket.socket() as probe:
        # As servers do: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
    deadline = time.monotonic() + RELEASE_S
    while not (free := is_free(port)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return free


def _new_port(used: set[int]) -> int:
    highest = _ephemeral_from() - 1
    for _ in range(TRIES):
        port = random.randint(min(LOWEST, highest // 2), highest)
        if port not in used and is_free(port):
            return port
    raise LocalServerError(
        f"choosing a port: none of {TRIES} tried on 127.0.0.1 can be bound; is the loopback "
        "interface up?"
    )


def _ephemeral_from() -> int:
    try:
        low = int(
            Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0]
        )
    except (OSError, ValueError, IndexError):
        return EPHEMERAL_DEFAULT
    return low if low > 4_096 else EPHEMERAL_DEFAULT
