"""Forgetting users: the state is a function of the logs, and nothing from before comes back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema import events
from eddyline.schema.erasure import OLD_KEPT_MS, Erasure
from eddyline.schema.events import Click, Forget, Merge, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import LogId, Source, UserQuery
from streams.clicks.handler import ClickHandler
from streams.clicks.micro_steps import MicroSteps
from streams.dead_letters import forget_of
from streams.fences import PartitionFences
from streams.users import UserHandler
from tests.applying import ingest

LOG = LogId("cluster", "topic")
LOGS = {CLICKS: LOG, USERS: LOG, ITEMS: LOG}
P, SLOT = 0, "u0"
SETTINGS = Settings(
    at_ms_min=0,
    clicks_partitions=1,
    history_length_max=3,
    far_future_ms_max=300,
    forgotten_kept_d=1,
)
DAY_MS = 86_400_000
T = 10 * DAY_MS
ANA, BO = "ana", "bo"
assert {partition_of(user, 1) for user in (ANA, BO)} == {P}


class Steps(MicroSteps):
    """Micro-steps whose vector is the list of the items learned, as bytes."""

    def __init__(self, generation: str) -> None:
        self.generation, self.min_steps_before, self.row = generation, 0, lambda item: 0

    def history(self, entries: Sequence[Any]) -> tuple[int, ...]:
        return ()

    def run(self, steps: Any, counts: Any, stored: Any, profiles: Any) -> dict[str, Any]:
        vectors = {user: stored[user][1] if user in stored else b"" for user in counts}
        for step in steps:
            profile = msgspec.json.encode(profiles.get(step.user_id))
            vectors[step.user_id] += f"{step.key}{profile!r};".encode()
        return {user: (count, vectors[user]) for user, count in counts.items()}


class Sinks:
    """Outputs of the handlers; Forget records go to the end of `clicks`."""

    def __init__(self, clicks: list[Any] | None = None) -> None:
        self.clicks, self.forwarded = clicks, list[Click]()

    def put(self, record: Any, rejected: Any) -> None:
        raise AssertionError(rejected)

    def forward(self, record: Any, key: bytes, value: bytes | None, partition: int) -> None:
        self.forwarded.append(msgspec.json.decode(value, type=Click))

    def flush(self) -> None:
        pass


def rec(topic: str, offset: int, value: bytes | None, key: str, ms: int, *headers: Any) -> Any:
    return SimpleNamespace(
        topic=topic,
        partition=P,
        offset=offset,
        key=key.encode(),
        value=value,
        timestamp=ms,
        headers=headers,
    )


def click(offset: int, at_ms: int, ms: int, user: str = ANA, origin_ms: int | None = None) -> Any:
    value = events.encode(Click(user_id=user, item_id=f"i{offset}", at_ms=at_ms))
    headers = () if origin_ms is None else [("origin_ms", str(origin_ms).encode())]
    return rec(CLICKS, offset, value, user, ms, *headers)


def null(offset: int, ms: int, user: str = ANA) -> Any:
    return rec(USERS, offset, None, user, ms)


def profile(offset: int, ms: int, user: str = ANA, origin_ms: int | None = None) -> Any:
    value = events.encode(UserProfile(user_id=user, attributes={"n": offset}))
    headers = () if origin_ms is None else [("origin_ms", str(origin_ms).encode())]
    return rec(USERS, offset, value, user, ms, *headers)


def forget(offset: int, of: Any, ms: int | None = None) -> Any:
    user = of.key.decode()
    value = events.encode(forget_of(SETTINGS, of, user))
    return rec(CLICKS, offset, value, user, of.timestamp if ms is None else ms)


class Rig:
    """The handlers of one process on a store."""

    def __init__(self, store: MemoryStore | None = None, generations: Sequence[str] = ("1",)):
        self.store, self.out = store or MemoryStore(), Sinks()
        micro = [Steps(name) for name in generations]
        self.clicks = ClickHandler(
            SETTINGS,
            self.store,
            PartitionFences(SETTINGS, self.store, CLICKS, LOGS),
            self.out,
            self.out,
            micro,
        )
        self.users = UserHandler(
            SETTINGS,
            self.store,
            PartitionFences(SETTINGS, self.store, USERS, LOGS),
            self.out,
            list(generations),
            self.clicks.cache,
        )
        for handler in (self.clicks, self.users):
            handler.fences.open({P: (0, 10_000)})

    def apply(self, *records: Any) -> Any:
        handler = self.clicks if records[0].topic == CLICKS else self.users
        return ingest(handler, P, records)

    def items(self, user: str = ANA) -> list[str]:
        state = self.store.read_user(SLOT, P, user, "1")
        return [entry.item_id for entry in state.history.entries]

    def state(self, generations: Sequence[str] = ("1", "2")) -> Any:
        self.clicks.popularity.write(P)
        source = Source(CLICKS, P)
        [read] = self.store.read_many([UserQuery(SLOT, source, [ANA, BO], generations)])
        slot = self.store.read_slot(SLOT, source)
        return read, slot.accepted, slot.profiles, self.store.popular("i0", 10**6)


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Any], list[Any]]:
    """`clicks` and `users` as a live system writes them: Forget records follow their nulls."""
    clicks: list[Any] = []
    users: list[Any] = []
    unsent: list[Any] = []
    ms = T
    kinds = ("click",) * 4 + ("stray", "null", "profile", "replayed", "forget", "again", "merge")
    for _ in range(draw(st.integers(1, 25))):
        kind, user = draw(st.sampled_from(kinds)), draw(st.sampled_from((ANA, ANA, BO)))
        ms += draw(st.sampled_from((0, 1, 100, 400, DAY_MS // 2)))
        at_ms = ms + draw(st.sampled_from((-1_000, -200, -1, 0, 1, 200, 300)))
        earlier = ms - draw(st.sampled_from((0, 1, 200, 600)))
        if kind == "null":
            users.append(null(len(users), ms, user))
            unsent.append(users[-1])
        elif kind == "profile":
            users.append(profile(len(users), ms, user))
        elif kind == "replayed":
            users.append(profile(len(users), ms, user, earlier))
        elif kind == "forget" and unsent:
            clicks.append(forget(len(clicks), unsent.pop(0), ms))
        elif kind == "again" and any(record.value is None for record in users):
            nulls = [record for record in users if record.value is None]
            clicks.append(forget(len(clicks), draw(st.sampled_from(nulls)), ms))
        elif kind == "merge":
            value = events.encode(Merge(user_id=BO, merge_into=ANA, at_ms=min(at_ms, ms)))
            clicks.append(rec(CLICKS, len(clicks), value, BO, ms))
        else:
            origin_ms = earlier if kind == "stray" else None
            clicks.append(click(len(clicks), at_ms, ms, user, origin_ms))
    clicks += [forget(len(clicks) + n, one, ms) for n, one in enumerate(unsent)]
    return clicks, users


def chunks(draw: Any, records: Sequence[Any]) -> Iterator[Sequence[Any]]:
    at = 0
    while at < len(records):
        size = draw(st.integers(1, 6))
        yield records[at : at + size]
        at += size


@hypothesis_settings(max_examples=100, deadline=None)
@given(logs(), st.data())
def test_topics_in_any_order_and_any_batches_give_one_state(
    both: tuple[list[Any], list[Any]], data: st.DataObject
) -> None:
    """Profiles take part in micro-steps, so they are compared, and steps without profiles."""
    clicks, users = both
    states = []
    for order in ("clicks", "users", "any", "restored"):
        rig = Rig()
        queues = [list(chunks(data.draw, clicks)), list(chunks(data.draw, users))]
        copy, applied = rig.store.snapshot(), 0
        while any(queues):
            first = {"clicks": 0, "users": 1}.get(order, data.draw(st.integers(0, 1)))
            queue = queues[first] or queues[1 - first]
            rig.apply(*queue.pop(0))
            applied += 1
            if order == "restored" and applied == 3:
                copy = rig.store.snapshot()
        if order == "restored":  # an older copy of Redis, read on by another process
            store = MemoryStore()
            store.restore(copy)
            rig = Rig(store)
            for handler, records in ((rig.users, users), (rig.clicks, clicks)):
                done = handler.fences.lowest(P)
                for part in chunks(data.draw, [r for r in records if r.offset > done]):
                    ingest(handler, P, part)
        states.append(_without_profile_steps(rig.state()))
    assert all(state == states[0] for state in states[1:])


def _without_profile_steps(state: Any) -> Any:
    read, *rest = state
    embeddings = {
        name: {
            user: (steps, [step.split(b"b'")[0] for step in vector.split(b";")])
            for user, (steps, vector) in users.items()
        }
        for name, users in read.embeddings.items()
    }
    histories = {u: msgspec.structs.replace(h, read_us=0) for u, h in read.histories.items()}
    return histories, embeddings, read.profiles, read.erasures, read.profile_places, rest


def test_a_clock_that_was_ahead_does_not_save_a_click() -> None:
    """Clicks are read first, as a small topic and a long one race."""
    rig, gone = Rig(), null(0, T)
    rig.apply(gone)
    rig.apply(click(0, T + 250, T - 50), click(1, T, T - 1), forget(2, gone))
    assert rig.items() == []
    assert rig.state()[0].embeddings == {"1": {}, "2": {}}


def test_what_old_clicks_taught_goes_though_newer_ones_pushed_them_out() -> None:
    rig, gone = Rig(), null(0, T)
    later = T + 1_000
    rig.apply(*(click(n, T - 10 + n, T - 1) for n in range(4)))
    rig.apply(*(click(n, later + n, later + n) for n in range(4, 8)))
    rig.apply(forget(8, gone, later + 9), click(9, later + 10, later + 10))
    assert rig.items() == ["i9", "i7", "i6"]
    steps, vector = rig.state()[0].embeddings["1"][ANA]
    assert (steps, vector.count(b";")) == (1, 1)


@pytest.mark.parametrize("order", [("clicks", "users"), ("users", "clicks")])
def test_embeddings_of_generations_that_this_process_never_heard_of_go(
    order: tuple[str, str],
) -> None:
    before = Rig(generations=("2",))
    before.apply(click(0, T - 5, T - 5), click(1, T - 4, T - 4, BO))
    rig, gone = Rig(before.store), null(0, T)
    parts = {"clicks": (click(2, T + 1, T + 1), forget(3, gone, T + 2)), "users": (gone,)}
    for name in order:
        rig.apply(*parts[name])
    embeddings = rig.state()[0].embeddings
    assert ANA not in embeddings["1"] and list(embeddings["2"]) == [BO]


@pytest.mark.parametrize(
    ("late", "kept"),
    [
        (click(3, T, T + 500), False),
        (click(3, T + 1, T + 500), True),
        (click(3, T + 9, T + 500, origin_ms=T), False),
        (click(3, T + 9, T + 500, origin_ms=T + 1), True),
        (click(3, T, T + DAY_MS), False),
        (click(3, T, T + DAY_MS + 1), True),
    ],
)
def test_what_happened_before_and_arrives_later_is_dropped(late: Any, kept: bool) -> None:
    rig, gone = Rig(), null(0, T)
    rig.apply(click(0, T - 5, T - 5), forget(1, gone), click(2, T + 2, T + 100))
    outcome = rig.apply(late)
    assert (late.offset in [int(item[1:]) for item in rig.items()]) == kept
    assert (outcome.applied, outcome.forgotten) == ((1, 0) if kept else (0, 1))


def test_a_repeated_forget_leaves_the_user_who_returned() -> None:
    rig, gone = Rig(), null(0, T)
    rig.apply(click(0, T - 5, T - 5), forget(1, gone), click(2, T + 2, T + 2))
    rig.apply(forget(3, gone, T + 3))
    assert rig.items() == ["i2"]
    rig.apply(forget(4, null(1, T + 10), T + 10))
    assert rig.items() == []


def test_a_merge_moves_nothing_from_before_and_the_new_user_may_merge() -> None:
    rig, gone = Rig(), null(0, T)

    def merge(offset: int, at_ms: int) -> Any:
        value = events.encode(Merge(user_id=ANA, merge_into=BO, at_ms=at_ms))
        return rec(CLICKS, offset, value, ANA, T + 50)

    rig.apply(click(0, T - 5, T - 5), forget(1, gone), click(2, T + 2, T + 2), merge(3, T))
    assert (rig.items(), rig.out.forwarded) == (["i2"], [])
    rig.apply(merge(4, T + 5))
    assert (rig.items(), [c.item_id for c in rig.out.forwarded]) == ([], ["i2"])


def test_a_copy_from_before_compaction_brings_no_profile_back() -> None:
    """The null record is gone from `users`; its Forget is still in `clicks`."""
    rig = Rig()
    rig.apply(profile(3, T - 9), profile(4, T - 9, BO))
    gone = null(7, T)
    rig.apply(forget(0, gone))
    assert rig.state()[0].profiles == {BO: {"n": 4}}
    rig.apply(profile(8, T + 5, ANA, T - 9))  # a dead letter from before, replayed
    assert rig.state()[0].profiles == {BO: {"n": 4}}
    rig.apply(profile(9, T + 6))
    assert rig.state()[0].profiles == {ANA: {"n": 9}, BO: {"n": 4}}


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("users_first", [True, False])
def test_a_replayed_profile_from_before_leaves_that_of_the_user_who_returned(
    batches: int, users_first: bool
) -> None:
    rig, gone = Rig(), null(3, T)
    records = profile(4, T + 5), profile(5, T + 9, origin_ms=T - 9)
    parts = [records] if batches == 1 else [(record,) for record in records]
    if not users_first:
        rig.apply(forget(0, gone))
    for part in parts:
        rig.apply(*part)
    if users_first:
        rig.apply(forget(0, gone))
    assert rig.state()[0].profiles == {ANA: {"n": 4}}


def test_a_profile_of_the_user_who_returned_stays() -> None:
    rig, gone = Rig(), null(3, T)
    rig.apply(gone, profile(4, T))
    rig.apply(forget(0, gone, T + 5))
    assert rig.state()[0].profiles == {ANA: {"n": 4}}


def test_a_forget_of_an_older_version_is_read_as_it_was() -> None:
    value = b'{"user_id":"ana","forget_until_ms":%d}' % T
    old = events.decode_user_event(value, appended_ms=T, far_future_ms_max=0, id_form="nfc")
    assert isinstance(old, Forget)
    assert old.bound_ms == T
    assert Erasure.of(old) == Erasure(T, -1, T + OLD_KEPT_MS)
    rig = Rig()
    rig.apply(click(0, T, T), click(1, T + 1, T), rec(CLICKS, 2, value, ANA, T))
    assert rig.items() == ["i1"]
