"""The live path on real servers: Kafka, Redis, an ingest process, query workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from confluent_kafka import Producer

from cli.demo.trace import trace
from cli.main import main
from eddyline.kafka import producers, topics
from eddyline.kafka.producers import now_ms, sent_to
from eddyline.schema import events
from eddyline.schema.events import Item, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.stores.redis import RedisStore
from serving.proto import retrieval_pb2 as pb
from serving.rpc.client import is_ready

ROOT = Path(__file__).resolve().parents[2]


def ids(answer):
    return [item.item_id for item in answer.items]


@pytest.fixture
def user() -> str:
    return f"user-{uuid.uuid4().hex[:10]}"


def test_a_click_changes_the_next_answer(live, user) -> None:
    client = live.client()
    likes = [item.item_id for item in live.dataset.items if item.available][:4]
    for item_id in likes[:3]:
        token = live.click(user, item_id)
    before = client.retrieve(user, 10, after=token, wait_ms=2000)
    assert before.freshness.after.applied and not set(likes[:3]) & set(ids(before))
    clicked = before.items[4].item_id
    token = live.click(user, clicked)
    answer = client.retrieve(user, 10, after=token, wait_ms=2000, with_cards=True)
    assert len(answer.items) == 10 and clicked not in ids(answer) and ids(answer) != ids(before)
    assert [i.rank for i in answer.items] == list(range(1, 11))
    assert {i.path for i in answer.items} == {"towers"} and {
        i.generation for i in answer.items
    } == {"1"}
    assert all(i.age_ms >= 0 and i.card.title for i in answer.items)
    scores = [i.score for i in answer.items]
    assert scores == sorted(scores, reverse=True)


def test_every_answer_says_how_fresh_it_is(live, user) -> None:
    client = live.client()
    began_us = time.time_ns() // 1000
    partition, offset = live.click(user, live.dataset.items[5].item_id)
    answer = client.retrieve(user, 5, after=(partition, offset), wait_ms=2000)
    fresh = answer.freshness
    assert fresh.generation == "1"
    assert (fresh.user.known, fresh.user.partition, fresh.user.offset) == (True, partition, offset)
    assert partition == partition_of(user, live.settings.clicks_partitions)
    assert fresh.user.fence_offset >= offset
    stamps = [
        began_us,
        fresh.user.produced_us,
        fresh.user.read_us,
        fresh.user.applied_us,
        fresh.worker.user_read_us,
        fresh.worker.embedded_us,
        fresh.worker.searched_us,
        fresh.worker.answered_us,
        time.time_ns() // 1000,
    ]
    assert stamps == sorted(stamps), "the hops are stamped in their order"
    assert abs(fresh.user.appended_ms - fresh.user.produced_us // 1000) < 5000
    assert trace(answer).total_ms < 2000
    assert {mark.partition for mark in fresh.index} <= {0, 1} and fresh.index


def test_a_click_that_does_not_exist_is_not_awaited(live, user) -> None:
    client = live.client()
    partition = partition_of(user, live.settings.clicks_partitions)
    client.retrieve(user, 5, after=(partition, 1 << 40), wait_ms=2_000)  # connects to Kafka
    took = []
    for _ in range(3):
        began = time.monotonic()
        answer = client.retrieve(user, 5, after=(partition, 1 << 40), wait_ms=2_000)
        took.append(time.monotonic() - began)
    # Some milliseconds on an idle machine; the shortest, since a busy one delays any single call.
    assert min(took) < 1.5, "the whole wait takes 2 s"
    assert not answer.freshness.after.applied
    assert f"partition {partition} of clicks ends before offset" in answer.freshness.after.why
    assert len(answer.items) == 5


def test_an_unknown_user_gets_the_popular_items_and_the_reason(live, user) -> None:
    answer = live.client().retrieve(user, 10)
    assert len(answer.items) == 10 and {i.path for i in answer.items} == {"popular"}
    assert not answer.freshness.user.known
    assert "towers" in {p.path for p in answer.paths if p.why}


def test_an_item_is_found_changes_and_is_gone(live, user) -> None:
    client, item_id = live.client(), f"item-{uuid.uuid4().hex[:10]}"
    token = live.click(user, live.dataset.items[0].item_id)
    everything = len(live.dataset.items) + 50
    client.retrieve(user, 1, after=token, wait_ms=2000)

    def found():
        return item_id in ids(client.retrieve(user, everything))

    item = Item(
        item_id=item_id,
        title="A new one",
        categories=live.dataset.items[0].categories,
        at_ms=now_ms(),
    )
    live.item(item)
    live.wait_for("the new item", found)
    live.item(msgspec.structs.replace(item, available=False))
    live.wait_for("the unavailable item to go", lambda: not found())
    live.item(item)
    live.wait_for("the item to be back", found)
    live.delete(item_id)
    live.wait_for("the deleted item to go", lambda: not found())
    store = RedisStore(live.settings)

    def card_of_deleted() -> bool:
        card = store.read_item_metadata([item_id], 1).get(item_id)
        return card is not None and card.deleted

    live.wait_for("the card, which comes a moment later", card_of_deleted)


def test_a_second_worker_gives_the_same_answers(live) -> None:
    child, address = live.deployment.worker_child(
        is_ready, "second", clicks_partitions="4", items_partitions="2", redis_timeout_ms="1000"
    )
    live.supervisor.start(child)
    first, second = live.client(), live.client(address)
    users = list(live.dataset.profiles)[:40]

    def differences():
        return [u for u in users if ids(first.retrieve(u, 20)) != ids(second.retrieve(u, 20))]

    live.wait_for("both workers to agree", lambda: not differences())
    one, two = first.retrieve(users[0], 20), second.retrieve(users[0], 20)
    assert [i.score for i in one.items] == [i.score for i in two.items]


BAD_CLICKS = {
    "not JSON": (b"{", "malformed_json"),
    "no value": (None, "no_value"),
    "wrong type": (b'{"user_id":"u","item_id":7,"at_ms":1}', "bad_field"),
    "missing field": (b'{"user_id":"u","at_ms":1}', "bad_field"),
    "unknown kind": (b'{"user_id":"u","item_id":"i","at_ms":1,"kind":"stare"}', "bad_field"),
    "far future": (b'{"user_id":"u","item_id":"i","at_ms":99999999999999}', "far_future"),
    "empty id": (b'{"user_id":"","item_id":"i","at_ms":1}', "bad_field"),
    "NaN": (b'{"user_id":"u","item_id":"i","at_ms":1,"weight":NaN}', "malformed_json"),
    "control character": (b'{"user_id":"u\\u0000","item_id":"i","at_ms":1}', "control_character"),
}
BAD_ITEMS = {
    "not JSON": (b"nonsense", "malformed_json"),
    "no availability": (b'{"item_id":"KEY","available":null}', "bad_field"),
    "no time": (b'{"item_id":"KEY","at_ms":"today"}', "bad_field"),
    "another key": (b'{"item_id":"other"}', "wrong_key"),
}


def test_bad_records_are_dead_letters_and_the_stream_goes_on(live, user) -> None:
    sent = {}
    for name, (value, reason) in BAD_CLICKS.items():
        at = live.raw(topics.CLICKS, value, key=b"u")
        sent[f"{live.settings.prefixed(topics.CLICKS)}/{at[0]}/{at[1]}"] = (name, value, reason)
    for name, (value, reason) in BAD_ITEMS.items():
        key = f"bad-{uuid.uuid4().hex[:8]}"
        value = value.replace(b"KEY", key.encode())
        at = live.raw(topics.ITEMS, value, key=key.encode())
        sent[f"{live.settings.prefixed(topics.ITEMS)}/{at[0]}/{at[1]}"] = (name, value, reason)
    token = live.click(user, live.dataset.items[1].item_id)
    assert live.client().retrieve(user, 3, after=token, wait_ms=2000).freshness.after.applied
    live.applied()
    letters = {r.key.decode(): r for r in live.read(topics.DEAD_LETTERS)}
    for at, (name, value, reason) in sent.items():
        headers = {k: v.decode() for k, v in letters[at].headers}
        assert headers["reason"] == reason, name
        assert (letters[at].value or None) == value, name


SOLD_OUT = {
    "null price": b'{"item_id":"KEY","available":false,"attributes":{"price":null}}',
    "NaN price": b'{"item_id":"KEY","available":false,"attributes":{"price":NaN}}',
    "wrong vector length": b'{"item_id":"KEY","available":false,"vector":[1.0,2.0]}',
    "1 MB title": b'{"item_id":"KEY","available":false,"title":"' + b"x" * 1_000_000 + b'"}',
}


@pytest.mark.parametrize("name", SOLD_OUT)
def test_an_item_with_a_bad_optional_part_is_taken_off_the_answers(live, name) -> None:
    item_id = f"sold-{uuid.uuid4().hex[:8]}"
    only = pb.Filters(allow=[item_id])
    client = live.client()
    live.item(Item(item_id=item_id, title="t", attributes={"price": 3}, at_ms=now_ms()))
    live.wait_for("the item to be found", lambda: client.retrieve("nobody", 3, filters=only).items)
    live.raw(topics.ITEMS, SOLD_OUT[name].replace(b"KEY", item_id.encode()), key=item_id.encode())
    live.wait_for(
        "the sold-out item to go", lambda: not client.retrieve("nobody", 3, filters=only).items
    )


def test_a_click_in_a_wrong_partition_is_forwarded_and_counts_once(live, user, store) -> None:
    own = partition_of(user, live.settings.clicks_partitions)
    wrong = (own + 1) % live.settings.clicks_partitions
    click = {
        "user_id": user,
        "item_id": live.dataset.items[2].item_id,
        "at_ms": now_ms(),
        "kind": "like",
    }
    live.raw(topics.CLICKS, msgspec.json.encode(click), partition=wrong)
    live.raw(
        topics.CLICKS,
        msgspec.json.encode(click | {"event_id": uuid.uuid4().hex}),
        partition=wrong,
        key=b"x",
    )

    def arrived():
        return len(store.read_user(f"u{own}", own, user, "1").history.entries) == 2

    live.wait_for("both clicks to be applied in their own partition", arrived)
    assert not store.read_user(f"u{wrong}", wrong, user, "1").history.entries


def test_spellings_of_an_id_are_one(live, store) -> None:
    """Also for a delete and for forgetting; a number that was sent as text is one for a filter."""
    client, run = live.client(), uuid.uuid4().hex[:6]
    item_id, user = f"caf\u00e9-{run}", f"zo\u00eb-{run}"
    spelled_item, spelled_user = f" cafe\u0301-{run}", f"zoe\u0308-{run}\u2003"
    texts = {" prix": "19.90"}
    live.item(Item(item_id=spelled_item, title="t", attributes=texts, at_ms=now_ms()))
    price = pb.Range(attribute="prix", min=19.9, max=19.9)
    only = pb.Filters(allow=[spelled_item], ranges=[price])

    def shown() -> list[str]:
        return ids(client.retrieve("nobody", 3, filters=only))

    # A worker refuses the attribute until the first item has it.
    allowed = pb.Filters(allow=[item_id])
    live.wait_for("the item", lambda: ids(client.retrieve("nobody", 3, filters=allowed)))
    assert shown() == [item_id]
    for spelling in (user, spelled_user):
        live.click(spelling, live.dataset.items[2].item_id)
    own = partition_of(user, live.settings.clicks_partitions)

    def entries() -> int:
        return len(store.read_user(f"u{own}", own, user, "1").history.entries)

    live.wait_for("both clicks", lambda: entries() == 2)
    assert client.retrieve(spelled_user, 3).freshness.user.known
    producers.send_forget(live.producer, live.settings, spelled_user)
    live.delete(spelled_item)
    live.wait_for("the user to be forgotten", lambda: entries() == 0)
    live.wait_for("the item to go", lambda: not shown())


def test_any_partitioner(live, store) -> None:
    """librdkafka's default puts most keys elsewhere; changes and deletes apply in their order."""
    settings, run = live.settings, uuid.uuid4().hex[:6]
    producer = Producer({"bootstrap.servers": settings.kafka_bootstrap_servers, "linger.ms": 5})
    keys = [f"any-{run}-{n}" for n in range(40)]

    def send(topic: str, key: str, event: Item | UserProfile | None) -> None:
        value = None if event is None else events.encode(event)
        producer.produce(settings.prefixed(topic), value, key)

    for turn in ("old", "new"):
        for key in keys:
            send(topics.ITEMS, key, Item(item_id=key, title=turn, at_ms=now_ms()))
            send(topics.USERS, key, UserProfile(user_id=key, attributes={"turn": turn}))
    for key in keys[:10]:
        send(topics.ITEMS, key, None)
        send(topics.USERS, key, None)
    assert producer.flush(20) == 0
    found = {r.key.decode(): r.partition for r in live.read(topics.ITEMS) if r.key}
    strays = [k for k in keys if found[k] != partition_of(k, settings.items_partitions)]
    live.wait_for("the strays to be forwarded", lambda: _forwarded(live, strays), timeout_s=30)
    live.applied()
    items = store.read_item_metadata(keys, settings.item_slots)
    assert all(items[key].deleted for key in keys[:10])
    assert {msgspec.json.decode(items[key].body)["title"] for key in keys[10:]} == {"new"}
    partitions = {key: partition_of(key, settings.clicks_partitions) for key in keys}
    profiles = [store.read_user(f"u{p}", p, key, "1").profile for key, p in partitions.items()]
    assert profiles == 10 * [{}] + 30 * [{"turn": "new"}]


def _forwarded(live, strays: list[str]) -> bool:
    """Whether the last record of each item lies in its partition."""
    last = {r.key.decode(): r for r in sorted(live.read(topics.ITEMS), key=lambda r: r.timestamp)}
    return all(dict(last[key].headers).get("origin") for key in strays)


def test_a_resent_event_counts_once(live, user, store) -> None:
    own = partition_of(user, live.settings.clicks_partitions)
    for _ in range(3):
        live.click(user, live.dataset.items[3].item_id, event_id=f"once-{user}")
    live.applied()
    assert len(store.read_user(f"u{own}", own, user, "1").history.entries) == 1


def test_a_profile_arrives_and_a_forgotten_user_is_gone(live, user, store) -> None:
    own = partition_of(user, live.settings.clicks_partitions)
    profile = UserProfile(user_id=user, attributes={"age": 31})
    sent_to(producers.send_profile(live.producer, live.settings, profile), live.settings)
    live.click(user, live.dataset.items[3].item_id)
    live.applied()
    state = store.read_user(f"u{own}", own, user, "1")
    assert state.profile == {"age": 31} and state.history.entries
    sent_to(producers.send_forget(live.producer, live.settings, user), live.settings)
    live.applied()
    keys = [k for k in store._redis.scan_iter(match=f"{live.settings.namespace}:*", count=1000)]
    assert keys and not [k for k in keys if user.encode() in k]
    assert not live.client().retrieve(user, 3).freshness.user.known


def test_the_example_producer_works(live, user, store) -> None:
    items = [item.item_id for item in live.dataset.items[:2]]
    env = os.environ | {
        "KAFKA_BOOTSTRAP_SERVERS": live.settings.kafka_bootstrap_servers,
        "CLICKS_TOPIC": live.settings.prefixed(topics.CLICKS),
    }
    command = [sys.executable, str(ROOT / "examples" / "produce_clicks.py"), user, *items]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(live.settings.prefixed(topics.CLICKS)) == 2
    own = partition_of(user, live.settings.clicks_partitions)
    live.wait_for(
        "both clicks", lambda: len(store.read_user(f"u{own}", own, user, "1").history.entries) == 2
    )


def test_the_command_line_works(
    live, user, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: a process for each command would take a second of CPU."""
    for name, value in {
        "EDDYLINE_KAFKA_BOOTSTRAP_SERVERS": live.settings.kafka_bootstrap_servers,
        "EDDYLINE_REDIS_URL": live.settings.redis_url,
        "EDDYLINE_NAMESPACE": live.settings.namespace,
        "EDDYLINE_DATA_DIR": live.settings.data_dir,
        "EDDYLINE_CLICKS_PARTITIONS": "4",
        "EDDYLINE_ITEMS_PARTITIONS": "2",
        "COLUMNS": "200",
    }.items():
        monkeypatch.setenv(name, value)

    def run(*words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["eddyline", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = "".join(capsys.readouterr())
        assert (ended.value.code or 0) == code, printed
        return printed

    item_id = live.dataset.items[7].item_id
    said = run("click", user, item_id, "--kind", "like")
    token = said.split("--after ")[1].split()[0]
    shown = run("query", user, "--after", token, "-k", "5")
    assert "towers" in shown and f"clicks/{token}" in shown
    assert '"item_id"' in run("query", user, "--json")
    assert "similar 1" in run("similar", item_id, "-k", "3")
    assert "seen: liked" in run("explain", user, item_id)
    assert "not live" in run("similar", f"cli-{user}", code=1)
    assert "in the graph" in run("stats")
    assert "items/" in run(
        "item", f"cli-{user}", "--title", "Made here", "--attribute", "year=2026"
    )
    assert "delete" in run("item", f"cli-{user}", "--delete")
    assert "kind" in run("click", user, item_id, "--kind", "stare", code=1)
    assert "worker_port" in run("settings")
    lines = [
        {"user_id": user, "item_id": i.item_id, "at_ms": 1_000 * n}
        for n, i in enumerate(live.dataset.items[:20])
    ]
    file = Path(live.settings.data_dir) / f"{user}.jsonl"
    file.write_bytes(b"\n".join(map(msgspec.json.encode, lines)))
    assert "20 records" in run("replay", str(file), "--speed", "1000", "--shift-to-now")
    file.write_bytes(b'{"user_id":"u"}\n')
    assert "line 1" in run("replay", str(file), code=1)


def test_ingest_runs_on_uvloop(live) -> None:
    said = "".join(
        path.read_text(encoding="utf-8")
        for path in live.deployment.supervisor.log_dir.glob("*ingest*")
    )
    assert "ingest starts" in said and "uvloop" in said.split("ingest starts", 1)[1].splitlines()[0]


def test_a_worker_that_has_the_bundle_alone_answers_a_filtered_query(make_live) -> None:
    """No item was ever sent to Kafka: the bundle has the attributes that filters need."""
    alone = make_live(with_items=False)
    of_item = {item.item_id: item.categories for item in alone.dataset.items if item.available}
    wanted = Counter(name for names in of_item.values() for name in names).most_common(3)[-1][0]
    right = {item_id for item_id, names in of_item.items() if wanted in names}
    answer = alone.client().retrieve(
        "nobody", len(of_item), filters=pb.Filters(categories=[wanted])
    )
    assert set(ids(answer)) == right and 0 < len(right) < len(of_item)
    assert f"{len(right)} live items pass the filter" in answer.short_because
