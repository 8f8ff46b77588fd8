"""The manifest of a bundle, and reading files that match it: checksum, size, dtype, shape, finite.

Every mismatch raises BundleError with the path of the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from eddyline.errors import BundleError
from embeddings.towers.features import FeatureSpace
from embeddings.towers.micro_step import MicroSettings
from embeddings.towers.two_tower import ARRAYS

# Version 2 added the filter attributes of items; a bundle of version 1 is read without them.
# Version 3 added the kind of the model; bundles of versions 1 and 2 hold a two-tower model.
# Event times of items came later; a bundle of version 3 may have none.
FORMAT_VERSION = 3
_MODEL_BEFORE_3 = {"kind": "two_tower", "version": 1, "arrays": list(ARRAYS)}
MANIFEST, CHECKSUM = "manifest.json", "manifest.sha256"
_T = TypeVar("_T")


class FileEntry(msgspec.Struct, frozen=True):
    """A file's entry. dtype is "" and shape is empty for a file that is not an array."""

    sha256: str
    bytes: int
    dtype: str = ""
    shape: list[int] = []


class ModelEntry(msgspec.Struct, frozen=True):
    """The model's kind, the version of its array layout, and the names of its arrays."""

    kind: str
    version: int
    arrays: list[str]


class BundleManifest(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest. cut: partition of `items` as text -> offset of the last record contained.

    measured: figures of the training, by name, for people
    """

    format_version: int
    generation: str
    dimension: int
    created_ms: int
    model: ModelEntry
    history_max: int
    item_space: FeatureSpace
    profile_space: FeatureSpace
    micro: MicroSettings
    cut: dict[str, int]
    measured: dict[str, float]
    files: dict[str, FileEntry]


class Reader:
    """Reads files of one folder and compares each with its entry in the manifest."""

    def __init__(self, folder: Path, entries: Mapping[str, FileEntry]) -> None:
        self._folder, self._entries = folder, entries

    def _checked(self, name: str) -> tuple[Path, FileEntry]:
        path = self._folder / name
        if name not in self._entries:
            fail(path, f"is not in {MANIFEST}")
        entry = self._entries[name]
        size, found = _io(path, digest)
        if size != entry.bytes:
            fail(path, f"has {size} bytes, {MANIFEST} says {entry.bytes}")
        if found != entry.sha256:
            fail(path, f"is damaged: its SHA-256 is not the one in {MANIFEST}")
        return path, entry

    def ids(self, name: str) -> list[str]:
        """A list of distinct ids."""
        path, _ = self._checked(name)
        try:
            ids = msgspec.json.decode(_io(path, Path.read_bytes), type=list[str])
        except msgspec.DecodeError as error:
            fail(path, str(error))
        if len(set(ids)) != len(ids):
            fail(path, "names an id twice")
        return ids

    def array(
        self,
        name: str,
        dtype: type[Any],
        shape: tuple[int, ...] | None = None,
        *,
        mmap: bool = False,
    ) -> npt.NDArray[Any]:
        """A read-only, finite array of this dtype and, if not None, this shape."""
        path, entry = self._checked(name)
        try:
            array: npt.NDArray[Any] = np.load(
                path, mmap_mode="r" if mmap else None, allow_pickle=False
            )
        except (ValueError, OSError, EOFError) as error:
            fail(path, f"is not an array: {error}")
        if array.dtype != np.dtype(dtype) or array.dtype.str != entry.dtype:
            fail(path, f"has dtype {array.dtype}, expected {np.dtype(dtype)}")
        if list(array.shape) != entry.shape or (shape is not None and array.shape != shape):
            fail(path, f"has shape {array.shape}, expected {shape or tuple(entry.shape)}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            fail(path, "holds NaN or infinity")
        array.setflags(write=False)
        # A plain view of the mapped file: arithmetic on np.memmap itself costs Python calls.
        return array.view(np.ndarray)


def read_manifest(folder: Path) -> BundleManifest:
    """The manifest of a folder, checked against its checksum."""
    path = folder / MANIFEST
    raw = _io(path, Path.read_bytes)
    stated = _io(folder / CHECKSUM, Path.read_bytes).split()
    if not stated or stated[0] != hashlib.sha256(raw).hexdigest().encode():
        fail(path, f"is damaged: its SHA-256 is not the one in {CHECKSUM}")
    try:
        manifest = msgspec.json.decode(raw, type=dict[str, Any])
        version = manifest.get("format_version", 0)
        if version not in range(1, FORMAT_VERSION + 1):
            fail(
                path,
                f"has format version {version!r}, this release reads 1 to {FORMAT_VERSION}; "
                "upgrade Eddyline or train a new generation",
            )
        if version < 3:
            manifest["model"] = _MODEL_BEFORE_3
        return msgspec.convert(manifest, BundleManifest)
    except msgspec.MsgspecError as error:
        fail(path, str(error))


def digest(path: Path) -> tuple[int, str]:
    """(size in bytes, SHA-256 in hex) of a file."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), found


def _io(path: Path, read: Callable[[Path], _T]) -> _T:
    try:
        return read(path)
    except FileNotFoundError:
        fail(path, "is missing")
    except OSError as error:
        fail(path, f"cannot be read: {error.strerror}")


def fail(path: Path, sentence: str) -> NoReturn:
    """Raise BundleError for a file."""
    raise BundleError(f"{path}: {sentence}") from None
