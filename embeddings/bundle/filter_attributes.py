"""The filter attributes of a bundle's items: concatenated MessagePack maps, and the end of each.

With them a worker that starts from a bundle alone can answer a filtered query. The maps are mapped
from the file and decoded on access, so that ingest, which needs none of them, keeps none in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from typing_extensions import override

from eddyline.errors import BundleError
from eddyline.schema.item_record import ATTRIBUTES_BYTES_MAX
from embeddings.bundle.manifest import Reader, fail

_BYTES, _ENDS = "item_attributes.npy", "item_attribute_ends.npy"
_decoder = msgspec.msgpack.Decoder(dict[str, Any])


class FilterAttributes(Sequence[dict[str, Any]]):
    """The attributes of each item, by row. Thread rule: any thread; immutable.

    packed: uint8 (m,)
    ends:   int64 (n,), ascending; row i is packed[ends[i - 1] : ends[i]], an empty slice is {}
    """

    __slots__ = ("_ends", "_packed")

    def __init__(self, packed: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self._packed, self._ends = packed, ends

    @override
    def __len__(self) -> int:
        return len(self._ends)

    @override
    def __getitem__(self, row: Any) -> Any:
        """The attributes of one row. Raises IndexError. Slices are not supported."""
        row = range(len(self._ends))[row]
        return self._between(int(self._ends[row - 1]) if row else 0, int(self._ends[row]))

    @override
    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The attributes of every row, in order; each a new dictionary."""
        begin = 0
        for end in self._ends.tolist():
            yield self._between(begin, end)
            begin = end

    def _between(self, begin: int, end: int) -> dict[str, Any]:
        return _decoder.decode(self._packed[begin:end].data) if end > begin else {}


def arrays(attributes: Sequence[Mapping[str, Any]]) -> dict[str, npt.NDArray[Any]]:
    """The two arrays by file name. Raises BundleError if an item has too many attributes."""
    packed = [msgspec.msgpack.encode(of_item) if of_item else b"" for of_item in attributes]
    sizes = [len(of_item) for of_item in packed]
    for row, size in enumerate(sizes):
        if size > ATTRIBUTES_BYTES_MAX:
            raise BundleError(
                f"{_BYTES}: row {row} has {size} bytes, the limit is {ATTRIBUTES_BYTES_MAX}"
            )
    ends = np.cumsum(sizes, dtype=np.int64)
    return {_BYTES: np.frombuffer(b"".join(packed), np.uint8), _ENDS: ends}


def read(folder: Path, reader: Reader, count: int, version: int) -> FilterAttributes:
    """The attributes of `count` items, each decoded once as a check. Raises BundleError."""
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
