"""A co-visitation row, read entry by entry."""

from __future__ import annotations

import struct

from eddyline.schema import co_visits
from eddyline.schema.co_visits import HEADER_BYTES

_HEADER, _ENTRY = struct.Struct("<dd"), struct.Struct("<QII")


def totals(row: bytes) -> tuple[dict[int, tuple[int, int]], int, int]:
    """(key -> (thousandths of visits, next visits) in order of appearance, both sums of the row).

    The sums include what was pruned. Raises ValueError for a damaged row.
    """
    co_visits.check(row)
    found: dict[int, tuple[int, int]] = {}
    for key, milli, after in _ENTRY.iter_unpack(memoryview(row)[HEADER_BYTES:]):
        before = found.get(key, (0, 0))
        found[key] = before[0] + milli, before[1] + after
    pruned_milli, pruned_next = _HEADER.unpack_from(row)
    milli_sum = int(pruned_milli) + sum(milli for milli, _ in found.values())
    return found, milli_sum, int(pruned_next) + sum(after for _, after in found.values())
