"""The handlers and the second model read the same logs: state and sent records are equal.

An example is a list of actions: what producers send, what ingest applies in which order and size,
and what fails. HYPOTHESIS_PROFILE=explore looks on for longer.
"""

from __future__ import annotations

import json
import os
from typing import Any

import msgspec
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from eddyline.settings.loader import Settings
from tests.decayed_events import NO_DECAY
from tests.model import reading
from tests.model.rig import TOPICS, Rig
from tests.model.towers import REFUSED_TITLE

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "explore"
EXAMPLES = 5_000 if DEEP else 120
# Two of each partition.
USERS = ["u0", "u1", "u5", "u11"]
SETTINGS = Settings(
    clicks_partitions=2,
    items_partitions=2,
    chunk_records_max=8,
    history_length_max=5,
    history_age_s_max=40,
    lateness_s_max=60,
    dedupe_window_events=20,
    popular_buckets=3,
    popular_bucket_s=60,
    dwell_ms_full=1_000,
    path_state="all",
    seen_items_max=4,
    co_visit_items=3,
    co_visit_row_max=14,  # no row has more than six others: none is pruned
    popular_fast_half_life_events=NO_DECAY,
)

user, item = st.sampled_from(USERS), st.sampled_from([f"i{n}" for n in range(7)])
partition = st.integers(0, 1)
click = st.tuples(
    st.just("click"),
    user,
    item,
    st.sampled_from(["click", "view", "like", "dislike"]),
    st.sampled_from([0, 0, 0, 5_000, 45_000, 90_000, 300_000, -20_000]),  # how long ago it was
    st.sampled_from([None, "own", "own", "own", "again"]),
    st.sampled_from([False, False, False, False, True]),  # in a wrong partition
    st.sampled_from([None, None, {"dwell_ms": 250}, {"page": "home"}]),
)
KEPT_APART = [
    click,
    click,
    st.tuples(st.just("turn"), st.sampled_from(TOPICS), partition, st.integers(1, 8)),
    st.tuples(st.just("turn"), st.just("clicks"), partition, st.integers(1, 8)),
    st.tuples(st.just("item"), item, st.sampled_from(["new", "gone", "delete"])),
    st.tuples(st.just("profile"), user),
    st.tuples(st.just("bad"), st.sampled_from(TOPICS), partition, st.integers(0, 4)),
    st.tuples(st.just("pass"), st.integers(1, 30_000)),
    st.tuples(st.just("gap"), partition, st.integers(1, 6)),
    st.tuples(st.just("crash")),
    st.tuples(st.just("save")),
    st.tuples(st.just("restore")),
    st.tuples(st.just("retain"), partition),
    st.tuples(st.just("away")),
]
BASIC = [*KEPT_APART, st.tuples(st.just("merge"), user, user)]
FULL = st.tuples(st.just("full"))
BOTH = st.tuples(st.just("both"), st.integers(1, 8), st.integers(1, 8))
FORGET = st.tuples(st.just("forget"), user)
REFUSED = st.tuples(st.just("item"), item, st.sampled_from(["new", "delete", "refused"]))
BAD = (b"{", b"[]", b'{"user_id": "", "item_id": "i1", "at_ms": 1}', b'{"at_ms": 1.5}', b"\xff")


def act(rig: Rig, action: tuple[Any, ...], sent: list[tuple[int, bytes, bytes]]) -> None:
    """Do one action. sent: every click of a producer, for re-sends."""
    name, *more = action
    if name == "click":
        _click(rig, more, sent)
    elif name == "item":
        item_id, change = more
        doc: dict[str, Any] = {
            "item_id": item_id,
            "title": REFUSED_TITLE if change == "refused" else "t",
        }
        if change.startswith("bare"):
            del doc["title"]
        if change in ("full", "bare"):
            doc["categories"] = ["c"]
        doc["available"] = change not in ("gone", "bare, gone")
        value = None if change == "delete" else json.dumps(doc).encode()
        rig.append("items", reading.partition(item_id, 2), item_id.encode(), value)
    elif name in ("profile", "forget"):
        doc = {"user_id": more[0], "attributes": {"n": rig.now_ms}}
        value = None if name == "forget" else json.dumps(doc).encode()
        rig.append("users", reading.partition(more[0], 2), more[0].encode(), value)
    elif name == "astray":
        topic, number, deletes = more
        doc = {"title": f"{rig.now_ms}", "attributes": {"n": rig.now_ms}}
        key = USERS[number % 4] if topic == "users" else f"i{number}"
        doc |= {"user_id" if topic == "users" else "item_id": key}
        value = None if deletes else json.dumps(doc).encode()
        rig.append(topic, 1 - reading.partition(key, 2), key.encode(), value)
    elif name == "labels":
        doc = {"item_id": more[0], "title": "t", "categories": [" c", "e\u0301", "\u2003"]}
        doc["attributes"] = {"e\u0301": rig.now_ms, "\u00e9 ": "x", " ": 1}
        rig.append(
            "items", reading.partition(more[0], 2), more[0].encode(), json.dumps(doc).encode()
        )
    elif name == "merge":
        doc = {"user_id": more[0], "merge_into": more[1], "at_ms": rig.now_ms}
        place = reading.partition(more[0], 2)
        rig.append("clicks", place, more[0].encode(), json.dumps(doc).encode())
    elif name == "patch":
        item_id, astray, fields = more
        place = reading.partition(item_id, 2)
        value = json.dumps({"item_id": item_id, **fields}).encode()
        rig.append("items", 1 - place if astray else place, item_id.encode(), value)
    elif name == "bad item":
        place = reading.partition(more[0], 2)
        rig.append("items", 1 - place if more[1] else place, more[0].encode(), BAD[more[2]])
    elif name == "bad":
        rig.append(more[0], more[1], None if more[2] % 2 else b"u1", BAD[more[2]])
    elif name == "gap":
        rig.ends["clicks", more[0]] += more[1]
    elif name == "pass":
        rig.now_ms += more[0]
    elif name == "turn":
        rig.turn(more[0], {more[1]: more[2]})
    elif name == "both":
        rig.turn("clicks", {0: more[0], 1: more[1]})
    elif name == "full_at":
        rig.full_at = more[0]
    elif name in ("full", "away"):
        setattr(rig, name, 1)
    elif name == "crash":
        rig.start()
    elif name == "settings":
        rig.restart(**more[0])
    elif name == "retrain":
        if len(rig.towers) == 1:
            rig.retrain(["i1", "i3", "i5", "i6"])
    else:
        getattr(rig, name)(*more)


def _click(rig: Rig, more: list[Any], sent: list[tuple[int, bytes, bytes]]) -> None:
    who, what, kind, ago_ms, identity, astray, context = more
    if identity == "again" and sent:
        place, key, value = sent[len(sent) // 2]
    else:
        doc = {"user_id": who, "item_id": what, "at_ms": rig.now_ms - ago_ms, "kind": kind}
        if identity:
            doc["event_id"] = f"e{len(sent)}"
        if context:
            doc["context"] = context
        place, key = reading.partition(who, 2), who.encode()
        place, value = (1 - place if astray else place), json.dumps(doc).encode()
        sent.append((place, key, value))
    rig.append("clicks", place, key, value, (("produced_us", b"77"),))


def run(actions: list[tuple[Any, ...]], **changed: Any) -> None:
    rig = Rig(msgspec.structs.replace(SETTINGS, **changed))
    sent: list[tuple[int, bytes, bytes]] = []
    for action in actions:
        act(rig, action, sent)
    rig.drain()
    assert rig.differences() == []


def lists_of(*actions: Any) -> Any:
    """Lists of 10 to 60 of these actions."""
    return st.lists(st.one_of(*actions), min_size=10, max_size=60)


def actions_of(*more: Any) -> Any:
    return lists_of(*BASIC, *more)


def clicked(who: str, what: str, ago_ms: int = 0, astray: bool = False) -> tuple[Any, ...]:
    """A plain click."""
    return ("click", who, what, "click", ago_ms, "own", astray, None)


# The send of the second batch fails, and the process ends.
LOST_SEND = [
    ("turn", "clicks", 0, 8),
    *(clicked(u, "i1", astray=True) for u in USERS),
    ("full_at", 3),
    ("both", 8, 8),
    ("crash",),
]
FORGOTTEN = [
    *(clicked("u0", f"i{n}", 2_000) for n in range(4)),
    ("turn", "clicks", 0, 8),
    ("turn", "clicks", 1, 8),
    ("forget", "u0"),
    ("turn", "users", 0, 8),
    ("turn", "users", 1, 8),
    ("pass", 5_000),
    clicked("u0", "i1", 9_000),
]
RETRAINED = [
    *(clicked("u0", "i1") for _ in range(4)),
    ("turn", "clicks", 0, 8),
    ("retrain",),
    clicked("u0", "i3"),
]

limits = settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=(Phase.explicit, Phase.generate, *((Phase.reuse, Phase.shrink) if DEEP else ())),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@limits
@given(actions_of(FULL), st.sampled_from([1, 3]))
def test_state_and_sent_records_are_the_models(actions: list[Any], slots: int) -> None:
    run(actions, item_slots=slots)


@limits
@given(actions_of(BOTH))
def test_batches_of_two_partitions_are_the_models(actions: list[Any]) -> None:
    run(actions)


@limits
@example(LOST_SEND)
@given(actions_of(BOTH, FULL))
def test_two_partitions_and_a_full_buffer_are_the_models(actions: list[Any]) -> None:
    run(actions)


@limits
@example([("item", "i3", "new"), ("item", "i3", "delete"), ("item", "i3", "refused")])
@given(actions_of(REFUSED))
def test_items_that_the_tower_refuses_are_the_models(actions: list[Any]) -> None:
    run(actions)


@limits
@example(FORGOTTEN)
@given(actions_of(FORGET))
def test_forgotten_users_who_click_again_are_the_models(actions: list[Any]) -> None:
    run(actions)


ASTRAY = st.tuples(
    st.just("astray"), st.sampled_from(["items", "users"]), st.integers(0, 6), st.booleans()
)
# An older change arrives behind a newer one, and a forgotten user's profile behind the null record.
OVERTAKEN = [
    ("astray", "items", 3, False),
    ("pass", 1_000),
    ("item", "i3", "delete"),
    *(("turn", "items", reading.partition("i3", 2), 8), ("turn", "items", 0, 8), ("crash",)),
    ("turn", "items", 1, 8),
]
OUTLIVED = [
    ("astray", "users", 0, False),
    ("pass", 1_000),
    ("profile", "u0"),
    ("forget", "u0"),
    *(("turn", "users", p, 8) for p in (0, 1, 0, 1)),
    ("turn", "clicks", reading.partition("u0", 2), 8),
]
TURNS = st.tuples(
    st.just("turn"), st.sampled_from(["items", "users"]), partition, st.integers(1, 8)
)


@limits
@example(OVERTAKEN, 1)
@example(OUTLIVED, 1)
@given(lists_of(*KEPT_APART, ASTRAY, ASTRAY, ASTRAY, TURNS, FORGET, FULL), st.sampled_from([1, 3]))
def test_items_and_users_in_a_wrong_partition_are_the_models(
    actions: list[Any], slots: int
) -> None:
    run(actions, item_slots=slots)


@limits
@given(actions_of(ASTRAY, REFUSED, TURNS, st.tuples(st.just("retrain"))))
def test_strays_that_the_tower_refuses_are_the_models(actions: list[Any]) -> None:
    run(actions)


BAD_ITEM = st.tuples(
    st.just("bad item"), item, st.sampled_from([False, False, True]), st.integers(0, 4)
)
PARTS = st.tuples(
    st.just("item"), item, st.sampled_from(["new", "full", "bare", "bare, gone", "delete"])
)
# The refused record of another partition comes after a newer accepted one.
REFUSED_EARLIER = [
    ("item", "i3", "new"),
    ("bad item", "i3", True, 0),
    ("pass", 1_000),
    ("item", "i3", "new"),
    *(("turn", "items", p, 8) for p in (0, 1, 0, 1)),
    ("bad item", "i3", False, 1),
]


@limits
@example(REFUSED_EARLIER, 1)
@given(
    lists_of(*KEPT_APART, ASTRAY, BAD_ITEM, BAD_ITEM, REFUSED, PARTS, PARTS, TURNS, FULL),
    st.sampled_from([1, 3]),
)
def test_refused_records_of_items_are_the_models(actions: list[Any], slots: int) -> None:
    run(actions, item_slots=slots)


def emptied_after_restore(last: str) -> list[tuple[Any, ...]]:
    """Redis goes back before two records that its older state does not refuse."""
    before = [("item", "i1", "full"), ("item", "i1", "new"), ("item", "i1", last)]
    return [*before, ("turn", "items", 0, 1), ("turn", "items", 1, 1), ("restore",)]


@limits
@example(emptied_after_restore("bare"))
@example(emptied_after_restore("bare, gone"))
@given(actions_of(PARTS, PARTS, PARTS, TURNS, st.tuples(st.just("retrain"))))
def test_records_that_would_empty_an_item_are_the_models(actions: list[Any]) -> None:
    run(actions)


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "title": st.sampled_from(["t", "u", "", None, 7, REFUSED_TITLE]),
        "categories": st.sampled_from([["c"], ["c", "d"], [], None, "c"]),
        "tags": st.sampled_from([["x"], None]),
        "available": st.sampled_from([True, False, False, None]),
        "at_ms": st.sampled_from([0, 1_600_000_000_000]),
        "attributes": st.dictionaries(
            st.sampled_from(["price", "year"]), st.sampled_from([1, 2, None, [], "x"])
        ),
    },
)
PATCH = st.tuples(st.just("patch"), item, st.sampled_from([False, False, False, True]), FIELDS)
# Redis goes back between two patches, and the second is read again without the first.
PATCHED_TWICE = [
    ("patch", "i3", False, {"title": "t", "attributes": {"price": 1}}),
    ("turn", "items", 0, 1),
    ("turn", "items", 1, 1),
    ("save",),
    ("patch", "i3", False, {"attributes": {"year": 2}}),
    ("patch", "i3", False, {"title": REFUSED_TITLE, "attributes": {"price": 2}}),
    ("patch", "i3", False, {"attributes": {"price": None}, "categories": ["c"]}),
    ("turn", "items", 0, 8),
    ("turn", "items", 1, 8),
    ("restore",),
    ("retrain",),
]


@limits
@example(PATCHED_TWICE, 1)
@given(
    lists_of(
        *KEPT_APART,
        PATCH,
        PATCH,
        PATCH,
        BAD_ITEM,
        REFUSED,
        TURNS,
        TURNS,
        FULL,
        st.tuples(st.just("retrain")),
    ),
    st.sampled_from([1, 3]),
)
def test_patches_of_items_are_the_models(actions: list[Any], slots: int) -> None:
    run(actions, item_slots=slots, items_patches=True)


# Spellings of three users and two items, and one of each that has no other.
SPELLED_USERS = [
    "u0",
    " u0",
    "u0\u2003",
    "\u00fc",
    "u\u0308",
    "u\u0308 ",
    "\u00e91",
    "e\u03011",
    "u1",
]
SPELLED_ITEMS = ["i1", "i1 ", "\u00e9", "e\u0301", "i2"]
spelled, spelled_item = st.sampled_from(SPELLED_USERS), st.sampled_from(SPELLED_ITEMS)
SPELLED_CLICK = st.tuples(
    st.just("click"),
    spelled,
    spelled_item,
    st.sampled_from(["click", "view", "dislike"]),
    st.sampled_from([0, 0, 5_000, 45_000]),
    st.sampled_from([None, "own", "own", "again"]),
    st.sampled_from([False, False, False, True]),
    st.none(),
)
SPELLED = [
    SPELLED_CLICK,
    SPELLED_CLICK,
    SPELLED_CLICK,
    st.tuples(st.just("profile"), spelled),
    st.tuples(st.just("forget"), spelled),
    st.tuples(st.just("item"), spelled_item, st.sampled_from(["new", "full", "gone", "delete"])),
    st.tuples(st.just("item"), spelled_item, st.sampled_from(["new", "refused", "bare"])),
    st.tuples(st.just("bad item"), spelled_item, st.booleans(), st.integers(0, 4)),
    st.tuples(st.just("labels"), spelled_item),
    *KEPT_APART[2:],
    TURNS,
    TURNS,
]
# A user in two spellings, forgotten under the third; an item likewise, deleted under the other.
ONE_USER = [
    clicked("\u00fc", "i1", 2_000),
    clicked("u\u0308", "i1 ", 2_000),
    ("profile", "u\u0308 "),
    ("item", "e\u0301", "new"),
    *(("turn", topic, p, 8) for _ in range(2) for topic in TOPICS for p in (0, 1)),
    ("pass", 1_000),
    ("forget", "u\u0308 "),
    ("item", "\u00e9", "delete"),
    *(("turn", topic, p, 8) for _ in range(2) for topic in TOPICS for p in (0, 1)),
]


@limits
@example(ONE_USER, 1, "nfc")
@example(ONE_USER, 1, "as_is")
@given(lists_of(*SPELLED), st.sampled_from([1, 3]), st.sampled_from(["nfc", "nfc", "as_is"]))
def test_spellings_of_an_id_are_the_models(actions: list[Any], slots: int, form: str) -> None:
    run(actions, item_slots=slots, id_form=form)


@limits
@given(
    lists_of(*SPELLED, st.tuples(st.just("merge"), spelled, spelled), st.just(("retrain",)), FULL)
)
def test_merges_of_spelled_users_are_the_models(actions: list[Any]) -> None:
    run([action for action in actions if action[0] != "forget"])


TIGHTER = [
    {"co_visit_items": 1},
    {"history_length_max": 3},
    {"history_age_s_max": 20},
    {"popular_buckets": 2},
]


@limits
@given(actions_of(st.tuples(st.just("settings"), st.sampled_from(TIGHTER))))
def test_tighter_limits_after_a_restart_are_the_models(actions: list[Any]) -> None:
    run(actions)


def test_fewer_buckets_hold_from_the_next_count_on() -> None:
    old = ("click", "u0", "i4", "click", 0, "own", False, None)
    new = ("click", "u1", "i4", "click", 90_000, "own", False, None)
    for actions, kept in (([], 2), ([new], 1)):
        rig, sent = Rig(SETTINGS), list[tuple[int, bytes, bytes]]()
        for action in (old, new, ("settings", {"popular_buckets": 2}), *actions):
            act(rig, action, sent)
        rig.drain()
        assert rig.differences() == []
        assert [len(buckets) for buckets in rig.store.snapshot().buckets.values()] == [kept]


SERVE = st.tuples(st.just("serve"), st.sampled_from([["1"], ["2"], ["1", "2"]]))
# Processes of different generations take turns, and Redis goes back.
SWITCHED = [
    *RETRAINED,
    ("turn", "clicks", 1, 8),
    ("serve", ["1"]),
    ("save",),
    *(clicked("u0", "i3") for _ in range(3)),
    ("turn", "clicks", 1, 8),
    ("serve", ["2"]),
    *(clicked("u0", "i5") for _ in range(3)),
    ("turn", "clicks", 1, 8),
    ("restore",),
    ("serve", ["1", "2"]),
    clicked("u0", "i1"),
]


@limits
@example(RETRAINED)
@given(actions_of(st.tuples(st.just("retrain"))))
def test_a_second_generation_is_the_models(actions: list[Any]) -> None:
    run(actions)


@limits
@example(SWITCHED)
@given(actions_of(st.tuples(st.just("retrain")), SERVE))
def test_generations_that_come_and_go_are_the_models(actions: list[Any]) -> None:
    run(actions)


# The embedding of a generation that the process has not loaded goes too, whether its range is
# closed or Redis is an older copy from before it began.
FORGOTTEN_IN_BOTH = [
    *SWITCHED,
    ("turn", "clicks", 0, 8),
    ("serve", ["2"]),
    clicked("u0", "i3"),
    ("turn", "clicks", 0, 8),
    ("forget", "u0"),
    ("serve", ["1"]),
]


@limits
@example(FORGOTTEN_IN_BOTH)
@given(lists_of(*KEPT_APART, st.just(("retrain",)), SERVE, FORGET))
def test_forgetting_takes_the_embeddings_of_generations_that_come_and_go(
    actions: list[Any],
) -> None:
    run(actions)


REMOVE_IDLE, LATER = st.just(("remove_idle",)), st.tuples(st.just("pass"), st.integers(1, 30_000))
IDLE_SETTINGS = st.tuples(
    st.just("settings"), st.sampled_from([{"user_idle_s_max": n} for n in (0, 5, 30)])
)


def back_after(seconds: int, *before: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """A user with history and embedding comes back."""
    return [
        *(clicked("u0", "i1") for _ in range(4)),
        ("both", 8, 8),
        ("pass", 1_000 * seconds),
        *before,
        *(clicked("u0", "i3") for _ in range(3)),
        ("both", 8, 8),
    ]


@limits
@example(back_after(15))
@example(back_after(16))
@example(back_after(16, clicked("u1", "i1"), clicked("u5", "i1"), ("both", 8, 8), ("remove_idle",)))
@example(back_after(16, ("merge", "u0", "u1")))
@example(back_after(16, ("forget", "u0"), ("turn", "users", 0, 8), ("turn", "users", 1, 8)))
@given(actions_of(BOTH, FORGET, REMOVE_IDLE, LATER, st.just(("retrain",)), SERVE))
def test_users_who_come_back_after_the_bound_are_the_models(actions: list[Any]) -> None:
    run(actions, user_idle_s_max=15)


@limits
@example(back_after(16, ("settings", {"user_idle_s_max": 30}), ("remove_idle",)))
@given(actions_of(BOTH, REMOVE_IDLE, LATER, IDLE_SETTINGS))
def test_a_new_bound_counts_from_a_users_next_event_on(actions: list[Any]) -> None:
    run(actions, user_idle_s_max=15)


REMOVE_DELETED = st.just(("remove_deleted",))
BOTH_ITEMS = [("turn", "items", p, 8) for p in (0, 1, 0, 1)]


def back_from_the_dead(seconds: int, *before: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """An older change is read so long after the item was deleted."""
    return [
        ("item", "i3", "new"),
        ("astray", "items", 3, False),
        ("pass", 1_000),
        ("item", "i3", "delete"),
        ("turn", "items", reading.partition("i3", 2), 8),
        ("pass", 1_000 * seconds),
        *before,
        *BOTH_ITEMS,
        ("retrain",),
    ]


KEPT_SETTINGS = st.tuples(
    st.just("settings"), st.sampled_from([{"deleted_items_kept_s": n} for n in (0, 5, 30)])
)


@limits
@example(back_from_the_dead(15), 1)
@example(back_from_the_dead(16), 1)
@example(
    back_from_the_dead(
        16,
        *(("item", f"i{n}", "new") for n in (1, 2, 4, 5)),
        *BOTH_ITEMS,
        ("remove_deleted",),
        ("astray", "items", 3, True),
    ),
    3,
)
@given(
    lists_of(
        *KEPT_APART,
        ASTRAY,
        ASTRAY,
        BAD_ITEM,
        REFUSED,
        REFUSED,
        TURNS,
        TURNS,
        LATER,
        REMOVE_DELETED,
        KEPT_SETTINGS,
        st.just(("retrain",)),
    ),
    st.sampled_from([1, 3]),
)
def test_changes_of_deleted_items_that_have_ended_are_the_models(
    actions: list[Any], slots: int
) -> None:
    run(actions, item_slots=slots, deleted_items_kept_s=15)


# A generation that is trained later reads patches of an item whose delete has ended.
PATCHES_OF_AN_ENDED_ITEM = [
    ("patch", "i3", False, {"title": "t", "attributes": {"price": 1}}),
    *BOTH_ITEMS,
    ("patch", "i3", False, {"attributes": {"year": 2}}),
    *BOTH_ITEMS,
    ("item", "i3", "delete"),
    ("pass", 16_000),
    *(("patch", f"i{n}", False, {"title": "u"}) for n in (1, 2, 4, 5)),
    *BOTH_ITEMS,
    ("remove_deleted",),
    ("retrain",),
    *(("turn", "items", p, 1) for p in (0, 1, 0, 1)),
]


@limits
@example(PATCHES_OF_AN_ENDED_ITEM)
@given(
    actions_of(
        PATCH,
        PATCH,
        PATCH,
        BAD_ITEM,
        REFUSED,
        TURNS,
        TURNS,
        LATER,
        REMOVE_DELETED,
        st.just(("retrain",)),
    )
)
def test_patches_of_deleted_items_that_have_ended_are_the_models(actions: list[Any]) -> None:
    run(actions, items_patches=True, deleted_items_kept_s=15)


# The first generation ends; Redis goes back to a copy that still has its embeddings.
ENDED = [
    *RETRAINED,
    ("both", 8, 8),
    ("save",),
    ("serve", ["2"]),
    clicked("u0", "i3"),
    ("both", 8, 8),
    ("end_generation",),
    clicked("u0", "i5"),
    ("both", 8, 8),
    ("restore",),
    ("serve", ["1", "2"]),
    clicked("u0", "i1"),
]


@limits
@example(ENDED)
@given(
    actions_of(
        BOTH, FORGET, REMOVE_IDLE, LATER, st.just(("retrain",)), SERVE, st.just(("end_generation",))
    )
)
def test_a_generation_that_ends_leaves_no_embedding(actions: list[Any]) -> None:
    run(actions, user_idle_s_max=60)


def test_a_state_that_was_appended_again_reaches_a_generation_that_is_served_later() -> None:
    """The first reading stored its place: the second one must not take it for a newer change."""
    again = ("settings", {"history_age_s_max": 20})
    first = [("item", "i6", "new"), ("retrain",), again, ("serve", ["1"])]
    run([*first, ("item", "i6", "refused"), again, ("serve", ["1", "2"])], item_slots=3)


HIDE = st.tuples(
    st.just("settings"), st.sampled_from([{"hide_refused_items": hide} for hide in (True, False)])
)
# The setting changes, and a generation that is served later reads the refused record again.
HIDDEN = [
    ("item", "i3", "new"),
    ("bad item", "i3", False, 0),
    ("settings", {"hide_refused_items": False}),
    ("retrain",),
]
SHOWN = [("settings", {"hide_refused_items": False}), *HIDDEN[:2]]
SHOWN += [("settings", {"hide_refused_items": True}), ("retrain",)]


@limits
@example(HIDDEN, False)
@example(SHOWN, False)
@example([("item", "i3", "new"), ("item", "i3", "refused")], True)
@given(
    lists_of(
        *KEPT_APART,
        ASTRAY,
        BAD_ITEM,
        BAD_ITEM,
        REFUSED,
        PARTS,
        PARTS,
        TURNS,
        TURNS,
        FULL,
        HIDE,
        SERVE,
        st.just(("retrain",)),
    ),
    st.booleans(),
)
def test_hidden_items_are_hidden_in_every_generation(actions: list[Any], patches: bool) -> None:
    run(actions, hide_refused_items=True, items_patches=patches, item_slots=3)
