"""kill -9 of a real process in the midst of a snapshot and of a rebuild: what is left is right, or refused.

The log is a function of the offset, so every process, and the oracle, read the same one.
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
# Read behind what the snapshot holds, as a tail does.
BEHIND = 200
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
# Starts as a worker does, then writes, rebuilds and snapshots at the same time until it is killed.
PROCESS = (
    LOG
    + """
import sys, threading, time
from pathlib import Path
from index.snapshot import format as snapshot
from index.factory import HnswIndex
path = Path(sys.argv[1])
index = HnswIndex(16, m=8, ef_construction=60, exact_below=100, fresh_max=50, tier_above=100)
origin = snapshot.Origin(generation="g1", dimension=16, bundle_ms=1, log="cluster/topic")
position = 0
try:
    contents, header = snapshot.load(path, origin, 0)
    index.restore(contents)
    position = header.positions[0]
except FileNotFoundError:
    pass
build = index._build
def told(*arguments):
    print("building", flush=True)
    return build(*arguments)
index._build = told
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
    """Knows the log up to `end`."""

    def __init__(self) -> None:
        super().__init__(D)
        self.end = 0

    def read_to(self, end: int) -> None:
        self.apply(log(self.end, end))
        self.end = max(self.end, end)


def killed(path: Path, said: bytes, partial: bool) -> bool:
    """Run the process until it said something twice, and perhaps is in the midst of a snapshot; kill it.

    Returns whether a snapshot was cut off.
    """
    for left in path.parent.glob("*.partial"):
        left.unlink()
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        heard, deadline = 0, time.monotonic() + 60
        while heard < 2:
            assert time.monotonic() < deadline and process.poll() is None
            heard += process.stdout.readline().strip() == said
        while partial and not list(path.parent.glob("*.partial")):
            assert time.monotonic() < deadline
    finally:
        process.kill()
        process.communicate(timeout=20)
    return bool(list(path.parent.glob("*.partial")))


def healed(path: Path, oracle: Oracle) -> HnswIndex:
    """An index as the next worker has it: the snapshot, then the log from its position to some way behind."""
    index = HnswIndex(D, m=8, ef_construction=60, exact_below=100, fresh_max=10**6)
    position = 0
    try:
        contents, header = format.load(path, ORIGIN, 0)
        index.restore(contents)
        position = header.positions[0]
        # It may hold more than its position says, never less; the very first one may hold nothing yet.
        applied = header.watermarks[0][0] + 1 if header.watermarks else 0
        assert position <= applied
        oracle.read_to(applied + BEHIND)
    except (FileNotFoundError, SnapshotRefused):
        oracle.read_to(ITEMS + BEHIND)
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


@pytest.mark.parametrize(("said", "partial"), [(b"written", True), (b"building", False)])
def test_killed_in_the_midst(tmp_path: Path, said: bytes, partial: bool) -> None:
    path, oracle = tmp_path / "x.snapshot", Oracle()
    cut_off = 0
    for _ in range(KILLS):
        cut_off += killed(path, said, partial)
        if path.exists():
            format.load(path, ORIGIN, 0)  # whole
        same(healed(path, oracle), oracle)
    assert cut_off or not partial


def test_a_damaged_snapshot_is_refused_and_healed_from_the_log(tmp_path: Path) -> None:
    path, oracle = tmp_path / "x.snapshot", Oracle()
    index = HnswIndex(D)
    index.apply(log(0, ITEMS + 500))
    format.write(path, index.contents(), ORIGIN, {0: ITEMS + 500}, 1_000)
    same(healed(path, oracle), oracle)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)
    with pytest.raises(SnapshotRefused, match="checksum"):
        format.load(path, ORIGIN, 0)
    same(healed(path, oracle), oracle)
