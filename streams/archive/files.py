"""Complete or absent: how a file gets its place, and how users are taken out of files that have theirs."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from eddyline.archive import Archive, ArchiveFile, Forgotten, without
from eddyline.kafka import CLICKS, USERS

# What a process of another machine left half-written this long ago is nobody's any more.
_ABANDONED_S = 2 * 86_400


def partial_path(archive: Archive, name: str) -> Path:
    """Where this process may write a file that is not complete yet; the folder is there."""
    folder = archive.partials()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{socket.gethostname()}@{os.getpid()}@{name}"


def remove_abandoned(archive: Archive) -> int:
    """Remove what dead processes left half-written; how many files. To be called before the first file."""
    removed, host = 0, socket.gethostname()
    for path in archive.partials().glob("*@*@*"):
        owner, pid, _ = path.name.split("@", 2)
        try:
            abandoned = time.time() - path.stat().st_mtime > _ABANDONED_S
            if abandoned or (owner == host and not _lives(int(pid))):
                path.unlink()
                removed += 1
        except (FileNotFoundError, ValueError):
            continue
    return removed


def put(archive: Archive, partial: Path, path: str) -> None:
    """Give a complete file its place, at once: a rename, or one upload. What lies there is replaced.

    Returns once the file is on the disk (or stored). Raises OSError; then the place is as it was.
    """
    if not archive.is_local:
        archive.fs.put_file(str(partial), path)
        partial.unlink()
        return
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    _sync(str(partial))
    os.replace(partial, path)
    _sync(folder)


def forget(
    archive: Archive,
    forgotten: Mapping[str, Forgotten],
    partition: int,
    beat: Callable[[], None] = lambda: None,
) -> tuple[int, int]:
    """Rewrite each file of the partition that has rows of these users; (files rewritten, rows removed).

    forgotten: user id -> up to where his rows go; beat: called for every file looked at
    A file keeps its name. Raises OSError; a file is then as it was or as it should be.
    """
    files = rows = 0
    for topic in (CLICKS, USERS):
        for file in archive.files(topic, partition):
            beat()
            if _has(archive, file, forgotten):
                partial = partial_path(archive, f"{topic}-{os.path.basename(file.path)}")
                with archive.fs.open(file.path, "rb") as source:
                    removed = without(source, partial, topic, forgotten.get)
                if removed:
                    put(archive, partial, file.path)
                    files, rows = files + 1, rows + removed
                else:
                    partial.unlink()
    return files, rows


def _has(archive: Archive, file: ArchiveFile, forgotten: Mapping[str, Forgotten]) -> bool:
    """Whether one of these users is in the file: his column's pages are read, and of few groups only."""
    import pyarrow.parquet as pq

    with archive.fs.open(file.path, "rb") as opened, pq.ParquetFile(opened) as parquet:
        column = parquet.schema_arrow.get_field_index("user_id")
        for number in range(parquet.num_row_groups):
            within = parquet.metadata.row_group(number).column(column).statistics
            if within is not None and within.has_min_max:
                if not any(within.min <= user <= within.max for user in forgotten):
                    continue
            users = parquet.read_row_group(number, columns=["user_id"]).column(0).unique().to_pylist()
            if not forgotten.keys().isdisjoint(users):
                return True
    return False


def _lives(pid: int) -> bool:
    """Whether another process of this machine has this number; our own is of before, if we just started."""
    return pid != os.getpid() and Path("/proc", str(pid)).exists()


def _sync(path: str) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
