"""`eddyline init`: from five answers to `eddyline.toml`, maps of files, and a running system."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cli.commands import import_files, servers
from cli.console import console
from eddyline.errors import SettingsError
from eddyline.settings.loader import data_folder, load

FILE = "eddyline.toml"


@dataclass(frozen=True)
class Answers:
    """What the command needs to know. kafka, redis: empty for a local server"""

    kafka: str = ""
    redis: str = ""
    data_dir: str = ".eddyline"
    files: str = ""
    start: bool = True


def asked(given: Answers, ask: Callable[[str, str], str]) -> Answers:
    """The answers to five questions. ask: from a question and its default to the answer"""
    return Answers(
        kafka=ask("Kafka, host:port (empty: a local one)", given.kafka),
        redis=ask("Redis, redis://host:port/0 (empty: a local one)", given.redis),
        data_dir=ask("Folder for data", given.data_dir),
        files=ask("Files to import, separated by blanks (empty: none)", given.files),
        start=ask("Start ingest and worker now, yes or no", "yes" if given.start else "no")
        .lower()
        .startswith("y"),
    )


def init(answers: Answers, folder: Path) -> None:
    """Write the settings and the maps, start what is missing, and name the next command.

    folder: gets `eddyline.toml`, which must not exist
    Raises SettingsError, UnreadableFile, LocalServerError; the maps that were written stay.
    """
    path = folder / FILE
    if path.exists():
        raise SettingsError(f"{path}: exists already: edit it, or remove it first")
    try:
        names = shlex.split(answers.files)
    except ValueError as error:
        raise SettingsError(f"files {answers.files!r}: {error}") from None
    for name in names:
        plan = import_files.plan(Path(name), import_files.Options())
        console.print(f"{name}: {', '.join(plan.topics)}, by the map {plan.file_map.name}")
    text = "".join(
        f"{name} = {json.dumps(value)}\n"
        for name, value in (
            ("kafka_bootstrap_servers", answers.kafka.strip()),
            ("redis_url", answers.redis.strip()),
            ("data_dir", answers.data_dir.strip()),
        )
        if value
    )
    try:
        # A URL of Redis may have a password in it.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(text.encode())
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    try:
        settings = load(folder=folder)
    except SettingsError:
        path.unlink()
        raise
    console.print(f"written: {path}")
    data_folder(settings)
    if answers.start:
        servers.up(settings, processes=["ingest", "worker"])
    else:
        console.print("then: eddyline up --with ingest,worker")
    files = shlex.join(names) or "FILE…"
    console.print(f"then: eddyline import {files} --train")
