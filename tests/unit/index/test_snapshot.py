"""Snapshots: round trip, golden bytes, refusal of damaged files, killed writers, full disks."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from eddyline.schema.item_record import ItemRecord
from index.factory import HnswIndex
from index.filters import Filter, Range
from index.snapshot import format
from index.snapshot.format import Header, Origin, SnapshotRefused
from tests.unit.index.item_records import units, wait_until

D = 4
ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "index-snapshot-v4.bin"
# Their columns lack numbers that were sent as text, those before 3 also dates; the deletes of
# version 1 have offsets only.
OLDER = [ROOT / "tests" / "golden" / f"index-snapshot-v{version}.bin" for version in (1, 2, 3)]
ORIGIN = Origin(generation="g1", dimension=D, bundle_ms=5, log="cluster/topic")
POSITIONS = {0: 17, 1: 3}


def unit(*numbers: float) -> np.ndarray:
    vector = np.zeros(D, np.float32)
    vector[: len(numbers)] = numbers
    return vector / np.float32(np.linalg.norm(vector))


RECORDS = [
    ItemRecord(
        "film", 0, 1, 10, 100, unit(1), {"categories": ["Drama"], "attributes": {"year": 1995}}
    ),
    ItemRecord(
        "buch ß", 1, 2, 20, 200, unit(1, 1), {"tags": ["old", "long"], "attributes": {"year": 1870}}
    ),
    ItemRecord("gone", 0, 3, 0, 0, None),
    ItemRecord("song", 0, 4, 40, 400, unit(0, 1), {"categories": ["Drama", "Pop"]}),
    ItemRecord(
        "film", 0, 5, 50, 500, unit(1, 0, 1), {"categories": ["War"], "attributes": {"year": 1996}}
    ),
]


def filled() -> HnswIndex:
    index = HnswIndex(D)
    for record in RECORDS:
        index.apply([record])
    return index


def written(path: Path) -> Path:
    format.write(path, filled().contents(), ORIGIN, POSITIONS, 1_000)
    return path


def restored(path: Path) -> tuple[HnswIndex, Header]:
    contents, header = format.load(path, ORIGIN, 0)
    index = HnswIndex(D)
    index.restore(contents)
    return index, header


def same(left: HnswIndex, right: HnswIndex) -> None:
    for filters in (
        None,
        Filter(categories=frozenset({"Drama"})),
        Filter(tags_all=frozenset({"old", "long"})),
        Filter(ranges={"year": Range(1900)}),
        Filter(categories=frozenset({"War"}), deny=frozenset({"film"})),
    ):
        query = unit(1, 2, 3)
        assert left.query(query, 9, (), filters) == right.query(query, 9, (), filters)
        assert left.newest(9, (), filters) == right.newest(9, (), filters)
    assert left.watermarks() == right.watermarks()
    assert left.stats().live == right.stats().live
    assert left.stats().tombstones == right.stats().tombstones


def test_a_snapshot_restores_what_it_was_written_from(tmp_path: Path) -> None:
    index, header = restored(written(tmp_path / "x.snapshot"))
    assert (header.positions, header.created_ms) == (POSITIONS, 1_000)
    assert (header.live, header.tombstones) == (3, 1)
    other = filled()
    same(index, other)
    assert [path.name for path in tmp_path.iterdir()] == ["x.snapshot"]
    # Offsets are restored: known records are no-ops, a delete outlasts older records.
    for one in (index, other):
        assert one.apply(RECORDS) == 0
        assert one.apply([ItemRecord("gone", 0, 2, 0, 0, unit(1))]) == 0
        back = ItemRecord("gone", 0, 9, 0, 0, unit(0, 0, 1), {"tags": ["old"]})
        assert one.apply([back, RECORDS[1]]) == 1
        assert one.apply([ItemRecord("song", 0, 10, 0, 0, None)]) == 1
    same(index, other)


def test_an_empty_index_and_a_second_restore(tmp_path: Path) -> None:
    path = tmp_path / "x.snapshot"
    format.write(path, HnswIndex(D).contents(), ORIGIN, {}, 1_000)
    index, header = restored(path)
    assert (header.live, index.query(unit(1), 5)) == (0, [])
    assert index.apply(RECORDS) == len({record.item_id for record in RECORDS})
    contents, _ = format.load(written(path), ORIGIN, 0)
    with pytest.raises(ValueError, match="only an empty index"):
        index.restore(contents)


def test_a_large_snapshot_is_mapped_and_its_main_segment_is_built(tmp_path: Path) -> None:
    vectors = units(3_000, D, 3)
    index = HnswIndex(D, exact_below=10**6)
    for turn in range(2):  # half of the rows are dead
        index.apply(
            [
                ItemRecord(f"i{n}", 0, 3_000 * turn + n, 0, 0, v, {"tags": [f"t{n % 7}"]})
                for n, v in enumerate(vectors)
            ]
        )
    format.write(tmp_path / "x", index.contents(), ORIGIN, POSITIONS, 1)
    contents, _ = format.load(tmp_path / "x", ORIGIN, 0)
    assert not contents.vectors.flags.owndata and not contents.vectors.flags.writeable
    other = HnswIndex(D, exact_below=100)
    other.restore(contents)
    try:
        assert other.query(vectors[5], 20) == index.query(vectors[5], 20)
        wait_until(lambda: other.stats().main > 0)
        tagged = Filter(tags=frozenset({"t3"}))
        assert other.query(vectors[5], 20, (), tagged) == index.query(vectors[5], 20, (), tagged)
    finally:
        other.close()


def test_the_golden_file() -> None:
    index, header = restored(GOLDEN)
    same(index, filled())
    assert (header.origin, header.positions) == (ORIGIN, POSITIONS)


def test_the_same_contents_are_the_same_bytes(tmp_path: Path) -> None:
    assert written(tmp_path / "x").read_bytes() == GOLDEN.read_bytes()


@pytest.mark.parametrize("step", [41])
def test_every_flipped_byte_is_refused(tmp_path: Path, step: int) -> None:
    whole = GOLDEN.read_bytes()
    path = tmp_path / "x.snapshot"
    for at in [*range(0, 2_048, 3), *range(2_048, len(whole), step), len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.raises(SnapshotRefused, match=r"x\.snapshot: "):
            format.load(path, ORIGIN, 0)


@pytest.mark.parametrize("size", [0, 1, 47, 48, 500, 4_096, 5_000, -1, -8, 1])
def test_a_file_of_another_length_is_refused(tmp_path: Path, size: int) -> None:
    whole = GOLDEN.read_bytes()
    path = tmp_path / "x.snapshot"
    path.write_bytes(whole[:size])
    with pytest.raises(SnapshotRefused, match=r"x\.snapshot: "):
        format.load(path, ORIGIN, 0)
    path.write_bytes(whole + b"x")
    with pytest.raises(SnapshotRefused, match="its header says"):
        format.load(path, ORIGIN, 0)


@pytest.mark.parametrize(
    ("origin", "sentence"),
    [
        ({"generation": "g2"}, "generation 'g1', expected 'g2'"),
        ({"dimension": 8}, "dimension 4, expected 8"),
        ({"bundle_ms": 6}, "bundle_ms 5, expected 6"),
        ({"log": "cluster/other"}, "log 'cluster/topic', expected 'cluster/other'"),
        ({"texts": ("brand",)}, r"texts \(\), expected \('brand',\)"),
    ],
)
def test_a_snapshot_of_something_else_is_refused(origin: dict[str, object], sentence: str) -> None:
    fields = {"generation": "g1", "dimension": D, "bundle_ms": 5, "log": "cluster/topic"}
    with pytest.raises(SnapshotRefused, match=sentence):
        format.load(GOLDEN, Origin(**(fields | origin)), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("oldest_ms", "good"), [(999, True), (1_000, True), (1_001, False)])
def test_a_snapshot_older_than_the_delete_records_is_refused(oldest_ms: int, good: bool) -> None:
    if good:
        format.load(GOLDEN, ORIGIN, oldest_ms)
    else:
        with pytest.raises(SnapshotRefused, match="delete records are kept since 1001 ms only"):
            format.load(GOLDEN, ORIGIN, oldest_ms)


def test_another_version_says_so(tmp_path: Path) -> None:
    whole = bytearray(GOLDEN.read_bytes())
    for version in (0, 3, 5):
        whole[8] = version
        (tmp_path / "x").write_bytes(whole)
        said = f"version {version}, this reader reads 4"
        with pytest.raises(SnapshotRefused, match=said):
            format.load(tmp_path / "x", ORIGIN, 0)


@pytest.mark.parametrize("path", OLDER, ids=lambda path: path.stem)
def test_a_snapshot_of_an_older_version_is_refused(path: Path) -> None:
    """Range filters would leave items out; the topic has everything again."""
    with pytest.raises(SnapshotRefused, match=rf"{path.name}: version \d, this reader reads 4"):
        format.load(path, ORIGIN, 0)


def test_dates_and_numbers_as_text_are_kept(tmp_path: Path) -> None:
    index = HnswIndex(D)
    texts = {"released": "1970-01-03", "price": "19.90"}
    index.apply([ItemRecord("film", 0, 1, 1, 1, unit(1), {"attributes": texts})])
    path = tmp_path / "x.snapshot"
    format.write(path, index.contents(), ORIGIN, POSITIONS, 1_000)
    copy, _ = restored(path)
    day = 2 * 86_400_000.0
    for name, at in (("released", day), ("price", 19.9)):
        found = copy.query(unit(1), 1, (), Filter(ranges={name: Range(at, at)}))
        assert [hit.item_id for hit in found] == ["film"]
    index.retire([ItemRecord("film", 0, 2, 2, 2, None)])
    index.apply([ItemRecord("song", 0, 3, 3, 3, unit(1), {"attributes": {"stars": 5}})])
    format.write(path, index.contents(), ORIGIN, POSITIONS, 1_000)
    copy, _ = restored(path)
    assert set(copy.number_names() or ()) == {"released", "price", "stars"}


def test_a_full_disk_leaves_the_old_snapshot(tmp_path: Path) -> None:
    path = written(tmp_path / "x.snapshot")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            written(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["x.snapshot"]


WRITER = """
import sys, numpy as np
from pathlib import Path
from eddyline.schema.item_record import ItemRecord
from index.snapshot import format as snapshot
from index.factory import HnswIndex
vectors = np.eye(4, dtype=np.float32)[np.arange(20_000) % 4]
index = HnswIndex(4, exact_below=10**6)
origin = snapshot.Origin(generation="g1", dimension=4, bundle_ms=5, log="cluster/topic")
for turn in range(10**6):
    index.apply([ItemRecord(f"i{n}", 0, 20_000 * turn + n, 0, 0, v) for n, v in enumerate(vectors)])
    snapshot.write(Path(sys.argv[1]), index.contents(), origin, {0: turn}, 1_000)
    print(turn, flush=True)
"""


def test_a_killed_writer_leaves_a_complete_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "x.snapshot"
    rng = np.random.default_rng(11)
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            env=dict(os.environ),
        )
        try:
            assert writer.stdout is not None and writer.stdout.readline()
            time.sleep(float(rng.uniform(0.0, 0.25)))
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.communicate(timeout=20)
        contents, header = format.load(path, ORIGIN, 0)
        assert (header.live, len(contents.ids)) == (20_000, 20_000)
        assert contents.facts[:, 2].min() == 20_000 * header.positions[0]
