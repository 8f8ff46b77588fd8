"""Copies of the archive's files without the rows of users who were forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eddyline.archive import MERGES, ROW_GROUP_ROWS, Forgotten, writer
from eddyline.kafka.topics import CLICKS


def without(
    source: Any, target: Path, topic: str, forgotten: Callable[[str], Forgotten | None]
) -> int:
    """Copy a Parquet file without the rows of forgotten users, group by group; the rows that changed.

    source: an open file or a path; forgotten: user id -> up to where his rows go, None for the others
    Of a merge into a forgotten user the row stays, without his id: the other one's list ended there.
    """
    gone = 0
    with pq.ParquetFile(source) as parquet, writer(target, parquet.schema_arrow) as out:
        for number in range(parquet.num_row_groups):
            table = parquet.read_row_group(number)
            if topic == MERGES:
                table, hidden = _hidden(table, forgotten)
                gone += hidden
            keep = _kept(table, topic, forgotten)
            gone += keep.count(False)
            out.write_table(table.filter(pa.array(keep, pa.bool_())), row_group_size=ROW_GROUP_ROWS)
    return gone


def _kept(table: Any, topic: str, forgotten: Callable[[str], Forgotten | None]) -> list[bool]:
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


def _hidden(table: Any, forgotten: Callable[[str], Forgotten | None]) -> tuple[Any, int]:
    """(merges without the ids of forgotten users that they were into, how many those are)."""
    into: Sequence[str | None] = table.column("merge_into").to_pylist()
    limits = {user: forgotten(user) for user in set(into) if user is not None}
    shown: list[str | None] = []
    for user, appended_ms in zip(into, table.column("appended_ms").to_pylist(), strict=True):
        limit = None if user is None else limits[user]
        shown.append(None if limit is not None and appended_ms <= limit.appended_ms else user)
    at = table.schema.get_field_index("merge_into")
    column = pa.array(shown, pa.string())
    changed = sum(before != after for before, after in zip(into, shown, strict=True))
    return table.set_column(at, table.schema.field(at), column), changed
