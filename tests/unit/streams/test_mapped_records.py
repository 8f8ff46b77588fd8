"""Topics with a map: what ingest, archive and refill make of one record with several events."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
from kafka.errors import MessageSizeTooLargeError

from eddyline.archive import HOUR_MS, Archive
from eddyline.errors import Rejected
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema import events, validation
from eddyline.schema.events import Click, Forget
from eddyline.schema.partitioning import partition_of
from eddyline.schema.records import MAPPED, OWN, BuiltRecord
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import LogId
from embeddings.data import sources
from streams import dead_letters
from streams.archive.partition_writer import ForgottenUsers, open_partition
from streams.clicks.handler import ClickHandler
from streams.dead_letters import KafkaDeadLetters, KafkaForwarder
from streams.fences import PartitionFences
from streams.operations import dead_letter_replay, refill_records
from streams.operations.dead_letter_replay import Letter
from streams.operations.refill_records import as_sent
from streams.users import UserHandler
from tests.applying import ingest

LOG = LogId("cluster-a", "topic-1")
MS = 472_222 * HOUR_MS
ANA = "ana"
HERE = partition_of(ANA, 2)
THERE = next(f"u{n}" for n in range(50) if partition_of(f"u{n}", 2) != HERE)
MAP = """
[clicks]
otherwise = "ignore"
[[clicks.rule]]
where = { type = "order" }
each = "lines"
user_id = "$.user"
item_id = "."
kind = { const = "purchase" }
[[clicks.rule]]
where = { type = "seen" }
user_id = "user"
item_id = "item"
[users.fields]
user_id = "id"
attributes_from = {}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    file = tmp_path / "map.toml"
    file.write_text(MAP, encoding="utf-8")
    maps = {"clicks_map": str(file), "users_map": str(file)}
    return Settings(
        clicks_partitions=2, items_partitions=2, data_dir=str(tmp_path), clicks_topic="shop", **maps
    )


class Rig:
    def __init__(self, settings: Settings) -> None:
        self.store, self.producer = MemoryStore(), Mock()
        logs = {CLICKS: LOG, USERS: LOG, ITEMS: LOG}
        letters = KafkaDeadLetters(settings, self.producer)
        forwarder = KafkaForwarder(settings, self.producer)
        self.clicks = ClickHandler(
            settings,
            self.store,
            PartitionFences(settings, self.store, CLICKS, logs),
            letters,
            forwarder,
            [],
        )
        fences = PartitionFences(settings, self.store, USERS, logs)
        self.users = UserHandler(
            settings, self.store, fences, letters, [], self.clicks.cache, forwarder
        )
        for handler in (self.clicks, self.users):
            handler.fences.open({HERE: (0, 1_000)})

    def entries(self, user: str = ANA) -> list[str]:
        state = self.store.read_user(f"u{HERE}", HERE, user, "")
        return [e.item_id for e in state.history.entries]

    def sent(self) -> list[tuple[str, Any, dict[str, Any]]]:
        return [(c.args[0], c.args[1], c.kwargs) for c in self.producer.send.call_args_list]


def record(offset: int, value: Any, **more: Any) -> Any:
    raw = value if value is None or isinstance(value, bytes) else msgspec.json.encode(value)
    fields = {"topic": "shop", "partition": HERE, "timestamp": MS, "key": b"k", "headers": ()}
    return SimpleNamespace(offset=offset, value=raw, **fields | more)


def order(*lines: Any, user: str = ANA) -> dict[str, Any]:
    return {"type": "order", "user": user, "lines": lines}


def test_the_events_of_a_record_are_applied_together_and_once(settings: Settings) -> None:
    rig = Rig(settings)
    log = [record(3, order("a", "b", "a")), record(4, {"type": "other"}), record(9, order())]
    outcome = ingest(rig.clicks, HERE, log)
    assert (outcome.records, outcome.applied, outcome.ignored) == (3, 3, 2)
    assert rig.entries() == ["a", "b", "a"]
    fences = PartitionFences(settings, rig.store, CLICKS, {CLICKS: LOG})
    handler = ClickHandler(settings, rig.store, fences, Mock(), Mock(), [])
    fences.open({HERE: (0, 1_000)})
    assert ingest(handler, HERE, log).applied == 0
    handler.popularity.write(HERE)
    (counted,) = rig.store.popular("i0", 9).values()
    assert counted == {"a": 10_000, "b": 5_000}


def test_a_refused_record_leaves_its_bytes_and_headers_in_the_dead_letters(
    settings: Settings,
) -> None:
    rig = Rig(settings)
    bad = record(3, order("a", {}), headers=[("ce_id", b"1"), ("origin_ms", b"5")])
    outcome = ingest(rig.clicks, HERE, [bad])
    assert (outcome.applied, outcome.rejected) == (0, 1) and rig.entries() == []
    [(topic, value, more)] = rig.sent()
    headers = dict(more["headers"])
    assert topic == "dead-letters" and value == bad.value and more["key"] == b"shop/%d/3" % HERE
    assert headers["reason"] == b"bad_field" and headers["record.ce_id"] == b"1"
    assert headers["origin_ms"] == b"5" and "record.origin_ms" not in headers


def test_strays_are_forwarded_mapped_and_marked(settings: Settings) -> None:
    rig = Rig(settings)
    outcome = ingest(
        rig.clicks, HERE, [record(3, order("a", "b", user=THERE), headers=[("x", b"")])]
    )
    assert outcome.forwarded == 2
    for number, (topic, value, more) in enumerate(rig.sent()):
        click = events.decode_click(value, appended_ms=MS, far_future_ms_max=0, id_form="nfc")
        assert (topic, more["key"], more["partition"]) == ("shop", THERE.encode(), 1 - HERE)
        assert (click.item_id, click.event_id) == ("ab"[number], f"shop/{HERE}/3#{number}")
        assert OWN in more["headers"] and MAPPED not in more["headers"]
    [value, _] = [value for _, value, _ in rig.sent()]
    one = rig.sent()[0]
    back = record(5, value, key=one[2]["key"], headers=one[2]["headers"], partition=1 - HERE)
    rig.clicks.fences.open({1 - HERE: (0, 1_000)})
    assert ingest(rig.clicks, 1 - HERE, [back]).applied == 1


def test_a_profile_is_mapped_and_a_forget_is_marked(settings: Settings) -> None:
    rig = Rig(settings)
    profile = record(1, {"id": ANA, "city": "Graz"}, topic="users")
    assert ingest(rig.users, HERE, [profile]).applied == 1
    assert rig.store.read_user(f"u{HERE}", HERE, ANA, "").profile == {"id": ANA, "city": "Graz"}
    ingest(rig.users, HERE, [record(2, None, key=ANA.encode(), topic="users")])
    [(topic, value, more)] = rig.sent()
    assert topic == "shop" and OWN in more["headers"]
    forget = record(7, value, key=ANA.encode(), headers=more["headers"])
    ingest(rig.clicks, HERE, [record(3, order("a")), forget])
    assert rig.entries() == []


def archived(settings: Settings, records: list[Any]) -> list[Any]:
    archive = Archive(settings)
    writer = open_partition(
        settings,
        archive,
        CLICKS,
        HERE,
        LOG,
        0,
        {HERE: ForgottenUsers(), 1 - HERE: ForgottenUsers()},
    )
    writer.append(records)
    writer.complete()
    return list(archive.read(CLICKS, HERE))


def test_the_archive_has_the_mapped_events_and_refill_and_trainer_read_them(
    settings: Settings,
) -> None:
    log = [record(3, order("a", "b", "a")), record(4, {"type": "seen", "user": ANA, "item": "c"})]
    found = archived(settings, log)
    assert [(one.offset, one.event.item_id) for one in found] == [
        (3, "a"),
        (3, "b"),
        (3, "a"),
        (4, "c"),
    ]
    as_records = [as_sent("shop", one) for one in found]
    live, refilled = Rig(settings), Rig(settings)
    ingest(live.clicks, HERE, log)
    for batch in refill_records.batches(iter(as_records), 2):
        ingest(refilled.clicks, HERE, batch)
    assert refilled.entries() == live.entries() == ["c", "a", "b", "a"]
    from_topic = [BuiltRecord("shop", HERE, r.offset, MS, r.key, r.value) for r in log]
    from_archive = [
        BuiltRecord("shop", HERE, r.offset, MS, r.key, r.value, [MAPPED]) for r in as_records
    ]
    none: dict[str, Any] = {ITEMS: [], USERS: []}
    clicks = [
        sources.assemble(settings, none | {CLICKS: read}, cut={}).clicks
        for read in (from_topic, from_archive)
    ]
    assert clicks[0] == clicks[1] and len({click.event_id for click in clicks[0]}) == 4


@pytest.mark.parametrize(("size", "expected"), [(1, [2, 1, 3]), (2, [2, 1, 3]), (3, [3, 3])])
def test_events_of_one_record_stay_in_one_batch(size: int, expected: list[int]) -> None:
    log = [record(offset, None) for offset in (1, 1, 2, 3, 3, 3)]
    assert [len(batch) for batch in refill_records.batches(iter(log), size)] == expected


def test_a_topic_of_another_system_keeps_its_name(settings: Settings) -> None:
    named = msgspec.structs.replace(settings, namespace="n")
    assert [named.prefixed(name) for name in (CLICKS, USERS, "dead-letters")] == [
        "shop",
        "n.users",
        "n.dead-letters",
    ]


def letter(value: Any, **more: Any) -> Letter:
    fields = {"reason": "r", "field": "", "detail": "", "key": b"k", "offset": 0}
    at = f"shop/{HERE}/3"
    return Letter(at=at, value=value, timestamp_ms=MS, first_ms=MS, **fields | more)  # type: ignore[arg-type]


def test_a_letter_is_sent_as_the_record_was_and_a_marked_one_to_its_user(
    settings: Settings,
) -> None:
    raw = msgspec.json.encode(order("a", "b", user=THERE))
    headers = (("ce_id", b"1"),)
    assert dead_letter_replay.checked(settings, letter(raw, headers=headers)) == (raw, HERE)
    own = events.encode(Click(user_id=THERE, item_id="a"))
    value, partition = dead_letter_replay.checked(settings, letter(own, headers=(OWN,)))
    click = events.decode_click(value, appended_ms=MS, far_future_ms_max=0, id_form="nfc")
    assert (click.event_id, partition) == (f"shop/{HERE}/3", 1 - HERE)
    assert click.at_ms == MS, "without a time: that of the first append, not of the replay"
    for value, reason in ((b'{"type":"other"}', "ignored"), (own, "ignored"), (b"{", "malformed")):
        with pytest.raises(Rejected, match=reason):
            dead_letter_replay.checked(settings, letter(value))


def test_a_letter_of_forgotten_users_is_not_sent(settings: Settings) -> None:
    rig = Rig(settings)
    forget = events.encode(Forget(user_id=ANA, forget_until_ms=MS, ends_ms=2**62))
    ingest(rig.clicks, HERE, [record(3, forget, key=ANA.encode(), headers=[OWN])])
    of_ana = letter(msgspec.json.encode(order("a", "b")))
    of_other = letter(msgspec.json.encode(order("a", user=THERE)))
    found = dead_letter_replay.forgotten_since(settings, rig.store, [of_ana])
    assert found == {of_ana.at}
    assert not dead_letter_replay.forgotten_since(settings, rig.store, [of_other])


def test_a_forwarded_event_that_the_broker_refuses_keeps_its_mark(settings: Settings) -> None:
    rig = Rig(settings)
    future = Mock()
    future.get.side_effect = [MessageSizeTooLargeError(), None, None]
    rig.producer.send.return_value = future
    stray = record(3, {"type": "seen", "user": THERE, "item": "a"})
    ingest(rig.clicks, HERE, [stray])
    topic, value, more = rig.sent()[-1]
    kept = dict(more["headers"])
    assert topic == "dead-letters" and kept["reason"] == b"too_large"
    assert kept["record.eddyline_format"] == OWN[1] and b"item_id" in value


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_headers_that_a_letter_keeps_are_limited(settings: Settings, more: int) -> None:
    rig = Rig(settings)
    value = b"v" * (dead_letters.HEADERS_BYTES_MAX - len("a") + more)
    ingest(rig.clicks, HERE, [record(3, b"{", headers=[("a", value), ("b", b"")])])
    kept = dict(rig.sent()[0][2]["headers"])
    assert ("record.a" in kept, "record.b" in kept) == (more <= 0, more < 0)


def test_users_of_a_table_lie_where_their_id_as_key_puts_them(tmp_path: Path) -> None:
    """The connector's transform makes the id the key."""
    settings = Settings(clicks_partitions=4, users_map="debezium", data_dir=str(tmp_path))
    here = partition_of("7", 4)
    for place in (here, (here + 1) % 4):
        for value in ({"op": "c", "after": {"id": 7, "city": "Graz"}}, {"op": "d", "before": None}):
            sent = record(1, value, key=b"7", partition=place, topic="users")
            [(user, profile, own)] = validation.profiles(settings, sent)
            assert user == "7" and (profile is None) == (value["op"] == "d")
            assert own == (place == here), "elsewhere it is forwarded"
