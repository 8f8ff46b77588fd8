"""Items and profiles in a wrong partition, and two producers that disagree on one key (ADR 23)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from eddyline.kafka import reading
from eddyline.schema import events
from eddyline.schema.events import Item, UserProfile
from eddyline.schema.partitioning import partition_of
from streams import dead_letters
from streams.operations import resync
from tests.applying import ingest
from tests.unit.streams.test_ingest_rules import ANA, FILM, HERE, MS, SETTINGS, Rig, rec


def change(offset: int, title: str | None, at: int, origin: tuple[int, int] | None = None) -> Any:
    """A change of an item at this time. title: None deletes it; origin: (partition, time)"""
    value = None if title is None else events.encode(Item(item_id=FILM, title=title, at_ms=MS))
    return record(offset, value, at, origin, FILM, "items")


def profile(offset: int, age: int | None, at: int, origin: tuple[int, int] | None = None) -> Any:
    """The same of a profile. age: None forgets the user"""
    value = (
        None if age is None else events.encode(UserProfile(user_id=ANA, attributes={"age": age}))
    )
    return record(offset, value, at, origin, ANA, "users")


def record(
    offset: int, value: bytes | None, at: int, origin: tuple[int, int] | None, key: str, topic: str
) -> Any:
    headers: list[Any] = []
    if origin is not None:
        headers = [("origin", f"{topic}/{origin[0]}/7".encode())]
        headers.append((events.ORIGIN_MS, str(MS + origin[1]).encode()))
    return rec(offset, value, key.encode(), topic, timestamp=MS + at, headers=headers)


def title_of(value: bytes | None) -> str | None:
    """The title of an item as JSON; None where it is deleted."""
    return msgspec.json.decode(value)["title"] if value else None


OTHER = 1 - HERE


@pytest.mark.parametrize("sizes", [(9,), (1, 1, 9), (2, 9)])
@pytest.mark.parametrize(
    ("log", "shown", "restored"),
    [
        ([change(0, "a", 1), change(1, "b", 9, (OTHER, 5))], "b", []),
        ([change(0, "a", 6), change(1, "b", 9, (OTHER, 5))], "a", ["a"]),
        ([change(0, "a", 5), change(1, "b", 9, (OTHER, 5))], "b", []),
        ([change(0, "a", 1), change(1, None, 6), change(2, "b", 9, (OTHER, 5))], None, [None]),
        ([change(0, "a", 6), change(1, None, 9, (OTHER, 5))], "a", ["a"]),
        ([change(0, "a", 8, (OTHER, 2)), change(1, "b", 8, (OTHER, 2))], "b", []),
    ],
    ids=["newer", "older", "equal", "behind a delete", "older delete", "in order"],
)
def test_the_first_append_decides(
    log: Sequence[Any], shown: str | None, restored: list[Any], sizes: Sequence[int]
) -> None:
    rig, rest = Rig(), list(log)
    for size in sizes:
        if rest:
            ingest(rig.items, HERE, rest[:size], 0)
            del rest[:size]
    rig.items.flush()
    assert title_of(rig.store.read_item_metadata([FILM], 1)[FILM].body) == shown
    assert [title_of(value) for _, value, _ in rig.out.forwarded] == restored
    assert all((key, to) == (FILM.encode(), HERE) for key, _, to in rig.out.forwarded)


def test_nothing_is_appended_again_where_a_newer_change_follows() -> None:
    rig = Rig()
    log = [change(0, "a", 6), change(1, "b", 9, (OTHER, 5)), change(2, "c", 9)]
    outcome = ingest(rig.items, HERE, log, 0)
    assert (outcome.applied, outcome.outdated, rig.out.forwarded) == (2, 1, [])


def test_a_dispute_is_counted_each_time_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    rig, total = Rig(), 0
    for n in range(3):
        ingest(rig.items, HERE, [change(2 * n, "mine", 10 * n)], 0)
        stray = change(2 * n + 1, "theirs", 10 * n + 5, (OTHER, 10 * n + 4))
        total += ingest(rig.items, HERE, [stray], 0).disputed
    assert total == 3
    assert sum("two producers send the same item" in r.getMessage() for r in caplog.records) == 1
    again = Rig()
    for n in range(3):  # one producer, always in the wrong partition
        assert not ingest(again.items, HERE, [change(n, "a", n, (OTHER, n))], 0).disputed


def test_users_in_two_partitions() -> None:
    rig = Rig()
    outcome = ingest(rig.users, HERE, [profile(0, 1, 6), profile(1, 2, 9, (OTHER, 5))], 0)
    assert (outcome.applied, outcome.outdated, outcome.disputed) == (1, 1, 1)
    [(key, value, partition)] = rig.out.forwarded
    assert (key, partition) == (ANA.encode(), HERE) and b'"age":1' in (value or b"")
    # A forwarded null record leaves the profile that is newer, and appends it again.
    outcome = ingest(rig.users, HERE, [profile(2, None, 9, (OTHER, 5))], 0)
    assert outcome.outdated == 1 and len(rig.out.forwarded) == 2
    assert rig.store.snapshot().profiles == {(f"u{HERE}", ANA): {"age": 1}}
    ingest(rig.users, HERE, [profile(3, None, 9, (OTHER, 6))], 0)
    assert rig.store.snapshot().profiles == {} and len(rig.out.forwarded) == 2


@pytest.mark.parametrize("forget_after", [3, 4])
@pytest.mark.parametrize("sizes", [(9,), (2, 9), (3, 9), (1, 1, 1, 9)])
@pytest.mark.parametrize("then", [3, None])
def test_a_profile_that_is_appended_again_does_not_undo_a_change_of_its_millisecond(
    then: int | None, sizes: Sequence[int], forget_after: int
) -> None:
    """Records of one producer batch have one time stamp; ingest may read them in two batches."""
    again = profile(3, 1, 1)
    again.headers = [("origin", f"users/{HERE}/1".encode())]
    again.headers.append((events.ORIGIN_MS, str(MS + 1).encode()))
    rig, log = Rig(), [profile(0, 1, 1), profile(1, 2, 1, (OTHER, 0)), profile(2, then, 1), again]
    rest, forget = list(log), events.encode(dead_letters.forget_of(SETTINGS, log[2], ANA))
    for size in sizes:
        if rest:
            ingest(rig.users, HERE, rest[:size], 0)
            del rest[:size]
        if then is None and len(log) - len(rest) == forget_after:
            ingest(rig.clicks, HERE, [rec(0, forget, ANA.encode())], 0)
    have = {(f"u{HERE}", ANA): {"age": then}} if then else {}
    assert rig.store.snapshot().profiles == have
    if then:
        assert b'"age":3' in rig.out.forwarded[-1][1]
    after = profile(4, then, 1)
    after.headers = [("origin", f"users/{HERE}/3".encode()), again.headers[1]]
    count = len(rig.out.forwarded)
    ingest(rig.users, HERE, [after], 0)
    assert rig.store.snapshot().profiles == have and len(rig.out.forwarded) == count


@pytest.mark.parametrize("ahead_ms", [0, 1])
def test_the_last_append_bounds_the_time_of_an_event(ahead_ms: int) -> None:
    """A dead letter that was too far ahead is replayed later, with its first append."""
    rig, at_ms = Rig(), MS + SETTINGS.far_future_ms_max + 1_000 + ahead_ms
    user = events.encode(UserProfile(user_id=ANA, attributes={"age": 1}, at_ms=at_ms))
    film = events.encode(Item(item_id=FILM, title="a", at_ms=at_ms))
    outcomes = [
        ingest(rig.users, HERE, [record(0, user, 1_000, (HERE, 0), ANA, "users")], 0),
        ingest(rig.items, HERE, [record(0, film, 1_000, (HERE, 0), FILM, "items")], 0),
    ]
    assert [(o.applied, o.rejected) for o in outcomes] == 2 * [(1 - ahead_ms, ahead_ms)]
    assert [reason for _, reason in rig.out.letters] == 2 * ahead_ms * ["far_future"]


READS = ("read_many", "read_item_metadata", "read_user", "fences")


def reads(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the store that read, from here on."""
    calls: list[str] = []

    def counted(name: str) -> Any:
        read = getattr(rig.store, name)
        return lambda *arguments: calls.append(name) or read(*arguments)

    for name in READS:
        monkeypatch.setattr(rig.store, name, counted(name))
    return calls


@pytest.mark.parametrize("topic", ["users", "items"])
def test_a_batch_reads_the_store_once_for_all_its_strays_and_never_without_any(
    topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig()
    handler = rig.users if topic == "users" else rig.items
    ids = [f"{topic}{n}" for n in range(100)]
    values = {
        key: events.encode(
            UserProfile(user_id=key)
            if topic == "users"
            else Item(item_id=key, title="t", categories=["c"], at_ms=MS)
        )
        for key in ids
    }
    records = [record(n, values[key], n, None, key, topic) for n, key in enumerate(ids)]
    mine = [r for r, key in zip(records, ids, strict=True) if partition_of(key, 2) == HERE]
    ingest(handler, HERE, [record(0, values[ids[0]], 0, None, ids[0], topic)])
    calls = reads(rig, monkeypatch)
    assert ingest(handler, HERE, mine[1:]).applied == len(mine) - 1 > 20 and calls == []
    again = [record(100 + n, values[key], n, None, key, topic) for n, key in enumerate(ids)]
    outcome = ingest(handler, HERE, again)
    assert outcome.forwarded == len(ids) - len(mine) > 20
    assert calls == {"users": ["read_many"], "items": []}[topic]
    del calls[:]
    came = [record(200 + r.offset, r.value, 300, (OTHER, 299), r.key.decode(), topic) for r in mine]
    assert ingest(handler, HERE, came).applied == len(mine)
    assert calls == {"users": ["read_many"], "items": ["read_item_metadata"]}[topic]


def test_a_stray_is_forwarded_once() -> None:
    rig, stray = Rig(), rec(4, None, b"f0", "items", partition=HERE)
    while events.decode_key(stray.key) and not rig.out.forwarded:
        stray.key = b"f%d" % (int(stray.key[1:]) + 1)
        stray.offset += 1
        ingest(rig.items, HERE, [stray], 0)
    [(key, value, partition)] = rig.out.forwarded
    assert (key, value, partition) == (stray.key, None, OTHER)
    rig.items.flush()
    rig.items.open(HERE)
    rig.items.fences.open({HERE: (0, 99)}, {HERE: stray.offset + 1})  # committed before
    rig.items.fences.replay_from(HERE, 0)
    rig.items.fences.open({HERE: (0, 99)}, {HERE: stray.offset + 1})
    assert ingest(rig.items, HERE, [stray], 0).forwarded == 0


def test_resync_does_not_take_a_stray_for_the_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compaction keeps the stray record although the item was deleted since."""
    deleted = change(1, None, 5)
    stray = record(9, change(0, "a", 1).value, 1, None, FILM, "items")
    stray.partition = OTHER
    for records in ([deleted, stray], [stray, deleted], [stray]):
        monkeypatch.setattr(reading, "read", lambda *_, records=records: iter(records))
        assert resync._live(SETTINGS, "items", None, set()) == set()
    monkeypatch.setattr(reading, "read", lambda *_: iter([deleted, change(2, "b", 6)]))
    assert resync._live(SETTINGS, "items", None, set()) == {FILM}
