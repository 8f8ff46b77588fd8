"""Events in files: collected in the order of the input, sorted block by block, mapped into memory.

A log need not fit into memory. Of `n` events, `BLOCK_EVENTS` at a time are in memory while they are
sorted; the files of one log take about 130 bytes an event meanwhile, and 37 afterwards.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Rows = npt.NDArray[np.void]

# About 350 MB while a block is sorted. Events of one time are always in one block.
BLOCK_EVENTS = 4_000_000
# Events that are written at a time.
CHUNK_EVENTS = 100_000
# Times that are looked at to choose the blocks.
_SAMPLE = 1_000_000

EVENT = np.dtype(
    [
        ("at_ms", np.int64),
        ("users", np.int32),
        ("items", np.int32),
        ("weights", np.float64),
        ("id_start_of", np.int32),
        ("id_numbers", np.int64),
        ("kinds", np.int8),
    ]
)
_ID = np.dtype([("start", np.int32), ("number", np.int64), ("position", np.int64)])
_CODES = {"int8": "b", "int32": "i", "int64": "q", "float64": "d"}


class EventFile:
    """Events in the order of the input. Thread rule: one thread.

    columns: those of `EVENT`; one value is added to each for an event, then `added` is called
    """

    def __init__(self, folder: Path) -> None:
        """An empty file in a folder."""
        self._path, self._written = folder / "events", 0
        self.columns: dict[str, array[Any]] = {
            name: array(_CODES[EVENT[name].name]) for name in EVENT.names or ()
        }

    def __len__(self) -> int:
        """The events so far."""
        return self._written + len(self.columns["at_ms"])

    def added(self) -> None:
        """An event is complete."""
        if len(self.columns["at_ms"]) >= CHUNK_EVENTS:
            self._write()

    def close(self) -> Rows:
        """Write the rest. Returns the mapped events."""
        self._write()
        return _mapped(self._path, EVENT)

    def _write(self) -> None:
        rows = np.empty(len(self.columns["at_ms"]), EVENT)
        for name, values in self.columns.items():
            rows[name] = values
            del values[:]
        with self._path.open("ab") as out:
            out.write(rows.tobytes())
        self._written += len(rows)


def sort(events: Rows, order_of_user: Ints, folder: Path) -> dict[str, Any]:
    """The columns of `EVENT`, sorted by time, then user, then position: arrays (n,), in files.

    events:        as `EventFile.close` returns them; their file is removed
    order_of_user: int64 (users,), the place of each user among all
    folder:        of the files
    Of events with one id the first remains.
    """
    remains = _first_of_each(events, folder)
    with ExitStack() as opened:
        outs = {
            name: opened.enter_context(_column(folder, name).open("wb"))
            for name in EVENT.names or ()
        }
        for block in _by_time(events, remains, folder):
            order = np.lexsort((order_of_user[block["users"]], block["at_ms"]))
            for name, out in outs.items():
                block[name][order].tofile(out)
    (folder / "events").unlink(missing_ok=True)
    return mapped_columns(folder)


def mapped_columns(folder: Path) -> dict[str, Any]:
    """The columns that `sort` wrote."""
    return {name: _mapped(_column(folder, name), EVENT[name]) for name in EVENT.names or ()}


def _first_of_each(events: Rows, folder: Path) -> npt.NDArray[np.bool_]:
    """Whether no earlier event has the same id, by position, in a file."""
    count = -(-len(events) // BLOCK_EVENTS)

    def ids() -> Iterator[tuple[Rows, Ints]]:
        for start, rows in _chunks(events):
            found = np.empty(len(rows), _ID)
            found["start"], found["number"] = rows["id_start_of"], rows["id_numbers"]
            found["position"] = np.arange(start, start + len(rows))
            mixed = found["start"].astype(np.int64) * 1_000_003 + found["number"]
            yield found, mixed % max(1, count)

    path = folder / "remains"
    with path.open("wb") as out:
        out.truncate(len(events))
    remains = _mapped(path, np.dtype(bool), mode="r+")
    for block in _distributed(ids(), count, folder, _ID):
        order = np.lexsort((block["number"], block["start"]))  # stable
        ordered = block[order]
        first = np.ones(len(ordered), bool)
        first[1:] = (np.diff(ordered["start"]) != 0) | (np.diff(ordered["number"]) != 0)
        remains[ordered["position"][first]] = True
    path.unlink()  # the mapping remains
    return remains


def _by_time(events: Rows, remains: npt.NDArray[np.bool_], folder: Path) -> Iterator[Rows]:
    """The events that remain, in blocks in the order of time; within a block by position."""
    count = -(-len(events) // BLOCK_EVENTS)
    times = np.sort(events["at_ms"][:: max(1, len(events) // _SAMPLE)])
    bounds = times[[len(times) * n // count for n in range(1, count)]]

    def chunks() -> Iterator[tuple[Rows, Ints]]:
        for start, rows in _chunks(events):
            kept = rows[remains[start : start + len(rows)]]
            yield kept, np.searchsorted(bounds, kept["at_ms"], side="right")

    return _distributed(chunks(), count, folder, EVENT)


def _distributed(
    chunks: Iterable[tuple[Rows, Ints]], count: int, folder: Path, dtype: np.dtype[Any]
) -> Iterator[Rows]:
    """The rows of each of `count` blocks, in memory one after the other, in their order.

    chunks: rows, and the block of each
    """
    paths = [folder / f"block-{n}" for n in range(count)]
    with ExitStack() as opened:
        files = [opened.enter_context(path.open("wb")) for path in paths]
        for rows, block_of in chunks:
            order = np.argsort(block_of, kind="stable")
            ends = np.searchsorted(block_of[order], np.arange(count + 1))
            ordered = rows[order]
            for n, file in enumerate(files):
                ordered[ends[n] : ends[n + 1]].tofile(file)
    for path in paths:
        rows = np.fromfile(path, dtype)
        path.unlink()
        yield rows


def _chunks(events: Rows) -> Iterator[tuple[int, Rows]]:
    """(position of the first, rows) of successive parts, copied into memory."""
    for start in range(0, len(events), CHUNK_EVENTS):
        yield start, np.array(events[start : start + CHUNK_EVENTS])


def _column(folder: Path, name: str) -> Path:
    return folder / f"sorted-{name}"


def _mapped(path: Path, dtype: np.dtype[Any], mode: Any = "r") -> npt.NDArray[Any]:
    """A file as an array that the system reads as needed."""
    if not path.stat().st_size:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode).view(np.ndarray)
