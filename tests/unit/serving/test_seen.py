"""Seen items: which are hidden, for how long, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from eddyline.errors import SettingsError
from eddyline.schema import seen_items
from eddyline.schema.events import KINDS
from eddyline.schema.item_key import item_key
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.settings.loader import Settings
from eddyline.settings.worker import seen_kinds_of
from eddyline.stores.state_store import UserState
from serving.answer.deadline import Deadline
from serving.answer.retriever import Query
from serving.answer.seen import SeenPolicy
from tests.unit.serving.test_co_visit_paths import retriever_of, visited
from tests.unit.serving.test_retriever import World

DAY_MS = 86_400_000
NOW = 1_700_000_000_000 // 60_000 * 60_000
VIEW, LIKE, PURCHASE, DISLIKE = map(KINDS.index, ("view", "like", "purchase", "dislike"))


@pytest.fixture
def world() -> World:
    return World()


def user(listed: list[Entry], beyond: Sequence[Entry] = ()) -> UserState:
    history = UserHistory(entries=tuple(listed))
    return UserState(None, history, 0, None, {}, seen_items.stored(beyond))


def ago(item: str, days: float, kind: int = 0) -> Entry:
    return Entry(item, NOW - round(days * DAY_MS), kind)


def hidden(world: World, state: UserState, now_ms: int = NOW, **settings: Any) -> set[str]:
    return SeenPolicy(Settings(**settings)).hidden(state, world.index, now_ms).ids


def test_items_beyond_the_list_are_hidden_as_those_in_it(world: World) -> None:
    state = user([ago("i1", 1)], [ago("i2", 500), ago("i3", 900, PURCHASE), ago("unknown", 1)])
    assert hidden(world, state) == {"i1", "i2", "i3"}
    found = SeenPolicy(Settings()).hidden(state, world.index, NOW)
    assert found.keys is not None
    assert set(found.keys.tolist()) == {item_key(i) for i in ("i1", "i2", "i3", "unknown")}
    assert SeenPolicy(Settings()).hidden(user([ago("i1", 1)]), world.index, NOW).keys is None


def test_a_lower_limit_hides_the_newest(world: World) -> None:
    state = user([], [ago(f"i{n}", n) for n in range(5)])
    assert hidden(world, state, seen_items_max=2) == {"i0", "i1"}
    assert hidden(world, state, seen_items_max=0) == set()


def test_where_seen_items_are_kept_dislikes_alone_are_hidden(world: World) -> None:
    state = user(
        [ago("i1", 1), ago("i2", 1, DISLIKE)], [ago("i3", 9), ago("i4", 9, DISLIKE), ago("i4", 8)]
    )
    assert hidden(world, state, seen_items="keep") == {"i2", "i4"}


@pytest.mark.parametrize("beyond", [False, True])
def test_a_kind_hides_for_its_time(world: World, beyond: bool) -> None:
    had = [ago("i1", 30, VIEW), ago("i2", 30, PURCHASE), ago("i3", 30)]
    state = user([], had) if beyond else user(had)
    policy = {"seen_policy": "view=30d, purchase=never"}
    assert hidden(world, state, NOW - 1, **policy) == {"i1", "i2", "i3"}
    assert hidden(world, state, NOW, **policy) == {"i2", "i3"}
    assert hidden(world, state, NOW + 10**6 * DAY_MS, **policy) == {"i2", "i3"}
    assert hidden(world, state, NOW, seen_items="keep", **policy) == {"i2"}
    # A device's clock that is ahead hides nothing of a kind that is not hidden.
    assert hidden(world, state, NOW - 60 * DAY_MS, seen_policy="view=0,click=0") == {"i2"}


def test_of_several_events_on_an_item_the_longest_time_counts(world: World) -> None:
    state = user([ago("i1", 40, VIEW)], [ago("i1", 50, PURCHASE), ago("i2", 45, VIEW)])
    policy = {"seen_policy": "view=30d,purchase=60d"}
    assert hidden(world, state, **policy) == {"i1"}
    why = SeenPolicy(Settings(**policy)).why
    assert why(state, "i1", NOW) == "seen: bought 50 days ago, it comes back in 10 days"
    assert why(state, "i2", NOW) == why(state, "i9", NOW) == ""


@pytest.mark.parametrize(
    ("kind", "done"),
    [
        ("click", "clicked"),
        ("view", "viewed"),
        ("like", "liked"),
        ("cart", "put into the cart"),
        ("purchase", "bought"),
        ("dislike", "disliked"),
    ],
)
def test_the_reason_says_what_the_user_did_and_when(kind: str, done: str) -> None:
    number = KINDS.index(kind)
    policy = SeenPolicy(Settings())
    for state in (user([ago("a", 3, number)]), user([], [ago("a", 3, number)])):
        assert policy.why(state, "a", NOW) == f"seen: {done} 3 days ago, it does not come back"
    assert policy.why(user([ago("a", -1)]), "a", NOW).startswith("seen: clicked 0 seconds ago")


def test_no_path_returns_what_is_beyond_the_list(world: World) -> None:
    world.user("ana", "i0", "i1")
    visited(world, {"i0": {"i7": [1], "i2": [1]}, "i1": {"i9": [1], "i3": [1]}})
    read = world.store.read_user
    beyond = seen_items.stored([Entry(f"i{n}", 5, PURCHASE) for n in range(2, 8)])
    world.store.read_user = lambda *args: replace(read(*args), seen=beyond)  # type: ignore[method-assign]
    paths = "co_visits,co_visits_both,next,towers,popular,newest"
    for fusion in ("cascade", "rrf", "blend"):
        retriever = retriever_of(world, recall_paths=paths, fusion=fusion)
        answer = retriever.retrieve(Query("ana", 12), world.index, Deadline(5.0))
        assert {i.hit.item_id for i in answer.items} == {"i8", "i9", "i10", "i11"}
        ends = "8 of them are in the user's list or beyond it"
        assert answer.short_because.endswith(ends)
        [one], _ = retriever.explain(Query("ana", 3), ["i4"], world.index, Deadline(5.0), 9)
        assert one.why.startswith("seen: bought ") and not one.paths


def test_the_policy_of_the_settings() -> None:
    assert seen_kinds_of("") == seen_kinds_of("  ") == {}
    assert seen_kinds_of("view=90s, click = 45m,like=12h") == {
        "view": 90.0,
        "click": 2_700.0,
        "like": 43_200.0,
    }
    assert seen_kinds_of("dislike=never,cart=0") == {"dislike": math.inf, "cart": 0.0}
    assert seen_kinds_of("view=36500d") == {"view": 3_153_600_000.0}


@pytest.mark.parametrize(
    ("listed", "wrong"),
    [
        ("view", "'view' has no time"),
        ("view=", "'view=' has no time"),
        ("=30d", "'=30d' has no kind of event"),
        ("bought=never", "'bought=never' has no kind of event, which are click, view"),
        ("view=30", "'view=30' has no time as 30d"),
        ("view=-1d", "no time"),
        ("view=0d", "no time"),
        ("view=1.5d", "no time"),
        ("view=36501d", "no time"),
        ("view=9999999999999d", "no time"),
        ("view=1d,view=2d", "'view' is named twice"),
        ("view=1d,", "'' has no kind"),
    ],
)
def test_a_bad_policy_is_named(listed: str, wrong: str) -> None:
    with pytest.raises(SettingsError) as raised:
        seen_kinds_of(listed)
    assert str(raised.value).startswith(f"seen_policy = {listed!r}: ") and wrong in str(
        raised.value
    )
    with pytest.raises(SettingsError, match="seen_policy"):
        SeenPolicy(msgspec.structs.replace(Settings(), seen_policy=listed))
