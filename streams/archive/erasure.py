"""Copies of the archive's files without the rows of forgotten users."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eddyline.archive import MERGES, ROW_GROUP_ROWS, Forgotten, writer
from eddyline.kafka.topics import CLICKS

# user id -> up to which point the user's rows are erased, None for all other users
ForgottenOf = Callable[[str], Forgotten | None]


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
    by_time = topic in (CLICKS, MERGES)
    places = table.column("appended_ms" if by_time else "offset").to_pylist()
    keep = []
    for user, place in zip(users, places, strict=True):
        limit = limits.get(user) if user is not None else None
        if limit is None:
            keep.append(True)
        else:
            keep.append(place > limit.appended_ms if by_time else place >= limit.offset)
    return keep


def _hide_targets(table: Any, forgotten: ForgottenOf) -> tuple[Any, int]:
    """(merges without the ids of forgotten targets, how many rows changed)."""
    before: Sequence[str | None] = table.column("merge_into").to_pylist()
    limits = {user: forgotten(user) for user in set(before) if user is not None}
    after: list[str | None] = []
    for user, appended_ms in zip(before, table.column("appended_ms").to_pylist(), strict=True):
        limit = None if user is None else limits[user]
        after.append(None if limit is not None and appended_ms <= limit.appended_ms else user)
    at = table.schema.get_field_index("merge_into")
    column = pa.array(after, pa.string())
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    return table.set_column(at, table.schema.field(at), column), changed
