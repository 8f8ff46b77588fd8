"""A bundle loads completely or is refused with the path of the file at fault."""

import dataclasses
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest

from eddyline.errors import BundleError
from eddyline.schema.events import Item
from eddyline.schema.item_record import ATTRIBUTES_BYTES_MAX, attributes_of
from embeddings.bundle import bundle
from embeddings.bundle.bundle import NewBundle
from embeddings.towers import features
from embeddings.towers.base import TrainedModel
from embeddings.towers.micro_step import MicroSettings
from embeddings.towers.numerics import unit

D, H, LENGTH, N = 16, 24, 20, 30
ITEMS = [Item(item_id=f"i{n}", title=f"Film {n}", attributes={"year": 1990 + n}) for n in range(N)]

GOLDEN = Path(__file__).parents[2] / "golden"


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng([1, *shape]).normal(0, 0.1, shape).astype(np.float32)


def two_tower() -> TrainedModel:
    item_space = features.learn_items(ITEMS)
    profile_space = features.learn_profiles([{"age": n} for n in range(40)])
    return TrainedModel(
        kind="two_tower",
        version=1,
        dimension=D,
        history_max=LENGTH,
        item_space=item_space,
        profile_space=profile_space,
        identity_ids=[item.item_id for item in ITEMS],
        arrays={
            "item.identity": draw(N, D),
            "item.features": draw(item_space.rows, D),
            "item.projection": draw(0, D),
            "item.projection_bias": draw(D),
            "item.w1": draw(D, H),
            "item.b1": draw(H),
            "item.w2": draw(H, D),
            "item.b2": draw(D),
            "user.query": draw(D, 2 * D),
            "user.query_bias": draw(2 * D),
            "user.bias": draw(2, LENGTH),
            "user.value": draw(2 * D, D),
            "user.start": draw(D),
            "user.profile": draw(profile_space.rows, D),
            "user.w1": draw(D, H),
            "user.b1": draw(H),
            "user.w2": draw(H, D),
            "user.b2": draw(D),
        },
        micro=MicroSettings(rate=0.002),
    )


def new_bundle(**changes: object) -> NewBundle:
    complete = NewBundle(
        generation="7",
        created_ms=1_000,
        model=two_tower(),
        item_ids=[item.item_id for item in ITEMS],
        item_vectors=unit(draw(N, D)),
        item_partitions=np.arange(N) % 4,
        item_offsets=np.arange(N) - 1,
        item_attributes=[attributes_of(item) if n % 3 else {} for n, item in enumerate(ITEMS)],
        item_at_ms=np.arange(N) * 1_000,
        cut={"0": 12, "1": -1},
        measured={"loss": 5.5},
    )
    return dataclasses.replace(complete, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bundle.write(tmp_path / "g7", new_bundle())
    return tmp_path / "g7"


def refused(folder: Path, name: str) -> str:
    with pytest.raises(BundleError) as caught:
        bundle.load(folder)
    assert str(folder / name) in str(caught.value)
    return str(caught.value)


def restate(folder: Path, **changes: object) -> None:
    """Change the manifest and its checksum, as a faulty writer would."""
    path = folder / "manifest.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8"
    )
    (folder / "manifest.sha256").write_text(
        hashlib.sha256(path.read_bytes()).hexdigest(), encoding="utf-8"
    )


def replace_array(folder: Path, name: str, array: np.ndarray) -> None:
    """Replace an array and its entry in the manifest."""
    np.save(folder / name, array)
    raw = (folder / name).read_bytes()
    files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    files[name] = {
        "sha256": hashlib.sha256(raw).hexdigest(),
        "bytes": len(raw),
        "dtype": array.dtype.str,
        "shape": list(array.shape),
    }
    restate(folder, files=files)


def test_a_written_bundle_loads_unchanged(folder: Path) -> None:
    made, loaded = new_bundle(), bundle.load(folder)
    assert (loaded.generation, loaded.dimension, loaded.created_ms) == ("7", D, 1_000)
    assert loaded.item_ids == list(made.item_ids)
    np.testing.assert_array_equal(loaded.item_vectors, made.item_vectors)
    assert loaded.item_partitions.dtype == np.int32
    assert loaded.item_offsets.dtype == np.int64
    assert loaded.item_at_ms is not None and loaded.item_at_ms.dtype == np.int64
    np.testing.assert_array_equal(loaded.item_at_ms, np.arange(N) * 1_000)
    np.testing.assert_array_equal(loaded.item_offsets, np.arange(N) - 1)
    assert list(loaded.item_attributes) == made.item_attributes
    assert (
        loaded.item_attributes[4] == {"attributes": {"year": 1994}}
        and loaded.item_attributes[-3] == {}
    )
    assert dict(loaded.cut) == {"0": 12, "1": -1}
    assert dict(loaded.measured) == {"loss": 5.5}
    assert (loaded.rows["i3"], loaded.rows.get("unknown")) == (3, None)
    assert loaded.micro.settings == made.model.micro
    assert loaded.user_tower.history_max == LENGTH
    assert loaded.item_tower.encode(ITEMS).shape == (N, D)
    np.testing.assert_allclose(
        np.linalg.norm(loaded.user_tower.encode_one(draw(0, D), {"age": 3})), 1, atol=1e-6
    )


def test_vectors_are_mapped_and_read_only(folder: Path) -> None:
    loaded = bundle.load(folder)
    assert type(loaded.item_vectors) is np.ndarray
    assert isinstance(loaded.item_vectors.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        loaded.item_vectors[0, 0] = 1


def test_every_flipped_byte_is_found(folder: Path) -> None:
    rng = np.random.default_rng(3)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for at in {0, len(whole) // 2, int(rng.integers(len(whole)))}:
            damaged = bytearray(whole)
            damaged[at] ^= 0x10
            path.write_bytes(damaged)
            name = "manifest.json" if path.name == "manifest.sha256" and at < 64 else path.name
            if path.name == "manifest.sha256" and at >= 64:
                continue  # the file name after the checksum; only sha256sum reads it
            assert "damaged" in refused(folder, name)
        path.write_bytes(whole)
    bundle.load(folder)


def test_every_missing_and_every_short_file_is_found(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        path.unlink()
        assert "is missing" in refused(folder, path.name)
        path.write_bytes(whole[:-1] if path.name != "manifest.sha256" else b"")
        name = "manifest.json" if path.name == "manifest.sha256" else path.name
        refused(folder, name)
        path.write_bytes(whole + b"\0" if path.suffix == ".npy" else whole)
        if path.suffix == ".npy":
            refused(folder, path.name)
        path.write_bytes(whole)
    shutil.rmtree(folder)
    refused(folder, "manifest.json")


def test_another_format_version_is_refused_by_its_number(folder: Path) -> None:
    restate(folder, format_version=4)
    message = refused(folder, "manifest.json")
    assert "format version 4, this release reads 1 to 3" in message
    assert "upgrade Eddyline or train a new generation" in message


@pytest.mark.parametrize(
    ("change", "sentence", "advice"),
    [
        ({"kind": "sasrec"}, "model kind 'sasrec' is unknown", "activate a generation of a known"),
        ({"version": 2}, "version 2, this release reads 1 to 1", "train a new generation"),
        ({"version": 0}, "version 0, this release reads 1 to 1", "train a new generation"),
        ({"arrays": ["item.identity"]}, "lists no array 'item.b1'", "for model two_tower"),
    ],
)
def test_a_model_of_another_release_is_refused(
    folder: Path, change: dict, sentence: str, advice: str
) -> None:
    model = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["model"]
    assert model == {"kind": "two_tower", "version": 1, "arrays": list(two_tower().arrays)}
    restate(folder, model=model | change)
    message = refused(folder, "manifest.json")
    assert sentence in message
    assert advice in message


def test_format_3_names_its_model(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del manifest["model"]
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.sha256").write_text(digest, encoding="utf-8")
    assert "model" in refused(folder, "manifest.json")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_golden_bundles_of_every_version(tmp_path: Path, version: int) -> None:
    with zipfile.ZipFile(GOLDEN / f"bundle-v{version}.zip") as packed:
        packed.extractall(tmp_path / "g")
    loaded = bundle.load(tmp_path / "g")
    manifest = json.loads((tmp_path / "g" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["format_version"] == version
    assert ("model" in manifest) == (version == 3)
    assert (loaded.model.kind, loaded.model.version) == ("two_tower", 1)
    assert (loaded.generation, loaded.item_ids) == ("golden", ["i0", "i1", "i2", "i3", "i4"])
    assert loaded.item_offsets.tolist() == [-1, 0, 1, 2, 3]
    assert loaded.item_at_ms is None
    filled = [
        {},
        *(
            {"categories": ["Drama"], "attributes": {"year": 1990 + n}} if n % 2 else {}
            for n in range(1, 5)
        ),
    ]
    assert list(loaded.item_attributes) == ([{}] * 5 if version == 1 else filled)


def test_golden_bundles_of_formats_2_and_3_hold_the_same_model(tmp_path: Path) -> None:
    loaded = []
    for version in (2, 3):
        with zipfile.ZipFile(GOLDEN / f"bundle-v{version}.zip") as packed:
            packed.extractall(tmp_path / str(version))
        loaded.append(bundle.load(tmp_path / str(version)))
    old, new = loaded
    assert list(old.model.arrays) == list(new.model.arrays)
    for name, array in old.model.arrays.items():
        assert array.tobytes() == new.model.arrays[name].tobytes(), name
    assert old.item_vectors.tobytes() == new.item_vectors.tobytes()
    items = [Item(item_id="i1"), Item(item_id="new", title="Film")]
    assert old.item_tower.encode(items).tobytes() == new.item_tower.encode(items).tobytes()
    assert (old.micro.settings, old.cut, old.measured) == (
        new.micro.settings,
        new.cut,
        new.measured,
    )


@pytest.mark.parametrize(
    ("name", "array", "sentence"),
    [
        ("item_attribute_ends.npy", np.zeros(N, np.int64), "does not cut"),
        ("item_attribute_ends.npy", np.arange(N, dtype=np.int64)[::-1].copy(), "does not cut"),
        ("item_attribute_ends.npy", np.zeros(N - 1, np.int64), "shape"),
        ("item_attributes.npy", np.zeros(3, np.uint8), "does not cut"),
    ],
)
def test_attributes_that_do_not_fit_are_refused(
    folder: Path, name: str, array: np.ndarray, sentence: str
) -> None:
    replace_array(folder, name, array)
    with pytest.raises(BundleError, match=sentence):
        bundle.load(folder)


def test_attributes_that_are_not_msgpack_are_refused(folder: Path) -> None:
    ends = np.load(folder / "item_attribute_ends.npy")
    replace_array(folder, "item_attributes.npy", np.full(ends[-1], 0xC1, np.uint8))
    refused(folder, "item_attributes.npy")


@pytest.mark.parametrize("more", [-1, 0, 1, 1_000_000])
def test_attributes_have_a_limit(tmp_path: Path, more: int) -> None:
    empty = len(msgspec.msgpack.encode({"tags": ["x" * 70_000]})) - 70_000
    large = {"tags": ["x" * (ATTRIBUTES_BYTES_MAX - empty + more)]}
    made = new_bundle(item_attributes=[large, *({} for _ in range(N - 1))])
    if more > 0:
        with pytest.raises(BundleError, match="the limit is"):
            bundle.write(tmp_path / "g", made)
        return
    bundle.write(tmp_path / "g", made)
    assert bundle.load(tmp_path / "g").item_attributes[0] == large


@pytest.mark.parametrize("text", ["[]", "{}", "nonsense", '{"format_version": 1}'])
def test_a_malformed_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    (folder / "manifest.sha256").write_text(
        hashlib.sha256(text.encode()).hexdigest(), encoding="utf-8"
    )
    refused(folder, "manifest.json")


def test_another_dimension_is_refused(folder: Path) -> None:
    restate(folder, dimension=D + 1)
    assert f"expected ({N}, {D + 1})" in refused(folder, "item_vectors.npy")


@pytest.mark.parametrize(
    ("name", "array", "sentence"),
    [
        ("item_vectors.npy", unit(draw(N, D)) * np.float32(1.01), "unit norm"),
        ("item_vectors.npy", np.full((N, D), np.nan, np.float32), "NaN"),
        ("item_vectors.npy", unit(draw(N, D)).astype(np.float64), "dtype"),
        ("item_vectors.npy", unit(draw(N - 1, D)), "shape"),
        ("item_offsets.npy", np.zeros(N, np.int32), "dtype"),
        ("item_at_ms.npy", np.zeros(N, np.int32), "dtype"),
        ("item_at_ms.npy", np.zeros(N - 1, np.int64), "shape"),
        ("user.start.npy", np.full(D, np.inf, np.float32), "infinity"),
        ("user.value.npy", draw(D, D), "shape"),
        ("item.identity.npy", draw(N + 1, D), "shape"),
        ("item.features.npy", draw(3, D), "shape"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(
    folder: Path, name: str, array: np.ndarray, sentence: str
) -> None:
    replace_array(folder, name, array)
    assert sentence in refused(folder, name)


def test_a_pickle_is_never_opened(folder: Path) -> None:
    replace_array(folder, "user.start.npy", np.array([print], dtype=object))
    refused(folder, "user.start.npy")


def test_nothing_is_overwritten(folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(BundleError, match="exists already"):
        bundle.write(folder, new_bundle(created_ms=2))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize(
    "changes",
    [
        {"item_vectors": unit(draw(N, D)) * np.float32(2)},
        {"item_ids": [f"i{n}" for n in range(N - 1)]},
        {"item_ids": ["i1"] * N},
        {"generation": "a/b"},
        {"generation": ""},
        {"generation": "g" * 65},
    ],
)
def test_a_bad_bundle_is_never_put_in_place(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(BundleError):
        bundle.write(tmp_path / "g", new_bundle(**changes))
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_writer_are_replaced(tmp_path: Path) -> None:
    left = tmp_path / ".g.partial"
    left.mkdir()
    (left / "manifest.json").write_text("{", encoding="utf-8")
    bundle.write(tmp_path / "g", new_bundle())
    assert [p.name for p in tmp_path.iterdir()] == ["g"]
    bundle.load(tmp_path / "g")
