"""The file format of index snapshots: one file, self-describing, checksummed, made for mapping.

    offset  size  content, little-endian
    0       8     magic b"EDDYSNAP"
    8       4     version, 4 (uint32); older versions' columns lack numbers as text: refused
    12      4     length h of the header (uint32)
    16      32    SHA-256 of the header
    48      h     header, JSON: `Header`; for each section offset, bytes, dtype, shape and SHA-256
    …             the sections, each from a multiple of 4,096 on, zeros between

    ids        MessagePack array of text: the live items, then the deleted ones whose offset is kept
    vectors    float32 (live, d), unit norm; mapped, not read into memory
    facts      int64 (live, 3): at_ms, written_us, source offset
    deleted    int64 (tombstones, 3): source offset, source partition and written_us
    columns    MessagePack array of [field, name, rows, has values], see `index.storage.columns`;
               those with values come first
    rows       int64 (…,): the rows of all columns, one column after the other
    values     float64 (…,): the values of those columns that have some

The writer writes a temporary file, syncs it and renames it, so a file of that name is complete.
`load` checks everything: a flipped byte, a wrong length, another version, generation, dimension,
bundle or log each raise SnapshotRefused. A refused snapshot loses nothing: the item vectors' topic
has everything again.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from eddyline.errors import EddylineError
from eddyline.process.files import replacing
from index.arrays import Ints, Vector
from index.port import Watermark
from index.storage.columns import ColumnData

MAGIC, VERSION = b"EDDYSNAP", 4
_PREFIX = struct.Struct("<8sII32s")
# A page, so that a section can be mapped by itself.
ALIGN = 4_096
# The section names and the positions of 1,024 partitions take 100 kB.
HEADER_BYTES_MAX = 1 << 20
_SECTIONS = ("ids", "vectors", "facts", "deleted", "columns", "rows", "values")


class SnapshotRefused(EddylineError):
    """A snapshot cannot be used; the message names the file and the mismatch."""


class Section(msgspec.Struct, frozen=True):
    """Position and checksum of a section; dtype "" for raw bytes.

    offset: from the first page after the header, so it does not depend on the header's length
    """

    offset: int
    size: int
    sha256: str
    dtype: str = ""
    shape: tuple[int, ...] = ()


class Origin(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a snapshot belongs to; the loader must expect exactly this.

    bundle_ms: creation time of the generation's bundle
    log:       identity of the topic that the offsets refer to
    part:      shard of the items, as "1 of 4"; "" (not written) for all items
    texts:     attributes whose texts are columns; () (not written) for none
    """

    generation: str
    dimension: int
    bundle_ms: int
    log: str
    part: str = ""
    texts: tuple[str, ...] = ()


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The header of the file.

    positions: partition -> offset at which reading the topic continues; watermarks: as `Watermark`
    floors: partition of `items` -> highest offset of its ended deletes
    """

    origin: Origin
    positions: dict[int, int]
    created_ms: int
    live: int
    tombstones: int
    watermarks: dict[int, tuple[int, int, int]]
    sections: dict[str, Section]
    floors: dict[int, int] = {}


@dataclass(frozen=True, slots=True)
class Contents:
    """All that an index holds at one moment.

    ids:     the live items, then the deleted ones
    vectors: float32 (live, d); facts: int64 (live, 3): at_ms, written_us, offset
    deleted: int64 (tombstones, 3): offset, partition (-1: unknown) and written_us of each delete
    columns: numbers and terms
    floors:  partition of `items` -> highest offset of its ended deletes
    """

    ids: list[str]
    vectors: Vector
    facts: Ints
    deleted: Ints
    columns: tuple[ColumnData, ColumnData]
    watermarks: dict[int, Watermark]
    floors: dict[int, int] = field(default_factory=dict)


def write(
    path: Path, contents: Contents, origin: Origin, positions: dict[int, int], created_ms: int
) -> None:
    """Write a snapshot in place of an older one. Raises OSError; then the older one remains."""
    sections, raws, offset = dict[str, Section](), list[bytes | memoryview](), 0
    for name, data in _section_data(contents).items():
        if isinstance(data, bytes):
            raw: bytes | memoryview = data
            section = Section(offset, len(raw), hashlib.sha256(raw).hexdigest())
        else:
            raw = memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
            digest = hashlib.sha256(raw).hexdigest()
            section = Section(offset, len(raw), digest, data.dtype.str, data.shape)
        sections[name] = section
        raws.append(raw)
        offset += _aligned(len(raw))
    header = Header(
        origin=origin,
        positions=positions,
        created_ms=created_ms,
        live=len(contents.vectors),
        tombstones=len(contents.deleted),
        watermarks={p: (*w,) for p, w in contents.watermarks.items()},
        sections=sections,
        floors=contents.floors,
    )
    encoded = msgspec.json.encode(header)
    with replacing(path, mode=0o644) as file:
        file.write(_PREFIX.pack(MAGIC, VERSION, len(encoded), hashlib.sha256(encoded).digest()))
        file.write(encoded)
        for raw in raws:
            if len(raw):
                file.write(bytes(-file.tell() % ALIGN))
                file.write(raw)


def load(path: Path, origin: Origin, oldest_ms: int) -> tuple[Contents, Header]:
    """A snapshot, every byte checked; its vectors are mapped read-only.

    oldest_ms: an older snapshot is refused, because delete records after it may have expired
    Raises SnapshotRefused; FileNotFoundError if there is no file.
    """
    try:
        with path.open("rb") as file:
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise SnapshotRefused(f"snapshot {path}: cannot be read: {error}") from None
    try:
        header, first = _header(whole)
        for field in origin.__struct_fields__:
            found, expected = getattr(header.origin, field), getattr(origin, field)
            if found != expected:
                raise ValueError(f"{field} {found!r}, expected {expected!r}")
        if header.created_ms < oldest_ms:
            raise ValueError(
                f"made at {header.created_ms} ms, delete records are kept since {oldest_ms} ms only"
            )
        return _contents(whole, header, first), header
    except (ValueError, TypeError, KeyError, msgspec.MsgspecError) as error:
        raise SnapshotRefused(f"snapshot {path}: {error}") from None


def _header(whole: mmap.mmap) -> tuple[Header, int]:
    """(the header, position of the page of the first section). Raises ValueError."""
    if len(whole) < _PREFIX.size:
        raise ValueError(f"{len(whole)} bytes, too short for a snapshot")
    magic, version, length, digest = _PREFIX.unpack_from(whole)
    if magic != MAGIC:
        raise ValueError(f"starts with {magic!r}, not a snapshot")
    if version != VERSION:
        raise ValueError(f"version {version}, this reader reads {VERSION}")
    end = _PREFIX.size + length
    if length > HEADER_BYTES_MAX or end > len(whole):
        raise ValueError(f"a header of {length} bytes in a file of {len(whole)}")
    raw = whole[_PREFIX.size : end]
    if hashlib.sha256(raw).digest() != digest:
        raise ValueError("header: wrong checksum")
    header = msgspec.json.decode(raw, type=Header)
    first = _aligned(end)
    last = max((first + s.offset + s.size for s in header.sections.values() if s.size), default=end)
    if last != len(whole) or set(header.sections) != set(_SECTIONS):
        raise ValueError(f"{len(whole)} bytes, its header says {last}")
    for stop in (end, *(first + s.offset + s.size for s in header.sections.values())):
        if any(whole[stop : _aligned(stop)]):  # the last slice ends with the file
            raise ValueError(f"the padding from byte {stop} on is not zero")
    return header, first


def _contents(whole: mmap.mmap, header: Header, first: int) -> Contents:
    """The sections, checked. Raises ValueError, TypeError, KeyError, MsgspecError."""
    view, found = memoryview(whole), dict[str, Any]()
    for name, section in header.sections.items():
        start = first + section.offset
        raw = view[start : start + section.size]
        if hashlib.sha256(raw).hexdigest() != section.sha256:
            raise ValueError(f"section {name}: wrong checksum")
        if section.dtype:
            found[name] = np.frombuffer(raw, section.dtype).reshape(section.shape)
        else:
            found[name] = bytes(raw)
    ids = msgspec.msgpack.decode(found["ids"], type=list[str])
    named = msgspec.msgpack.decode(found["columns"], type=list[tuple[str, str, int, bool]])
    vectors: npt.NDArray[np.float32] = found["vectors"]
    live, deleted = header.live, header.tombstones
    shapes = (vectors.shape, found["facts"].shape, found["deleted"].shape, len(ids))
    if shapes != ((live, header.origin.dimension), (live, 3), (deleted, 3), live + deleted):
        raise ValueError(
            f"its sections have shapes {shapes} for {live} items and {deleted} deleted ones"
        )
    rows, values = found["rows"], found["values"]
    sizes = np.array([size for _, _, size, _ in named], np.int64)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    has_values = [has for *_, has in named]
    numeric = sum(has_values)
    first_term = int(starts[numeric])
    if any(has_values[numeric:]) or (len(rows), len(values)) != (starts[-1], first_term):
        raise ValueError(f"{len(rows)} rows and {len(values)} values do not fit its columns")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < live:
        raise ValueError("a column names rows that do not exist")
    keys = [(field_name, name) for field_name, name, _, _ in named]
    # Copies of what is kept: the file stays mapped for the vectors alone.
    rows, values = rows.copy(), values.copy()
    columns = (
        ColumnData(keys[:numeric], starts[: numeric + 1], rows[:first_term], values),
        ColumnData(keys[numeric:], starts[numeric:] - first_term, rows[first_term:], None),
    )
    watermarks = {p: Watermark(*of_partition) for p, of_partition in header.watermarks.items()}
    return Contents(
        ids, vectors, found["facts"], found["deleted"], columns, watermarks, header.floors
    )


def _section_data(contents: Contents) -> dict[str, bytes | npt.NDArray[Any]]:
    """The sections in the order of the file."""
    numbers, terms = contents.columns
    assert numbers.values is not None
    named = [
        (*key, size, data.values is not None)
        for data in contents.columns
        for key, size in zip(data.keys, np.diff(data.starts).tolist(), strict=True)
    ]
    return {
        "ids": msgspec.msgpack.encode(contents.ids),
        "vectors": contents.vectors.astype("<f4", copy=False),
        "facts": contents.facts.astype("<i8", copy=False),
        "deleted": contents.deleted.astype("<i8", copy=False),
        "columns": msgspec.msgpack.encode(named),
        "rows": np.concatenate((numbers.rows, terms.rows)).astype("<i8", copy=False),
        "values": numbers.values.astype("<f8", copy=False),
    }


def _aligned(size: int) -> int:
    """The next multiple of ALIGN."""
    return -(-size // ALIGN) * ALIGN
