"""A generation's bundle: model, item catalogue and item vectors in one folder.

    manifest.json        format, generation, dimension, model kind and settings; for every other
                         file its SHA-256, size, dtype and shape
    manifest.sha256      the manifest's own checksum, in the format of `sha256sum`
    item_ids.json        the ids of the catalogue: row i of `item_vectors.npy` is item `item_ids[i]`
    identity_ids.json    the items with an ID embedding, in the order of its rows
    item_vectors.npy     float32 (n, d), unit norm; opened by mmap
    item_partitions.npy, item_offsets.npy   the source version of each vector
    item_at_ms.npy       int64 (n,), the event time of each item; not in every bundle of format 3,
                         and in none before: then the items get theirs from the topic
    item_attributes.npy, item_attribute_ends.npy   what filters need of each item, from format
                         version 2 on: MessagePack maps, concatenated, and the end of each
    <array>.npy          the arrays of the model, by the names in the manifest

A bundle is written to a temporary folder, synced and renamed, so a folder with the final name is
complete. `load` checks everything; a mismatch raises BundleError with the path of the file.
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
    BundleManifest,
    FileEntry,
    ModelEntry,
    Reader,
    digest,
    fail,
    read_manifest,
)
from embeddings.towers import runtimes
from embeddings.towers.base import ItemEncoder, ModelRuntime, TrainedModel, UserEncoder
from embeddings.towers.micro_step import MicroStep
from embeddings.towers.numerics import Floats

# A generation's name is part of a topic name and of a folder name.
GENERATION = re.compile(r"[A-Za-z0-9_-]{1,64}")
# The norm of a float32 unit vector of 64 numbers is within 1e-6 of 1.
_NORM_TOLERANCE = 1e-3
_ITEM_IDS, _IDENTITY_IDS = "item_ids.json", "identity_ids.json"
_ITEM_AT_MS = "item_at_ms.npy"


@dataclass(frozen=True, slots=True)
class Bundle:
    """One loaded generation. Thread rule: any thread; immutable.

    item_vectors:    float32 (n, d), unit norm, read-only, mapped from the file
    item_partitions: int32 (n,): partition of `items` that holds the item's record
    item_offsets:    int64 (n,): offset of that record, the item's version; -1 if from a file
    item_attributes: what filters need of each item, see `FilterAttributes`
    item_at_ms:      int64 (n,): event time of each item, milliseconds since 1970, 0 if unknown;
                     None if the bundle has none
    rows:            item id -> its row in `item_vectors`, for the items of this catalogue
    folder:          where it was loaded from
    """

    folder: Path
    generation: str
    dimension: int
    created_ms: int
    model: TrainedModel
    item_tower: ItemEncoder
    user_tower: UserEncoder
    micro: MicroStep
    item_ids: list[str]
    item_vectors: Floats
    item_partitions: npt.NDArray[np.int32]
    item_offsets: npt.NDArray[np.int64]
    item_attributes: FilterAttributes
    cut: Mapping[str, int]
    measured: Mapping[str, float] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict, repr=False)
    item_at_ms: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBundle:
    """The input of `write`; the fields are those of `Bundle`.

    item_attributes: what filters need of each item, `eddyline.schema.item_record.attributes_of`
    """

    generation: str
    created_ms: int
    model: TrainedModel
    item_ids: Sequence[str]
    item_vectors: Floats
    item_partitions: npt.NDArray[np.int32]
    item_offsets: npt.NDArray[np.int64]
    item_attributes: Sequence[Mapping[str, Any]]
    cut: Mapping[str, int]
    measured: Mapping[str, float]
    item_at_ms: npt.NDArray[np.int64] | None = None


def write(folder: Path, new: NewBundle) -> None:
    """Write a bundle atomically: `folder` is complete or absent.

    Raises BundleError if `folder` exists, if the fields do not match each other, or if it cannot be
    written.
    """
    folder = Path(folder)
    if not GENERATION.fullmatch(new.generation):
        raise BundleError(
            f"generation {new.generation!r}: use 1 to 64 letters, digits, '_' and '-'"
        )
    if folder.exists():
        raise BundleError(f"{folder} exists already; a generation is never overwritten")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed writer
    partial.mkdir(parents=True)
    try:
        _write_files(partial, new)
        load(partial)
        move(partial, folder)
    except OSError as error:
        raise BundleError(f"{folder}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def recorded(settings: Settings, manifest: generations.Manifest) -> Bundle:
    """The bundle of a published generation.

    Raises BundleError if it cannot be loaded or holds another generation.
    """
    found = load(settings.bundles / manifest.bundle)
    if found.generation != manifest.generation:
        raise BundleError(
            f"{manifest.bundle} holds generation {found.generation}, not {manifest.generation}"
        )
    return found


def load(folder: Path) -> Bundle:
    """Load a bundle and check every checksum, shape and dtype, finite weights and unit vectors.

    Raises BundleError with the path of the file that is at fault.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    try:
        runtime = runtimes.runtime(manifest.model.kind, manifest.model.version)
    except BundleError as error:
        fail(folder / MANIFEST, str(error))
    reader = Reader(folder, manifest.files)
    d = manifest.dimension
    item_ids, identity_ids = reader.ids(_ITEM_IDS), reader.ids(_IDENTITY_IDS)
    n = len(item_ids)
    if not n:
        fail(folder / _ITEM_IDS, "is empty; a generation needs at least one item")
    vectors = reader.array("item_vectors.npy", np.float32, (n, d), mmap=True)
    squares = np.einsum("nd,nd->n", vectors, vectors)
    if np.abs(squares - 1.0).max() > 2 * _NORM_TOLERANCE:
        fail(folder / "item_vectors.npy", "holds vectors that are not of unit norm")
    model = _model(folder, manifest, runtime, identity_ids, reader)
    return Bundle(
        folder=folder,
        generation=manifest.generation,
        dimension=d,
        created_ms=manifest.created_ms,
        model=model,
        item_tower=runtime.item_tower(model),
        user_tower=runtime.user_tower(model),
        micro=runtime.micro_step(model, vectors),
        item_ids=item_ids,
        item_vectors=vectors,
        item_partitions=reader.array("item_partitions.npy", np.int32, (n,)),
        item_offsets=reader.array("item_offsets.npy", np.int64, (n,)),
        item_attributes=filter_attributes.read(folder, reader, n, manifest.format_version),
        cut=manifest.cut,
        measured=manifest.measured,
        rows={item_id: row for row, item_id in enumerate(item_ids)},
        item_at_ms=reader.array(_ITEM_AT_MS, np.int64, (n,))
        if _ITEM_AT_MS in manifest.files
        else None,
    )


def _model(
    folder: Path,
    manifest: BundleManifest,
    runtime: ModelRuntime,
    identity_ids: list[str],
    reader: Reader,
) -> TrainedModel:
    """The model's arrays, with the names and shapes that its runtime needs."""
    entry = manifest.model
    if missing := set(runtime.arrays).difference(entry.arrays):
        fail(folder / MANIFEST, f"lists no array {min(missing)!r} for model {entry.kind}")
    model = TrainedModel(
        kind=entry.kind,
        version=entry.version,
        dimension=manifest.dimension,
        history_max=manifest.history_max,
        item_space=manifest.item_space,
        profile_space=manifest.profile_space,
        identity_ids=identity_ids,
        arrays={name: reader.array(f"{name}.npy", np.float32) for name in runtime.arrays},
        micro=manifest.micro,
    )
    for name, shape in runtime.shapes(model).items():
        if model.arrays[name].shape != shape:
            fail(folder / f"{name}.npy", f"has shape {model.arrays[name].shape}, expected {shape}")
    return model


def _write_files(folder: Path, new: NewBundle) -> None:
    model = new.model
    arrays: dict[str, npt.NDArray[Any]] = {
        "item_vectors.npy": np.ascontiguousarray(new.item_vectors, np.float32),
        "item_partitions.npy": np.asarray(new.item_partitions, np.int32),
        "item_offsets.npy": np.asarray(new.item_offsets, np.int64),
        **filter_attributes.arrays(new.item_attributes),
        **{f"{n}.npy": np.ascontiguousarray(a, np.float32) for n, a in model.arrays.items()},
    }
    if new.item_at_ms is not None:
        arrays[_ITEM_AT_MS] = np.asarray(new.item_at_ms, np.int64)
    files: dict[str, FileEntry] = {}
    for name, ids in ((_ITEM_IDS, new.item_ids), (_IDENTITY_IDS, model.identity_ids)):
        (folder / name).write_bytes(msgspec.json.encode(list(ids)))
        size, sha256 = digest(folder / name)
        files[name] = FileEntry(sha256, size)
    for name, array in arrays.items():
        np.save(folder / name, array, allow_pickle=False)
        size, sha256 = digest(folder / name)
        files[name] = FileEntry(sha256, size, array.dtype.str, list(array.shape))
    manifest = BundleManifest(
        format_version=FORMAT_VERSION,
        generation=new.generation,
        dimension=model.dimension,
        created_ms=new.created_ms,
        model=ModelEntry(model.kind, model.version, list(model.arrays)),
        history_max=model.history_max,
        item_space=model.item_space,
        profile_space=model.profile_space,
        micro=model.micro,
        cut=dict(new.cut),
        measured=dict(new.measured),
        files=files,
    )
    raw = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    (folder / MANIFEST).write_bytes(raw)
    checksum = f"{hashlib.sha256(raw).hexdigest()}  {MANIFEST}\n"
    (folder / CHECKSUM).write_text(checksum, encoding="utf-8")
    for path in folder.iterdir():
        sync(path)
