"""`newest` after a bundle was loaded: by the items' own times, of both indexes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from eddyline.schema.item_record import ItemRecord
from embeddings.bundle import bundle
from embeddings.bundle.bundle import Bundle, NewBundle
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.port import Index
from serving.worker.replica import load_bundle
from tests.unit.embeddings.test_bundle import new_bundle

# Ids in the opposite order of their times.
TIMES_MS = {"apple": 1_990, "mango": 2_000, "zebra": 2_026, "melon": 2_010, "date": 1_970}


@pytest.fixture(params=[HnswIndex, ExactIndex])
def make(request: pytest.FixtureRequest) -> Callable[[int], Index]:
    return request.param  # type: ignore[no-any-return]


def loaded(folder: Path, times: bool) -> Bundle:
    new: NewBundle = new_bundle()
    ids = list(TIMES_MS)
    n = len(ids)
    at_ms = np.array(list(TIMES_MS.values())) if times else None
    new = dataclasses.replace(
        new,
        item_ids=ids,
        item_vectors=new.item_vectors[:n],
        item_partitions=new.item_partitions[:n],
        item_offsets=np.arange(n),
        item_attributes=new.item_attributes[:n],
        item_at_ms=at_ms,
    )
    bundle.write(folder / "g", new)
    return bundle.load(folder / "g")


def newest(index: Index) -> list[str]:
    return [hit.item_id for hit in index.newest(9)]


def records(of: Bundle) -> list[ItemRecord]:
    """What ingest has published for the items of the bundle."""
    return [
        ItemRecord(name, int(of.item_partitions[n]), n, at_ms, 7, of.item_vectors[n])
        for n, (name, at_ms) in enumerate(TIMES_MS.items())
    ]


def test_items_of_a_bundle_have_their_own_times(
    tmp_path: Path, make: Callable[[int], Index]
) -> None:
    of = loaded(tmp_path, times=True)
    index = make(of.dimension)
    load_bundle(index, of)
    expected = ["zebra", "melon", "mango", "apple", "date"]
    assert newest(index) == expected
    assert index.apply(records(of)) == 0
    assert newest(index) == expected


def test_items_of_an_old_bundle_take_the_time_of_the_topics_record_of_the_same_version(
    tmp_path: Path, make: Callable[[int], Index]
) -> None:
    of = loaded(tmp_path, times=False)
    index = make(of.dimension)
    load_bundle(index, of)
    assert index.apply(records(of)) == len(TIMES_MS)
    assert newest(index) == ["zebra", "melon", "mango", "apple", "date"]
    assert index.apply(records(of)) == 0
    assert len(index.query(of.item_vectors[0], 9)) == len(TIMES_MS)


def test_a_delete_of_the_same_version_does_not_count_as_a_time(
    tmp_path: Path, make: Callable[[int], Index]
) -> None:
    of = loaded(tmp_path, times=False)
    index = make(of.dimension)
    load_bundle(index, of)
    gone = ItemRecord("apple", 0, 9, 0, 7, None)
    assert index.apply([gone]) == 1
    assert index.apply([*records(of), dataclasses.replace(gone, at_ms=5)]) == len(TIMES_MS) - 1
    assert newest(index) == ["zebra", "melon", "mango", "date"]
