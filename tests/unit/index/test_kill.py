"""kill -9 of a process during a snapshot or a rebuild: the files it leaves are right or refused.

The log is a function of the offset, so all processes and the oracle read the same log.
"""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from eddyline.schema.item_record import ItemRecord
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.snapshot import format
from index.snapshot.format import Origin, SnapshotRefused

ROOT = Path(__file__).resolve().parents[3]
D, ITEMS = 16, 2_000
# Records of the log after those in the snapshot.
AFTER = 200
ORIGIN = Origin(generation="g1", dimension=D, bundle_ms=1, log="cluster/topic")
KILLS = 3

LOG = """
import numpy as np
from eddyline.schema.item_record import ItemRecord
def change(offset, D=16, ITEMS=2_000):
    rng = np.random.default_rng(offset)
    item = offset if offset < ITEMS else int(rng.integers(ITEMS))
    vector = rng.normal(size=D).astype(np.float32)
    tags = {"tags": [f"t{offset % 5}"]}
    if offset >= ITEMS and offset % 7 == 0:
        return ItemRecord(f"i{item}", 0, offset, offset, offset, None)
    return ItemRecord(f"i{item}", 0, offset, offset, offset, vector / np.linalg.norm(vector), tags)
"""
# Starts as a worker does; then writes, rebuilds and writes snapshots concurrently until killed.
PROCESS = (
    LOG
    + """
import sys, threading, time
from pathlib import Path
from index.snapshot import format as snapshot
from index.factory import HnswIndex
path = Path(sys.argv[1])
index = HnswIndex(16, m=8, ef_construction=60, exact_below=100, fresh_max=50, flush_above=100)
origin = snapshot.Origin(generation="g1", dimension=16, bundle_ms=1, log="cluster/topic")
position = 0
try:
    contents, header = snapshot.load(path, origin, 0)
    index.restore(contents)
    position = header.positions[0]
except FileNotFoundError:
    pass
build = index._backend.build
def announced(*arguments):
    print("building", flush=True)
    return build(*arguments)
index._backend.build = announced
def snapshots():
    while True:
        at = position
        snapshot.write(path, index.contents(), origin, {0: at}, 1_000)
        print("written", flush=True)
threading.Thread(target=snapshots, daemon=True).start()
while True:
    index.apply([change(offset) for offset in range(position, position + 20)])
    position += 20
    time.sleep(0.002)
"""
)


def log(first: int, end: int) -> list[ItemRecord]:
    names: dict[str, object] = {}
    exec(LOG, names)
    return [names["change"](offset) for offset in range(first, end)]  # type: ignore[operator]


class Oracle(ExactIndex):
    """Holds the log up to `end`."""

    def __init__(self) -> None:
        super().__init__(D)
        self.end = 0

    def read_to(self, end: int) -> None:
        self.apply(log(self.end, end))
        self.end = max(self.end, end)


def kill_after(path: Path, line: bytes, partial: bool) -> bool:
    """Run the process until it printed this line twice, and kill it.

    partial: kill it only while it writes a snapshot. Returns whether a snapshot was cut off.
    """
    for left in path.parent.glob("*.partial"):
        left.unlink()
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        printed, deadline = 0, time.monotonic() + 60
        while printed < 2:
            assert time.monotonic() < deadline and process.poll() is None
            printed += process.stdout.readline().strip() == line
        while partial and not list(path.parent.glob("*.partial")):
            assert time.monotonic() < deadline
    finally:
        process.kill()
        process.communicate(timeout=20)
    return bool(list(path.parent.glob("*.partial")))


def recovered(path: Path, oracle: Oracle) -> HnswIndex:
    """The index of the next worker: the snapshot, then the log from its position on."""
    index = HnswIndex(D, m=8, ef_construction=60, exact_below=100, fresh_max=10**6)
    position = 0
    try:
        contents, header = format.load(path, ORIGIN, 0)
        index.restore(contents)
        position = header.positions[0]
        # It holds at least what its position says; the very first one may be empty.
        applied = header.watermarks[0][0] + 1 if header.watermarks else 0
        assert position <= applied
        oracle.read_to(applied + AFTER)
    except (FileNotFoundError, SnapshotRefused):
        oracle.read_to(ITEMS + AFTER)
    index.apply(log(position, oracle.end))
    return index


def same(index: HnswIndex, oracle: Oracle) -> None:
    index.close()
    index.exact_only = True
    for query in np.eye(D, dtype=np.float32):
        assert index.query(query, 50) == oracle.query(query, 50)
    assert index.newest(50) == oracle.newest(50)
    assert index.watermarks() == oracle.watermarks()
    live, exact = index.stats(), oracle.stats()
    assert (live.live, live.tombstones) == (exact.live, exact.tombstones)


@pytest.mark.parametrize(("line", "partial"), [(b"written", True), (b"building", False)])
def test_a_kill_during_a_snapshot_or_a_build(tmp_path: Path, line: bytes, partial: bool) -> None:
    path, oracle = tmp_path / "x.snapshot", Oracle()
    cut_off = 0
    for _ in range(KILLS):
        cut_off += kill_after(path, line, partial)
        if path.exists():
            format.load(path, ORIGIN, 0)  # no error: it is complete
        same(recovered(path, oracle), oracle)
    assert cut_off or not partial


def test_a_damaged_snapshot_is_refused_and_the_log_replaces_it(tmp_path: Path) -> None:
    path, oracle = tmp_path / "x.snapshot", Oracle()
    index = HnswIndex(D)
    index.apply(log(0, ITEMS + 500))
    format.write(path, index.contents(), ORIGIN, {0: ITEMS + 500}, 1_000)
    same(recovered(path, oracle), oracle)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)
    with pytest.raises(SnapshotRefused, match="checksum"):
        format.load(path, ORIGIN, 0)
    same(recovered(path, oracle), oracle)
