"""What filters need of the items of a bundle: MessagePack maps in one array of bytes, and where each ends.

A worker that starts from a bundle alone can answer a filtered query by it; ingest, which needs none of it,
maps the file and decodes nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from eddyline.errors import BundleError
from eddyline.schema.item_record import ATTRIBUTES_BYTES_MAX
from embeddings.bundle.manifest import Reader, fail

_BYTES, _ENDS = "item_attributes.npy", "item_attribute_ends.npy"
_decoder = msgspec.msgpack.Decoder(dict[str, Any])


class FilterAttributes(Sequence[dict[str, Any]]):
    """The attributes of each item, by its row. Thread rule: any thread; nothing in it changes.

    packed: uint8 (m,); ends: int64 (n,), ascending: row i is packed[ends[i - 1] : ends[i]], nothing is {}
    """

    __slots__ = ("_ends", "_packed")

    def __init__(self, packed: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        """Over these arrays."""
        self._packed, self._ends = packed, ends

    def __len__(self) -> int:
        """How many items."""
        return len(self._ends)

    def __getitem__(self, row: Any) -> Any:
        """Of one row. Slices are not asked for. Raises IndexError."""
        row = range(len(self._ends))[row]
        return self._between(int(self._ends[row - 1]) if row else 0, int(self._ends[row]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Of every row, in order; each is a new dictionary."""
        begin = 0
        for end in self._ends.tolist():
            yield self._between(begin, end)
            begin = end

    def _between(self, begin: int, end: int) -> dict[str, Any]:
        return _decoder.decode(self._packed[begin:end].data) if end > begin else {}


def arrays(of_items: Sequence[Mapping[str, Any]]) -> dict[str, npt.NDArray[Any]]:
    """The two arrays by the name of their file. Raises BundleError where an item has too much."""
    packed = [msgspec.msgpack.encode(one) if one else b"" for one in of_items]
    for row, one in enumerate(packed):
        if len(one) > ATTRIBUTES_BYTES_MAX:
            raise BundleError(
                f"{_BYTES}: row {row} has {len(one)} bytes, the largest item has {ATTRIBUTES_BYTES_MAX}"
            )
    ends = np.cumsum([len(one) for one in packed], dtype=np.int64)
    return {_BYTES: np.frombuffer(b"".join(packed), np.uint8), _ENDS: ends}


def read(folder: Path, reader: Reader, count: int, version: int) -> FilterAttributes:
    """Those of a bundle of `count` items, checked, each decoded once. Raises BundleError."""
    if version < 2:
        return FilterAttributes(np.zeros(0, np.uint8), np.zeros(count, np.int64))
    packed = reader.array(_BYTES, np.uint8, mmap=True)
    ends = reader.array(_ENDS, np.int64, (count,))
    sizes = np.diff(ends, prepend=0)
    if (
        packed.ndim != 1
        or ends[-1] != len(packed)
        or not (0 <= sizes.min() <= sizes.max() <= ATTRIBUTES_BYTES_MAX)
    ):
        fail(folder / _ENDS, f"does not cut the {packed.size} bytes of {_BYTES} into {count} items")
    found = FilterAttributes(packed, ends)
    try:
        for _ in found:
            pass
    except msgspec.DecodeError as error:
        fail(folder / _BYTES, str(error))
    return found
