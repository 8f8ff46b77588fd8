"""Small files that another process reads while they are written: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file in one step; readable for its owner only. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(
            FileNotFoundError
        ):  # a signal's exception may come when it is renamed already
            os.unlink(temporary)
        raise


def read_if_exists(path: Path) -> bytes | None:
    """The content, None where there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
