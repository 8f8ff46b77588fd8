"""A generation's bundle: towers, micro-step settings, catalogue and item vectors in one folder.

    manifest.json        format, generation, dimension, settings; of every other file its sha256, bytes, dtype
                         and shape
    manifest.sha256      the manifest's own checksum, in the form of `sha256sum`
    item_ids.json        the catalogue's ids: row i of `item_vectors.npy` is the item `item_ids[i]`
    identity_ids.json    ids with an ID embedding: row i of `item.identity.npy`
    item_vectors.npy     float32 (n, d), unit norm; opened by mmap
    item_partitions.npy, item_offsets.npy   the source version of each vector
    item_attributes.npy, item_attribute_ends.npy   what filters need of each item: MessagePack maps one after
                         another, and where each of them ends (from format version 2 on)
    item.*.npy, user.*.npy                  the weights of the towers

It is written beside its place, synced and renamed, so a folder of that name is whole. `load` trusts nothing:
whatever does not fit raises BundleError and names the file.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from eddyline import generations
from eddyline.errors import BundleError
from eddyline.process.files import move, sync
from eddyline.settings.loader import Settings
from embeddings.bundle import filter_attributes
from embeddings.bundle.filter_attributes import FilterAttributes
from embeddings.bundle.manifest import (
    CHECKSUM,
    FORMAT_VERSION,
    MANIFEST,
    Contents,
    FileEntry,
    Reader,
    digest,
    fail,
    read_manifest,
)
from embeddings.towers.features import FeatureSpace
from embeddings.towers.item_tower import ItemTower
from embeddings.towers.micro_step import MicroSettings, MicroStep
from embeddings.towers.numerics import Floats
from embeddings.towers.user_tower import UserTower

# A generation's name becomes part of a topic's name and of a folder's.
GENERATION = re.compile(r"[A-Za-z0-9_-]{1,64}")
# float32 unit vectors of 64 numbers lie within 1e-6 of norm 1.
_NORM_TOLERANCE = 1e-3
_ITEM_IDS, _IDENTITY_IDS = "item_ids.json", "identity_ids.json"


@dataclass(frozen=True, slots=True)
class Bundle:
    """One generation, loaded. Thread rule: any thread; nothing in it changes.

    item_vectors:    float32 (n, d), unit norm, read-only, mapped from the file
    item_partitions: int32 (n,): the partition of `items` that the item came from
    item_offsets:    int64 (n,): its offset there, the item's version; -1 where it came from a file
    item_attributes: what filters need of each item, see `FilterAttributes`
    rows:            item id -> its row in `item_vectors`, for the items of this catalogue
    """

    generation: str
    dimension: int
    created_ms: int
    item_tower: ItemTower
    user_tower: UserTower
    micro: MicroStep
    item_ids: list[str]
    item_vectors: Floats
    item_partitions: npt.NDArray[np.int32]
    item_offsets: npt.NDArray[np.int64]
    item_attributes: FilterAttributes
    cut: Mapping[str, int]
    measured: Mapping[str, float] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What `write` needs; the fields are those of `Bundle` and `Contents`.

    identity_ids: ids in the order of the rows of item_arrays["identity"]
    item_attributes: what filters need of each item, `eddyline.schema.item_record.attributes_of`
    """

    generation: str
    created_ms: int
    item_space: FeatureSpace
    item_arrays: Mapping[str, Floats]
    identity_ids: Sequence[str]
    profile_space: FeatureSpace
    user_arrays: Mapping[str, Floats]
    micro: MicroSettings
    item_ids: Sequence[str]
    item_vectors: Floats
    item_partitions: npt.NDArray[np.int32]
    item_offsets: npt.NDArray[np.int64]
    item_attributes: Sequence[Mapping[str, Any]]
    cut: Mapping[str, int]
    measured: Mapping[str, float]


def write(folder: Path, parts: Parts) -> None:
    """Write a bundle: all of it appears at `folder` at once, or nothing does.

    Raises BundleError where something is there already, or where the parts do not fit together.
    """
    folder = Path(folder)
    if not GENERATION.fullmatch(parts.generation):
        raise BundleError(
            f"generation {parts.generation!r}: letters, digits, _ and -, at most 64 of them"
        )
    if folder.exists():
        raise BundleError(f"{folder} exists already; a generation is never overwritten")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a writer that was killed
    partial.mkdir(parents=True)
    try:
        _write_files(partial, parts)
        load(partial)
        move(partial, folder)
    except OSError as error:
        raise BundleError(f"{folder}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def recorded(settings: Settings, manifest: generations.Manifest) -> Bundle:
    """The bundle of a generation that Kafka has a record of. Raises BundleError, also where it is another."""
    found = load(settings.bundles / manifest.bundle)
    if found.generation != manifest.generation:
        raise BundleError(
            f"{manifest.bundle} holds generation {found.generation}, not {manifest.generation}"
        )
    return found


def load(folder: Path) -> Bundle:
    """A bundle, checked: every checksum, shape and dtype, finite weights, unit vectors.

    Raises BundleError naming the file at fault.
    """
    folder = Path(folder)
    contents = read_manifest(folder)
    reader = Reader(folder, contents.files)
    d = contents.dimension
    item_ids, identity_ids = reader.ids(_ITEM_IDS), reader.ids(_IDENTITY_IDS)
    n = len(item_ids)
    if not n:
        fail(folder / _ITEM_IDS, "is empty; a generation needs at least one item")
    vectors = reader.array("item_vectors.npy", np.float32, (n, d), mmap=True)
    squares = np.einsum("nd,nd->n", vectors, vectors)
    if np.abs(squares - 1.0).max() > 2 * _NORM_TOLERANCE:
        fail(folder / "item_vectors.npy", "holds vectors that are not of unit norm")
    item_space, profile_space = contents.item_space, contents.profile_space
    item_arrays = {name: reader.array(f"item.{name}.npy", np.float32) for name in ItemTower.ARRAYS}
    user_arrays = {name: reader.array(f"user.{name}.npy", np.float32) for name in UserTower.ARRAYS}
    _check_item(folder, item_arrays, (len(identity_ids), item_space.rows, item_space.dense, d))
    _check_user(folder, user_arrays, (profile_space.rows, contents.history_max, d))
    rows = {item_id: row for row, item_id in enumerate(item_ids)}
    return Bundle(
        generation=contents.generation,
        dimension=d,
        created_ms=contents.created_ms,
        item_tower=ItemTower(
            item_space, {i: row for row, i in enumerate(identity_ids)}, item_arrays
        ),
        user_tower=UserTower(profile_space, user_arrays),
        micro=MicroStep(vectors, contents.micro),
        item_ids=item_ids,
        item_vectors=vectors,
        item_partitions=reader.array("item_partitions.npy", np.int32, (n,)),
        item_offsets=reader.array("item_offsets.npy", np.int64, (n,)),
        item_attributes=filter_attributes.read(folder, reader, n, contents.format_version),
        cut=contents.cut,
        measured=contents.measured,
        rows=rows,
    )


def _check_item(folder: Path, a: Mapping[str, Floats], sizes: tuple[int, int, int, int]) -> None:
    identities, rows, dense, d = sizes
    h = a["b1"].size
    shapes = {
        "identity": (identities, d),
        "features": (rows, d),
        "projection": (dense, d),
        "projection_bias": (d,),
        "w1": (d, h),
        "b1": (h,),
        "w2": (h, d),
        "b2": (d,),
    }
    _check_shapes(folder, "item", a, shapes)


def _check_user(folder: Path, a: Mapping[str, Floats], sizes: tuple[int, int, int]) -> None:
    rows, history_max, d = sizes
    h, heads = a["b1"].size, len(np.atleast_1d(a["bias"]))
    shapes = {
        "query": (d, heads * d),
        "query_bias": (heads * d,),
        "bias": (heads, history_max),
        "value": (heads * d, d),
        "start": (d,),
        "profile": (rows, d),
        "w1": (d, h),
        "b1": (h,),
        "w2": (h, d),
        "b2": (d,),
    }
    _check_shapes(folder, "user", a, shapes)


def _check_shapes(
    folder: Path, tower: str, arrays: Mapping[str, Floats], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            fail(
                folder / f"{tower}.{name}.npy", f"has shape {arrays[name].shape}, expected {shape}"
            )


def _write_files(folder: Path, parts: Parts) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {
        "item_vectors.npy": np.ascontiguousarray(parts.item_vectors, np.float32),
        "item_partitions.npy": np.asarray(parts.item_partitions, np.int32),
        "item_offsets.npy": np.asarray(parts.item_offsets, np.int64),
        **filter_attributes.arrays(parts.item_attributes),
    }
    for tower, some, names in (
        ("item", parts.item_arrays, ItemTower.ARRAYS),
        ("user", parts.user_arrays, UserTower.ARRAYS),
    ):
        arrays |= {f"{tower}.{n}.npy": np.ascontiguousarray(some[n], np.float32) for n in names}
    files: dict[str, FileEntry] = {}
    for name, ids in ((_ITEM_IDS, parts.item_ids), (_IDENTITY_IDS, parts.identity_ids)):
        (folder / name).write_bytes(msgspec.json.encode(list(ids)))
        size, sha256 = digest(folder / name)
        files[name] = FileEntry(sha256, size)
    for name, array in arrays.items():
        np.save(folder / name, array, allow_pickle=False)
        size, sha256 = digest(folder / name)
        files[name] = FileEntry(sha256, size, array.dtype.str, list(array.shape))
    contents = Contents(
        format_version=FORMAT_VERSION,
        generation=parts.generation,
        dimension=int(parts.item_vectors.shape[1]),
        created_ms=parts.created_ms,
        history_max=int(parts.user_arrays["bias"].shape[1]),
        item_space=parts.item_space,
        profile_space=parts.profile_space,
        micro=parts.micro,
        cut=dict(parts.cut),
        measured=dict(parts.measured),
        files=files,
    )
    raw = msgspec.json.format(msgspec.json.encode(contents), indent=1)
    (folder / MANIFEST).write_bytes(raw)
    (folder / CHECKSUM).write_text(
        f"{hashlib.sha256(raw).hexdigest()}  {MANIFEST}\n", encoding="utf-8"
    )
    for path in folder.iterdir():
        sync(path)
