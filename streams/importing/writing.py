"""Events as files that `eddyline import` reads again: JSON lines, CSV or Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

from eddyline.errors import SettingsError
from eddyline.process.files import move
from streams.importing import files
from streams.importing.rows import TEXTS, Event

FORMATS = ("jsonl", "csv", "parquet")
# Types of Parquet columns; objects are JSON as text.
_TYPES = {
    "at_ms": "BIGINT",
    "weight": "DOUBLE",
    "available": "BOOLEAN",
    "categories": "VARCHAR[]",
    "tags": "VARCHAR[]",
    "vector": "DOUBLE[]",
}


def write(path: Path, kind: type[Event], events: Sequence[Event]) -> None:
    """Write events to a new file, whole or not at all.

    path: its ending says the format: .jsonl, .csv (each also .gz and .zst) or .parquet
    kind: Click, Item or UserProfile: the columns
    Raises SettingsError for an ending, a file that exists, or one that cannot be written.
    """
    name, _, compression = path.name.rpartition(".")
    if compression not in ("gz", "zst"):
        name, compression = path.name, ""
    format_ = name.rpartition(".")[2]
    if format_ not in FORMATS or (format_ == "parquet" and compression):
        raise SettingsError(
            f"{path}: expected a name that ends with .jsonl, .csv, one of these with .gz or .zst, "
            "or .parquet"
        )
    if path.exists():
        raise SettingsError(f"{path}: exists already")
    names = kind.__struct_fields__
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            partial = Path(folder) / "rows"
            with _opened(partial, compression) as out:
                if format_ == "csv":
                    _csv(out, names, events)
                else:
                    as_row = _flat if format_ == "parquet" else msgspec.to_builtins
                    _lines(out, as_row, events)
            if format_ == "parquet":
                columns = {one: _TYPES.get(one, "VARCHAR") for one in names}
                partial = files.to_parquet(partial, columns)
            move(partial, path)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None


def _lines(
    out: IO[bytes], as_row: Callable[[Any], dict[str, Any]], events: Iterable[Event]
) -> None:
    for event in events:
        row = {name: value for name, value in as_row(event).items() if value is not None}
        out.write(msgspec.json.encode(row) + b"\n")


def _csv(out: IO[bytes], names: tuple[str, ...], events: Iterable[Event]) -> None:
    with io.TextIOWrapper(out, encoding="utf-8", newline="") as text:
        rows = csv.writer(text)
        rows.writerow(names)
        for event in events:
            found = msgspec.to_builtins(event)
            rows.writerow([_cell(name, found[name]) for name in names])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    return value if name in TEXTS else json.dumps(value, ensure_ascii=False)


def _flat(event: Event) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(event)
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
        for name, value in found.items()
    }


@contextmanager
def _opened(path: Path, compression: str) -> Iterator[Any]:
    if compression == "gz":
        with gzip.open(path, "wb") as packed:
            yield packed
    elif compression == "zst":
        import zstandard

        with zstandard.open(path, "wb") as packed:
            yield packed
    else:
        with path.open("wb") as plain:
            yield plain
