"""Erase forgotten users from the archive: files are rewritten without their rows.

`forget` is the entry. The archive process also calls `copy_without` before it places a new file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eddyline.archive import (
    HOUR_MS,
    MERGES,
    ROW_GROUP_ROWS,
    Archive,
    ArchiveFile,
    Forgotten,
    writer,
)
from eddyline.kafka.topics import ANSWERS, CLICKS, USERS
from streams.archive import file_placement

# user id -> up to which point the user's rows are erased, None for all other users
ForgottenOf = Callable[[str], Forgotten | None]
# Another machine would have to rewrite the file as often, each time between our read and write.
_TRIES = 5


def forget(
    archive: Archive, forgotten: Mapping[str, Forgotten], partition: int, since_ms: int = 0
) -> tuple[int, int]:
    """Rewrite each file that has rows of these users of a partition.

    Returns (files rewritten, rows changed).
    forgotten: user id -> what is removed
    since_ms:  files of earlier hours have none of these rows
    A file keeps its name. Raises OSError; each file is then either as before or rewritten.
    """
    files = rows = 0
    for topic in (CLICKS, USERS, ANSWERS):
        for file in archive.files(topic, partition):
            if file.hour_ms + HOUR_MS <= since_ms or not _has(archive, file, "user_id", forgotten):
                continue
            if changed := _rewrite(archive, file, forgotten):
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


def copy_without(source: Any, target: Path, topic: str, forgotten: ForgottenOf) -> int:
    """Copy a Parquet file without the rows of forgotten users, one row group at a time.

    source: an open file or a path
    A merge into a forgotten user keeps its row, without that user's id: the visitor's history ended
    there all the same. Returns how many rows changed.
    """
    changed = 0
    with pq.ParquetFile(source) as parquet, writer(target, parquet.schema_arrow) as out:
        for number in range(parquet.num_row_groups):
            table = parquet.read_row_group(number)
            if topic == MERGES:
                table, hidden = _hide_targets(table, forgotten)
                changed += hidden
            keep = _kept(table, topic, forgotten)
            changed += keep.count(False)
            out.write_table(table.filter(pa.array(keep, pa.bool_())), row_group_size=ROW_GROUP_ROWS)
    return changed


def _kept(table: Any, topic: str, forgotten: ForgottenOf) -> list[bool]:
    users: Sequence[str | None] = table.column("user_id").to_pylist()
    limits = {user: forgotten(user) for user in set(users) if user is not None}
    # Answers have no order with `clicks`: the last event that they knew decides.
    offset_of = "user_offset" if topic == ANSWERS else "offset"
    places = [table.column(name).to_pylist() for name in (offset_of, "appended_ms", "at_ms")]
    keep = []
    for user, offset, appended_ms, at_ms in zip(users, *places, strict=True):
        limit = limits.get(user) if user is not None else None
        if limit is None:
            keep.append(True)
        elif topic in (CLICKS, MERGES):
            keep.append(not limit.covers_event(offset, appended_ms, at_ms))
        elif topic == ANSWERS:
            keep.append(not limit.covers_answer(offset, appended_ms, at_ms))
        else:
            keep.append(offset >= limit.erasure.users_offset)
    return keep


def _hide_targets(table: Any, forgotten: ForgottenOf) -> tuple[Any, int]:
    """(merges without the ids of forgotten targets, how many rows changed)."""
    before: Sequence[str | None] = table.column("merge_into").to_pylist()
    limits = {user: forgotten(user) for user in set(before) if user is not None}
    after: list[str | None] = []
    for user, appended_ms in zip(before, table.column("appended_ms").to_pylist(), strict=True):
        limit = None if user is None else limits[user]
        after.append(None if limit is not None and appended_ms <= limit.erasure.until_ms else user)
    at = table.schema.get_field_index("merge_into")
    column = pa.array(after, pa.string())
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    return table.set_column(at, table.schema.field(at), column), changed


def _rewrite(
    archive: Archive,
    file: ArchiveFile,
    forgotten: Mapping[str, Forgotten],
    *,
    lock_held: bool = False,
) -> int:
    """Rewrite one file without these users, under the lock; how many rows changed."""
    partial = file_placement.partial_path(archive, f"{file.topic}-{os.path.basename(file.path)}")
    with nullcontext() if lock_held else file_placement.locked(archive):
        for _ in range(_TRIES):
            version = archive.version(file)
            with archive.fs.open(file.path, "rb") as source:
                changed = copy_without(source, partial, file.topic, forgotten.get)
            if not changed:
                partial.unlink()
                return 0
            if archive.version(file) == version:
                file_placement.replace(archive, partial, file.path)
                return changed
    partial.unlink()
    raise OSError(f"{file.path}: another machine rewrites it again and again")


def _has(
    archive: Archive, file: ArchiveFile, name: str, forgotten: Mapping[str, Forgotten]
) -> bool:
    """Whether the column holds one of these users. Reads only row groups whose range fits."""
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
