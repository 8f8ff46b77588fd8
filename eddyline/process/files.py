"""Files that are written whole or not at all, and checks of files that settings name."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from eddyline.errors import SettingsError


def write_atomically(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replace the file in one step, see `replacing`. Raises OSError."""
    with replacing(path, mode=mode) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, *, mode: int = 0o600) -> Iterator[IO[bytes]]:
    """A file to write, `<name>.<random>.partial`, which replaces `path` after the block.

    mode: the file's permissions, less the umask; by default only its owner reads it

    Makes the folder. An exception in the block removes the partial file and leaves `path` as it
    was; kill -9 leaves a partial file. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        move(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def move(partial: Path, path: Path) -> None:
    """Rename a complete file, within one file system, once its content is on the disk.

    Replaces a file that is there; a folder is moved likewise, to a free name. The new name is on
    the disk when this returns. Raises OSError.
    """
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Write a file's content, or a folder's names, to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_if_exists(path: Path) -> bytes | None:
    """The content, None where there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def check_writable(name: str, path: str) -> None:
    """Raise SettingsError unless files can be made in the folder that the setting `name` names.

    The folder is made where it is missing.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise SettingsError(
            f"{name} = {path!r}: cannot be written: {error.strerror}; "
            "mount a volume there or name another folder"
        ) from None


def check_readable(name: str, path: str) -> None:
    """Raise SettingsError unless the file that the setting `name` names, if any, can be read."""
    if not path:
        return
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise SettingsError(f"{name} = {path!r}: cannot be read: {error.strerror}") from None
