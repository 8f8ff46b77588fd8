"""Complete or absent: how a file gets its place, and how users are taken out of files that have theirs.

A file is put once: who comes later with the same one finds it there, rewritten perhaps, and leaves it. It is
rewritten under the archive's lock, so that two who forget at the same time do not undo each other. The lock
is between the processes of one machine; in an object store, a file that another machine changed meanwhile is
read again.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from eddyline.archive import MERGES, Archive, ArchiveFile, Forgotten
from eddyline.kafka.topics import CLICKS, USERS
from eddyline.process.files import move
from streams.archive.erasure import without

# What a process of another machine left half-written this long ago is nobody's any more.
_ABANDONED_S = 2 * 86_400
# The lock is held while one file is written, of at most a few hundred thousand rows: seconds.
LOCK_S_MAX = 60.0
_LOCK_POLL_S = 0.01
# Another machine would have to rewrite the same file as often, each time between our reading and writing.
_TRIES = 5


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


@contextmanager
def locked(archive: Archive, timeout_s: float = LOCK_S_MAX) -> Iterator[None]:
    """Be the only one on this machine who puts or rewrites files. Raises TimeoutError (an OSError)."""
    path = archive.lock_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout_s, poll_interval=_LOCK_POLL_S, fallback_to_soft=False)
    try:
        held = lock.acquire()
    except Timeout:
        raise TimeoutError(f"{path}: held by another process for {timeout_s:g} s") from None
    with held:
        yield


def put(archive: Archive, partial: Path, path: str) -> None:
    """Give a complete file its place, unless it is there. The caller holds the lock.

    Returns once the file is on the disk (or stored). Raises OSError; then the place is as it was.
    """
    if archive.fs.exists(path):
        partial.unlink()  # another process was faster, with the same rows; forgotten users are gone from it
        return
    _place(archive, partial, path)


def _place(archive: Archive, partial: Path, path: str) -> None:
    """At once: a rename, or one upload. What lies there is replaced."""
    if not archive.is_local:
        archive.fs.put_file(str(partial), path)
        partial.unlink()
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    move(partial, Path(path))


def forget(
    archive: Archive,
    forgotten: Mapping[str, Forgotten],
    partition: int,
    beat: Callable[[], None] = lambda: None,
) -> tuple[int, int]:
    """Rewrite each file that has rows of these users of a partition; (files rewritten, rows changed).

    forgotten: user id -> up to where his rows go; beat: called for every file looked at
    A file keeps its name. Raises OSError; a file is then as it was or as it should be.
    """
    files = rows = 0
    for topic in (CLICKS, USERS):
        for file in archive.files(topic, partition):
            beat()
            if _has(archive, file, "user_id", forgotten) and (
                changed := _rewrite(archive, file, forgotten)
            ):
                files, rows = files + 1, rows + changed
    merges, more = forget_merges(archive, forgotten, beat)
    return files + merges, rows + more


def forget_merges(
    archive: Archive,
    forgotten: Mapping[str, Forgotten],
    beat: Callable[[], None] = lambda: None,
    *,
    held: bool = False,
) -> tuple[int, int]:
    """As `forget`, for the merges of all partitions: visitors of any may have become one of these users.

    held: the caller holds the lock
    """
    files = rows = 0
    for file in archive.files(MERGES):
        beat()
        named = (_has(archive, file, column, forgotten) for column in ("user_id", "merge_into"))
        if any(named) and (changed := _rewrite(archive, file, forgotten, held=held)):
            files, rows = files + 1, rows + changed
    return files, rows


def _rewrite(
    archive: Archive, file: ArchiveFile, forgotten: Mapping[str, Forgotten], *, held: bool = False
) -> int:
    """Write one file again without these users, under the lock; how many rows changed."""
    partial = partial_path(archive, f"{file.topic}-{os.path.basename(file.path)}")
    with nullcontext() if held else locked(archive):
        for _ in range(_TRIES):
            version = archive.version(file)
            with archive.fs.open(file.path, "rb") as source:
                changed = without(source, partial, file.topic, forgotten.get)
            if not changed:
                partial.unlink()
                return 0
            if archive.version(file) == version:
                _place(archive, partial, file.path)
                return changed
    partial.unlink()
    raise OSError(f"{file.path}: another machine rewrites it again and again")


def _has(
    archive: Archive, file: ArchiveFile, name: str, forgotten: Mapping[str, Forgotten]
) -> bool:
    """Whether one of these users is in this column: its pages are read, and of few groups only."""
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


def _lives(pid: int) -> bool:
    """Whether another process of this machine has this number; our own is of before, if we just started."""
    return pid != os.getpid() and Path("/proc", str(pid)).exists()
