"""Place complete files into the archive, and erase users from files that are placed.

A file is placed once: a later process with the same file finds it there, perhaps rewritten, and
leaves it. Files are rewritten under the archive's lock, so that two erasures at once do not undo
each other. The lock works between the processes of one machine; in an object store, a file that
another machine changed meanwhile is read again.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from eddyline.archive import MERGES, Archive, ArchiveFile, Forgotten
from eddyline.kafka.topics import CLICKS, USERS
from eddyline.process.files import move
from streams.archive.erasure import copy_without

# A partial file of another machine is abandoned after this time without a write.
_ABANDONED_S = 2 * 86_400
# The lock is held while one file is written, of at most a few hundred thousand rows: seconds.
LOCK_S_MAX = 60.0
_LOCK_POLL_S = 0.01
# Another machine would have to rewrite the file as often, each time between our read and write.
_TRIES = 5


def partial_path(archive: Archive, name: str) -> Path:
    """Where this process may write an incomplete file. Makes the folder."""
    folder = archive.partials()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{socket.gethostname()}@{os.getpid()}@{name}"


def remove_abandoned(archive: Archive) -> int:
    """Remove partial files of dead processes; how many.

    Call it before the first file is written.
    """
    removed, host = 0, socket.gethostname()
    for path in archive.partials().glob("*@*@*"):
        owner, pid, _ = path.name.split("@", 2)
        try:
            abandoned = time.time() - path.stat().st_mtime > _ABANDONED_S
            if abandoned or (owner == host and not _is_running(int(pid))):
                path.unlink()
                removed += 1
        except (FileNotFoundError, ValueError):
            continue
    return removed


@contextmanager
def locked(archive: Archive, timeout_s: float = LOCK_S_MAX) -> Iterator[None]:
    """Hold the archive's lock on this machine, to place or rewrite files.

    Raises TimeoutError (an OSError).
    """
    path = archive.lock_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout_s, poll_interval=_LOCK_POLL_S, fallback_to_soft=False)
    try:
        held = lock.acquire()
    except Timeout:
        raise TimeoutError(f"{path}: held by another process for {timeout_s:g} s") from None
    with held:
        yield


def place(archive: Archive, partial: Path, path: str) -> None:
    """Move a complete file to its path, unless a file is there. The caller holds the lock.

    Returns once the file is on disk (or stored). Raises OSError; then the path is as it was.
    """
    if archive.fs.exists(path):
        # Another process was faster, with the same rows less those of users forgotten since.
        partial.unlink()
        return
    _replace(archive, partial, path)


def _replace(archive: Archive, partial: Path, path: str) -> None:
    """In one step: a rename, or one upload."""
    if archive.is_local:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        move(partial, Path(path))
    else:
        archive.fs.put_file(str(partial), path)
        partial.unlink()


def forget(archive: Archive, forgotten: Mapping[str, Forgotten], partition: int) -> tuple[int, int]:
    """Rewrite each file that has rows of these users of a partition.

    Returns (files rewritten, rows changed).
    forgotten: user id -> up to which point the user's rows are erased
    A file keeps its name. Raises OSError; each file is then either as before or rewritten.
    """
    files = rows = 0
    for topic in (CLICKS, USERS):
        for file in archive.files(topic, partition):
            if _has(archive, file, "user_id", forgotten) and (
                changed := _rewrite(archive, file, forgotten)
            ):
                files, rows = files + 1, rows + changed
    merge_files, merge_rows = forget_merges(archive, forgotten)
    return files + merge_files, rows + merge_rows


def forget_merges(
    archive: Archive, forgotten: Mapping[str, Forgotten], *, lock_held: bool = False
) -> tuple[int, int]:
    """As `forget`, for the merges of all partitions: these users may be targets in any of them.

    lock_held: the caller holds the lock
    """
    files = rows = 0
    for file in archive.files(MERGES):
        named = (_has(archive, file, column, forgotten) for column in ("user_id", "merge_into"))
        if any(named) and (changed := _rewrite(archive, file, forgotten, lock_held=lock_held)):
            files, rows = files + 1, rows + changed
    return files, rows


def _rewrite(
    archive: Archive,
    file: ArchiveFile,
    forgotten: Mapping[str, Forgotten],
    *,
    lock_held: bool = False,
) -> int:
    """Rewrite one file without these users, under the lock; how many rows changed."""
    partial = partial_path(archive, f"{file.topic}-{os.path.basename(file.path)}")
    with nullcontext() if lock_held else locked(archive):
        for _ in range(_TRIES):
            version = archive.version(file)
            with archive.fs.open(file.path, "rb") as source:
                changed = copy_without(source, partial, file.topic, forgotten.get)
            if not changed:
                partial.unlink()
                return 0
            if archive.version(file) == version:
                _replace(archive, partial, file.path)
                return changed
    partial.unlink()
    raise OSError(f"{file.path}: another machine rewrites it again and again")


def _has(
    archive: Archive, file: ArchiveFile, name: str, forgotten: Mapping[str, Forgotten]
) -> bool:
    """Whether the column holds one of these users. Reads only row groups whose range fits."""
    import pyarrow.parquet as pq

    with archive.fs.open(file.path, "rb") as opened, pq.ParquetFile(opened) as parquet:
        column = parquet.schema_arrow.get_field_index(name)
        for number in range(parquet.num_row_groups):
            within = parquet.metadata.row_group(number).column(column).statistics
            if within is not None and within.has_min_max:
                if not any(within.min <= user <= within.max for user in forgotten):
                    continue
            users = parquet.read_row_group(number, columns=[name]).column(0).unique().to_pylist()
            if not forgotten.keys().isdisjoint(users):
                return True
    return False


def _is_running(pid: int) -> bool:
    """Whether another process has this id; our own id in an old file is that of a dead process."""
    return pid != os.getpid() and Path("/proc", str(pid)).exists()
