"""Chaos in short: every kind of fault once, under load, and all state compared; the oracle can
fail.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cli.commands import replay_file
from eddyline.kafka.producers import now_ms
from eddyline.schema import co_visits
from eddyline.schema.events import shifted_to_now
from eddyline.schema.partitioning import partition_of
from eddyline.stores.memory import MemoryStore
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import ItemMetadata, Source, UserEffects, UserQuery
from embeddings.bundle import bundle as bundles
from sandbox.servers import free_ports, valkey
from sandbox.servers.supervisor import Supervisor
from tests import oracle
from tests.chaos import drive, scene
from tests.chaos.proxy import ERRORS, Proxy, ProxyFault
from tests.chaos.schedule import KINDS, plan
from tests.model import comparison
from tests.model.eras import Era

SEED = 11
WRITE = "redis.call('SET', KEYS[1], ARGV[1]); return 'done'"


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_every_kind_of_fault_leaves_the_state_that_the_topics_give(
    tmp_path: Path, dataset, bundle
) -> None:
    folder, manifest = bundle
    second = scene.small_generation(tmp_path / "generations", dataset, "2")
    (tmp_path / "generations" / "1").symlink_to(folder / "1")
    expected: list[str] = []
    result = drive.run(
        tmp_path / "chaos",
        tmp_path / "generations",
        [manifest, second],
        dataset,
        seed=SEED,
        count=len(KINDS),
        gap_s=(0.4, 0.6),
        rate=120,
        short=True,
        on_progress=expected.append,
    )
    assert result.differences == [], "\n".join([f"seed {SEED}", *expected])
    missed = [str(fault) for fault, met in result.met if not met]
    assert missed == [], "\n".join([*missed, *expected])
    assert {fault.kind for fault, _ in result.met} == set(KINDS)
    assert result.answers["OK"] > 0 and set(result.answers) <= drive.MAY_ANSWER
    for what in (
        "list",
        "embedding",
        "event id",
        "count",
        "card",
        "item vector",
        "profile",
        "dead letter",
        "model's history",
        "model's embedding 1",
        "model's embedding 2",
        "model's event id",
        "model's count",
        "model's item",
        "model's item vector 2",
        "model's profile",
        "model's erasure",
        "model's dead letter",
        "model's stray of items and users",
        "model's idle user",
        "record of another format",
        "ended generation",
    ):
        assert result.counts[what] > 0, f"no {what} was compared"


def test_the_oracle_names_what_was_damaged(make_live) -> None:
    live = make_live(with_worker=False)
    replay_file.send(live.settings, shifted_to_now(live.dataset.clicks[:2_000], now_ms()))
    live.applied(timeout_s=60)
    live.supervisor.stop()  # no process repairs the state meanwhile
    topics = oracle.Topics.read(live.settings)
    expected = oracle.truth(live.settings, topics, bundles.load(live.settings.bundles / "1"))
    assert oracle.differences(live.settings, topics, expected).differences == []
    towers, eras = bundles.load(live.settings.bundles / "1"), [Era(live.settings)]
    assert comparison.compare(topics, [towers], eras).differences == []
    store, client = RedisStore(live.settings), redis.Redis.from_url(live.settings.redis_url)
    user, prefix = live.dataset.clicks[0].user_id, live.settings.key_prefix
    partition = partition_of(user, live.settings.clicks_partitions)
    slot, source = f"u{partition}", Source("clicks", partition)
    [read] = store.read_many([UserQuery(slot, source, [user], ["1"])])
    mine, (steps, vector) = read.histories[user], read.embeddings["1"][user]
    [(bucket, counted)] = list(store.popular("i0", 1).items())[-1:]
    [item] = counted
    card = store.read_item_metadata([item], 1)[item]

    def damaged(*named: str, seen_by_model: Sequence[str]) -> None:
        found = oracle.differences(live.settings, topics, expected).differences
        assert found and all(any(name in line for line in found) for name in named), (named, found)
        by_model = "\n".join(comparison.compare(topics, [towers], eras).differences)
        assert all(what in by_model for what in seen_by_model), (seen_by_model, by_model)

    def write(**effects) -> None:
        store.write_users(slot, source, read.fence, read.fence, UserEffects(**effects))

    try:
        client.zincrby(f"{prefix}{{i0}}:popular:{bucket}", 1, item)
        damaged(
            f"count i0:{bucket}:{item}: "
            f"Redis has {counted[item] + 1}, the topic gives {counted[item]}",
            seen_by_model=[f"model's count i0:{bucket}:{item}"],
        )
        client.zincrby(f"{prefix}{{i0}}:popular:{bucket}", -1, item)
        with _damaged_row(client, prefix, expected.store) as visited:
            damaged(f"row after {visited}:", seen_by_model=[f"model's row after {visited}"])
        other = mine.entries[0].__class__("another-item", mine.entries[-1].at_ms)
        shorter = (*mine.entries[:-1], other)
        write(histories={user: mine.__class__(**_fields(mine) | {"entries": shorter})})
        write(embeddings={"1": {user: (steps, bytes([vector[0] ^ 1]) + vector[1:])}})
        damaged(
            f"list {slot}:{user}:",
            f"embedding {slot}:1:{user}:",
            seen_by_model=[f"model's history {user}", f"model's embedding 1 {user}"],
        )
        write(histories={user: mine}, embeddings={"1": {user: (steps, vector)}})
        fence = store.fences(Source("items", card.partition), ["i0"])["i0"]
        store.write_item_metadata(
            "i0",
            Source("items", card.partition),
            fence,
            fence,
            {item: ItemMetadata(card.partition, card.offset, b"")},
        )
        client.set(f"{prefix}{{{slot}}}:p:{user}", bytes(16) + b"\x80")
        client.set(f"{prefix}{{{slot}}}:somebody-elses", b"")
        client.delete(f"{prefix}fence:{{i0}}:clicks:{partition}")
        damaged(
            f"card {item}:",
            f"profile {slot}:{user}",
            "somebody-elses: of a kind",
            f"fence i0:clicks:{partition}: Redis has ''",
            seen_by_model=[f"model's item {item}", f"model's profile {user}"],
        )
    finally:
        store.close()
        client.close()


@contextmanager
def _damaged_row(client: redis.Redis, prefix: str, store: MemoryStore) -> Iterator[str]:
    """An item whose co-visitation row has one thousandth of a visit more."""
    visited = min(item for _, kind, item in store.snapshot().rows if kind == "after")
    key = f"{prefix}{{i0}}:after:{visited}"
    row = client.get(key)
    client.set(key, row + co_visits.entries([(int(co_visits.decode(row).keys[0]), 1, 0)]))
    yield visited
    client.set(key, row)


def _fields(history) -> dict[str, object]:
    return {name: getattr(history, name) for name in history.__struct_fields__}


def test_a_plan_has_every_kind_equally_often() -> None:
    faults = plan(SEED, 10 * len(KINDS), (2, 4))
    assert all(sum(fault.kind == kind for fault in faults) == 10 for kind in KINDS)
    gaps = [b.at_s - a.at_s for a, b in pairwise(faults)]
    assert min(gaps) >= 1.99 and max(gaps) <= 4.01 and faults == plan(SEED, 10 * len(KINDS), (2, 4))


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("proxied")
    port = free_ports.choose_ports(folder / "run", ("redis",))["redis"]
    with Supervisor(folder / "logs") as supervisor:
        supervisor.start(valkey.prepare(folder, port, valkey.program()[0]))
        yield port


@pytest.fixture
def proxied(own_redis: int) -> Iterator[tuple[Proxy, redis.Redis, redis.Redis]]:
    """(the proxy, a client through it, a client of Redis itself), on an empty server."""
    proxy = Proxy(own_redis)
    options = {"host": "127.0.0.1", "socket_timeout": 0.5, "retry": Retry(NoBackoff(), 0)}
    with (
        redis.Redis(port=proxy.port, **options) as through,
        redis.Redis(port=own_redis, **options) as direct,
    ):
        direct.flushall()
        yield proxy, through, direct
    proxy.close()


def soon() -> float:
    return time.monotonic() + 30


def test_the_proxy_hands_everything_through(proxied) -> None:
    proxy, through, _ = proxied
    assert through.eval(WRITE, 1, "a", b"\r\n" * 40_000) == b"done"
    with through.pipeline(transaction=True) as pipe:
        pipe.get("a").mget(["a", "none"]).zadd("z", {"x": 1.5}).zrange("z", 0, -1, withscores=True)
        assert pipe.execute() == [b"\r\n" * 40_000, [b"\r\n" * 40_000, None], 1, [(b"x", 1.5)]]
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        through.incr("z")
    assert not proxy.hits


@pytest.mark.parametrize("code", ERRORS)
def test_an_error_takes_the_place_of_one_answer(proxied, code: str) -> None:
    proxy, through, direct = proxied
    proxy.inject(ProxyFault("error", soon(), code))
    with pytest.raises(redis.RedisError):
        through.eval(WRITE, 1, "a", "b")
    assert direct.get("a") is None, "the command did not get through"
    with through.pipeline(transaction=True) as pipe:
        pipe.get("a").get("b")
        if code in ("OOM", "MISCONF"):
            assert pipe.execute() == [None, None], "reads still work"
        else:
            with pytest.raises(redis.RedisError):
                pipe.execute()
    proxy.clear()
    assert through.eval(WRITE, 1, "a", "b") == b"done", "the connection is as good as before"
    with through.pipeline(transaction=True) as pipe:
        assert pipe.get("a").execute() == [b"b"]


def test_a_cut_falls_before_or_after_the_write(proxied) -> None:
    proxy, through, direct = proxied
    proxy.inject(ProxyFault("cut before", soon()))
    with pytest.raises(redis.ConnectionError):
        through.eval(WRITE, 1, "before", "b")
    assert through.get("before") is None and direct.get("before") is None
    proxy.inject(ProxyFault("cut after", soon()))
    with pytest.raises(redis.ConnectionError):
        through.eval(WRITE, 1, "after", "b")
    assert direct.get("after") == b"b", "Redis did it, and the client does not know"
    assert proxy.hits == {"cut before": 1, "cut after": 1}


def test_a_slow_answer_comes_after_the_time_out(proxied) -> None:
    proxy, through, direct = proxied
    proxy.inject(ProxyFault("slow", soon(), delay_s=0.7))
    with pytest.raises(redis.TimeoutError):
        through.eval(WRITE, 1, "a", "b")
    assert direct.get("a") == b"b"
    proxy.inject(ProxyFault("slow", time.monotonic() - 1, delay_s=0.7))
    assert through.get("a") == b"b", "trouble ends by itself"
