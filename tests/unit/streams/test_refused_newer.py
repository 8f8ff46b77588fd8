"""Items with a refused record that is newer than what is shown of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from eddyline.errors import VectorRejected
from eddyline.kafka import reading
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema import events, validation
from eddyline.schema.events import Item
from eddyline.schema.partitioning import partition_of
from eddyline.stores.state_store import ItemMetadata, RefusedRecord
from streams.handlers import Handlers, Outputs
from streams.operations import dead_letter_replay
from streams.operations.dead_letter_replay import Letter
from tests.applying import ingest
from tests.unit.streams.test_ingest_rules import HERE, LOG, MS, SETTINGS, FakeOutputs, Rig
from tests.unit.streams.test_strays import FILM, OTHER, change, record, title_of

# Records that must be refused: identity, time or availability cannot be read.
BAD = {
    "bad_field": b'{"item_id": "%s", "available": "no"}',
    "malformed_json": b'{"item_id": "%s"',
    "wrong_key": b'{"item_id": "another", "title": "%s"}',
    "far_future": b'{"item_id": "%s", "title": "c", "at_ms": 1900000000000}',
}


def bad(offset: int, at: int, reason: str = "bad_field", origin: Any = None) -> Any:
    return record(offset, BAD[reason] % FILM.encode(), at, origin, FILM, "items")


def again(offset: int, title: str | None, at: int, after: int) -> Any:
    """A state of the time `at`, appended again after the record at the offset `after`."""
    made = change(offset, title, at)
    made.headers = [("origin", f"items/{HERE}/{after}".encode())]
    made.headers.append((events.ORIGIN_MS, str(MS + at).encode()))
    return made


def applied(log: Sequence[Any], size: int = 99, **more: Any) -> Rig:
    rig = Rig(**more)
    for first in range(0, len(log), size):
        ingest(rig.items, HERE, log[first : first + size])
    rig.items.flush()
    return rig


def stored(rig: Rig) -> ItemMetadata | None:
    return rig.store.read_item_metadata([FILM], 1).get(FILM)


def refused_of(rig: Rig) -> tuple[int, str] | None:
    found = stored(rig)
    one = None if found is None else found.refused
    return None if one is None else (one.offset, one.reason)


@pytest.mark.parametrize("size", [1, 2, 99])
@pytest.mark.parametrize("reason", BAD)
def test_it_marks_the_item_which_goes_on_being_shown(reason: str, size: int) -> None:
    rig = applied([change(0, "a", 1), bad(1, 2, reason)], size)
    assert rig.out.letters == [(1, reason)]
    found = stored(rig)
    assert found is not None and (found.offset, title_of(found.body)) == (0, "a")
    assert found.refused == RefusedRecord(HERE, 1, MS + 2, reason)
    assert [one.offset for one in rig.out.published] == [0]
    assert list(rig.store.refused_items("i0")) == [[FILM]]
    assert rig.store.count_refused_items(["i0"]) == 1


@pytest.mark.parametrize("size", [1, 99])
@pytest.mark.parametrize(
    ("log", "left"),
    [
        ([change(0, "a", 1), bad(1, 2), change(2, "b", 3)], None),
        ([change(0, "a", 1), bad(1, 2), change(2, None, 3)], None),
        ([change(0, "a", 1), change(1, None, 2), bad(2, 3)], None),
        ([bad(0, 1)], None),
        ([change(0, "a", 1), bad(1, 2), bad(2, 3, "malformed_json")], (2, "malformed_json")),
        # Of another partition: the first append decides.
        ([change(0, "a", 5), bad(1, 9, origin=(OTHER, 4))], None),
        ([change(0, "a", 5), bad(1, 9, origin=(OTHER, 6))], (1, "bad_field")),
        ([change(0, "a", 1), bad(1, 5), change(2, "b", 9, (OTHER, 4))], (1, "bad_field")),
        ([change(0, "a", 1), bad(1, 5), change(2, "b", 9, (OTHER, 5))], None),
        ([change(0, "a", 1), bad(1, 5), change(2, None, 9, (OTHER, 4))], None),
        # In one millisecond: a replayed record, and what was appended again after the refused one.
        ([change(0, "a", 1), bad(1, 1), change(2, "a", 1, (HERE, 1))], None),
        ([change(0, "a", 1), bad(1, 1), again(2, "a", 1, after=1)], (1, "bad_field")),
    ],
)
def test_a_newer_good_record_or_a_delete_ends_it(
    log: Sequence[Any], left: tuple[int, str] | None, size: int
) -> None:
    rig = applied(log, size)
    assert refused_of(rig) == left
    assert rig.store.count_refused_items(["i0"]) == (left is not None)


def test_what_the_item_has_is_appended_again_once_and_does_not_end_the_mark() -> None:
    """Else compaction keeps the refused record alone."""
    rig = applied([change(0, "a", 1), bad(1, 1)])
    [(key, value, partition)] = rig.out.forwarded
    assert (key, title_of(value), partition) == (FILM.encode(), "a", HERE)
    it = again(2, "a", 1, after=1)
    assert it.value == value
    ingest(rig.items, HERE, [it])
    rig.items.flush()
    assert refused_of(rig) == (1, "bad_field") and len(rig.out.forwarded) == 1
    # Where the settings of now refuse it, it is not appended for ever.
    rig = applied([change(0, "a", 1), bad(1, 1)])
    it.value = BAD["bad_field"] % FILM.encode()
    ingest(rig.items, HERE, [it])
    rig.items.flush()
    assert refused_of(rig) == (2, "bad_field") and len(rig.out.forwarded) == 1


@pytest.mark.parametrize("size", [1, 99])
@pytest.mark.parametrize("then", ["b", None])
@pytest.mark.parametrize(
    "before",
    [[change(0, "a", 1), bad(1, 1)], [change(0, "a", 1), change(1, "theirs", 1, (OTHER, 0))]],
    ids=["refused", "outdated"],
)
def test_it_does_not_undo_a_change_of_the_same_millisecond(
    before: list[Any], then: str | None, size: int
) -> None:
    """Records of one producer batch have one time stamp; ingest may read them in two batches."""
    rig = applied([*before, change(2, then, 1), again(3, "a", 1, after=1)], size)
    found = stored(rig)
    assert found is not None and (found.offset, title_of(found.body)) == (2, then)
    # Compaction keeps what the item has: it is the last record, and no further one follows.
    assert title_of(rig.out.forwarded[-1][1]) == then
    count = len(rig.out.forwarded)
    ingest(rig.items, HERE, [again(4, then, 1, after=3)])
    rig.items.flush()
    found = stored(rig)
    assert found is not None and title_of(found.body) == then
    assert len(rig.out.forwarded) == count


@pytest.mark.parametrize("offset", ["9" * 18, "9" * 5_000, "-1", "", "\u0661", "1/2"])
def test_any_producer_may_name_an_origin(offset: str) -> None:
    one = again(1, "b", 1, after=0)
    one.headers[0] = ("origin", f"items/{HERE}/{offset}".encode())
    rig = applied([change(0, "a", 1), one, change(2, "c", 2)])
    found = stored(rig)
    assert found is not None and title_of(found.body) == "c"


@pytest.mark.parametrize("blank", [b"", b" "], ids=["", "spelled"])
@pytest.mark.parametrize("refused_at", [1, 2])
def test_a_replay_does_not_take_it_for_a_newer_record(
    refused_at: int, blank: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that was sent after the refused one is newer, also where it is appended again.

    blank: in the refused record's key
    """
    first, refused = change(0, "a", 1), bad(1, refused_at)
    letter = Letter(
        at=f"items/{HERE}/1",
        reason="bad_field",
        field="available",
        detail="",
        key=refused.key + blank,
        value=change(1, "mended", refused_at).value,
        timestamp_ms=refused.timestamp,
        first_ms=refused.timestamp,
        offset=0,
    )

    def newer(*log: Any) -> bool:
        monkeypatch.setattr(reading, "offsets_at", lambda *_: {HERE: 0})
        monkeypatch.setattr(reading, "read", lambda *_: iter(log))
        marks = dead_letter_replay._Scan(SETTINGS)
        return letter.at in dead_letter_replay.newer_than(SETTINGS, [letter], marks)

    [(_, value, _)] = applied([first, refused]).out.forwarded
    it = again(2, "a", 1, after=1)
    assert it.value == value
    assert not newer(first, refused, it)
    assert not newer(refused, it)
    assert newer(first, refused, it, change(3, "b", refused_at))
    assert newer(first, refused, it, change(3, "b", 9, (OTHER, refused_at + 1)))
    assert newer(refused, it, again(5, "b", refused_at, after=4))


def test_a_refused_record_in_a_wrong_partition_goes_to_its_own() -> None:
    rig = Rig()
    rig.items.fences.open({1 - HERE: (0, 99)})
    stray = bad(0, 2)
    stray.partition = 1 - HERE
    outcome = ingest(rig.items, 1 - HERE, [stray])
    assert (outcome.forwarded, outcome.rejected, rig.out.letters) == (1, 0, [])
    assert rig.out.forwarded == [(FILM.encode(), stray.value, HERE)]


def test_without_a_forwarder_it_is_left_to_the_copy_in_its_own_partition() -> None:
    """A replay of the log reads both."""
    handlers = Handlers(
        SETTINGS,
        Rig().store,
        dict.fromkeys((CLICKS, USERS, ITEMS), LOG),
        [],
        Outputs.to_sink(out := FakeOutputs()),
        [],
        0.0,
    )
    handlers.items.fences.open({1 - HERE: (0, 99)})
    stray = bad(0, 2)
    stray.partition = 1 - HERE
    assert ingest(handlers.items, 1 - HERE, [stray]).rejected == 0
    assert out.letters == [] and out.forwarded == []


def test_the_setting_hides_the_item_until_a_newer_good_record() -> None:
    log = [change(0, "a", 1), bad(1, 2), change(2, "b", 3)]
    for size in (1, 99):
        rig = applied(log[:2], size, hide_refused_items=True)
        last = rig.out.published[-1]
        assert (last.offset, last.retired, last.attributes) == (1, True, {})
        found = stored(rig)
        assert found is not None and found.refused is not None and found.refused.hidden
        ingest(rig.items, HERE, [change(2, "older", 9, (OTHER, 1))])
        assert rig.out.published[-1].retired
        ingest(rig.items, HERE, [change(3, "b", 10)])
        assert (rig.out.published[-1].offset, rig.out.published[-1].retired) == (3, False)


def test_a_hidden_item_stays_hidden_where_the_setting_ends() -> None:
    rig = applied([change(0, "a", 1), bad(1, 2)], hide_refused_items=True)
    after = Rig()
    after.store.restore(rig.store.snapshot())
    assert after.items.fences.open({HERE: (0, 99)}) == {HERE: 2}
    ingest(after.items, HERE, [bad(2, 3)])
    after.items.flush()
    found = stored(after)
    assert found is not None
    assert found.refused == RefusedRecord(HERE, 2, MS + 3, "bad_field", hidden=True)
    ingest(after.items, HERE, [change(3, "b", 4)])
    assert (after.out.published[-1].offset, after.out.published[-1].retired) == (3, False)


@pytest.mark.parametrize("patches", [False, True])
def test_records_that_no_tower_places_are_encoded_a_few_times(patches: bool) -> None:
    """Not once for each of them: a batch of one item would take seconds."""
    calls = list[int]()

    class Refusing:
        def encode(self, items: Sequence[Item]) -> Any:
            calls.append(len(items))
            if any(item.title != "a" for item in items):
                raise VectorRejected("no known word")
            return np.full((len(items), 2), np.sqrt(0.5), np.float32)

    rig = Rig(items_patches=patches)
    rig.generation.towers.item_tower = Refusing()
    log = [change(0, "a", 0), *(change(n, f"b{n}", n) for n in range(1, 60))]
    others = [rec_of(n, f"other{n}") for n in range(60, 160)]
    outcome = ingest(rig.items, HERE, [*log, *others])
    rig.items.flush()
    assert outcome.rejected == 59 and refused_of(rig) == (59, "bad_vector")
    assert len(rig.out.published) == 101
    assert sum(calls) < 5 * len([*log, *others]), sum(calls)


def test_a_refused_patch_has_no_effect_on_the_next_one() -> None:
    """Of one batch; the second one is decided by the state before both."""
    rig = Rig(items_patches=True)

    class Refusing:
        def encode(self, items: Sequence[Item]) -> Any:
            if any(item.title != "a" for item in items):
                raise VectorRejected("no known word")
            return np.full((len(items), 2), np.sqrt(0.5), np.float32)

    rig.generation.towers.item_tower = Refusing()
    patches = [
        {"title": "a", "available": False},
        {"title": "b", "available": True},
        {"tags": ["c"]},
        {"tags": ["d"], "title": "a"},
    ]
    values = [msgspec.json.encode({"item_id": FILM, **one}) for one in patches]
    ingest(rig.items, HERE, [record(n, v, n, None, FILM, "items") for n, v in enumerate(values)])
    rig.items.flush()
    found = stored(rig)
    assert found is not None
    item = msgspec.json.decode(found.body, type=Item)
    assert (found.offset, item.title, item.available, item.tags) == (3, "a", False, ["d"])
    assert rig.out.letters == [(1, "bad_vector")]
    assert (rig.out.published[-1].offset, rig.out.published[-1].retired) == (3, True)


def rec_of(offset: int, item_id: str) -> Any:
    while partition_of(item_id, 2) != HERE:
        item_id += "x"
    value = events.encode(Item(item_id=item_id, title="a", categories=["c"], at_ms=MS))
    return record(offset, value, offset, None, item_id, "items")


def test_a_map_names_the_items_of_a_refused_record(tmp_path: Any) -> None:
    file = tmp_path / "map.toml"
    file.write_text(
        '[items.fields]\nitem_id = "sku"\ntitle = "name"\navailable = "sold"\n', encoding="utf-8"
    )
    settings = msgspec.structs.replace(SETTINGS, items_map=str(file))
    value = msgspec.json.encode({"sku": FILM, "name": "a", "sold": "perhaps"})
    one = record(0, value, 1, None, "any key", "items")
    with pytest.raises(Exception, match="bad_field"):
        validation.item_changes(settings, one)
    assert validation.named_items(settings, one) == [(FILM, True)]
    one.value = b"{"
    assert validation.named_items(settings, one) == []


def test_an_item_record_of_its_own_body_is_whole() -> None:
    found = stored(applied([change(0, "a", 1), bad(1, 2)]))
    assert found is not None
    assert msgspec.json.decode(found.body, type=Item).title == "a"
