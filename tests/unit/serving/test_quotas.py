"""Positions for young and fresh items: which, when, how often, and the same for the same answer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from eddyline.schema.item_key import item_key
from eddyline.settings.loader import Settings
from serving.answer.deadline import Deadline
from serving.answer.retriever import Answer, Query, Retriever
from serving.proto import retrieval_pb2 as pb
from serving.rpc.retrieval_service import RetrievalService
from serving.rules.answer_rules import AnswerRules
from serving.rules.editorial import EditorialRules, Known, parse
from serving.rules.quotas import NO_QUOTAS, Draw, Quotas, quotas_of
from tests.unit.serving.answers import fails
from tests.unit.serving.test_coordinator import SETTINGS, Plant, catalogue

N = 120
HOUR_MS = 3_600_000


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture(scope="module")
def plant() -> Iterator[Plant]:
    """Items 0 … 99 have clicks, the last twenty none; every tenth item is of this hour."""
    settings = msgspec.structs.replace(SETTINGS, fusion="rrf", popular_limit=N)
    fresh_ms = now_ms() - 60_000
    records = [
        replace(r, at_ms=fresh_ms if n % 10 == 0 else 1_000 + n) for n, r in enumerate(catalogue(N))
    ]
    made = Plant(3, records, settings=settings)
    made.user("ana", "item-1", "item-2")
    # In thousandths: item n has 40 + n clicks.
    made.clicked({f"item-{n}": 1_000 * (40 + n) for n in range(100)})
    yield made
    made.close()


def retriever(plant: Plant, **settings: object) -> Retriever:
    """As the plant's, with these quotas."""
    made = plant.backend.retriever
    of = msgspec.structs.replace(SETTINGS, fusion="rrf", **{"quota_every": 1} | settings)
    rules = AnswerRules.of(of, made._paths, plant.popularity, plant.rules)
    return Retriever(
        store=plant.store,
        users=plant.users,
        popularity=plant.popularity,
        paths=made._paths,
        item_slots=1,
        rules=rules,
        seen=made._seen,
    )


def ask(of: Retriever, plant: Plant, impression: str, k: int = 10, **more: object) -> Answer:
    query = Query("ana", k, **more)  # type: ignore[arg-type]
    return of.retrieve(query, plant.whole, Deadline(5.0), impression_id=impression)


def number(answer: Answer, place: int) -> int:
    return int(answer.items[place].hit.item_id.removeprefix("item-"))


def quota_places(answer: Answer, kind: str = "young") -> list[int]:
    return [
        place
        for place, one in enumerate(answer.items)
        if any(rule.kind == kind for rule in one.rules)
    ]


def plain(answer: Answer) -> list[str]:
    return [one.hit.item_id for one in answer.items]


@pytest.fixture(autouse=True)
def without_rules(plant: Plant) -> None:
    plant.rules.take(EditorialRules())


def test_one_position_in_ten_has_a_young_item(plant: Plant) -> None:
    young = retriever(plant, quota_young=0.1)
    before = ask(retriever(plant), plant, "x", 30)
    for impression in map(str, range(20)):
        answer = ask(young, plant, impression, 30)
        places = quota_places(answer)
        natural = sum(number(answer, place) >= 100 for place in range(30)) - len(places)
        assert len(places) == max(0, 3 - natural) and set(places) <= {9, 19, 29}
        assert all(number(answer, place) >= 100 for place in places)
        assert len(set(plain(answer))) == 30 and not answer.short_because
        for place in places:
            one = answer.items[place]
            assert (one.path, one.rules[-1].name) == ("young", "quota_young")
        rest = [one for one in plain(answer) if one in set(plain(before))]
        assert rest == [one for one in plain(before) if one in set(rest)]


def test_an_answer_that_has_young_items_anyway_stays_as_it_is(plant: Plant) -> None:
    young = retriever(plant, quota_young=0.1)
    filters = {"filters": None}
    for item in range(100, 104):
        plant.user(f"fan-{item}", f"item-{item}")
    answers = [
        (
            young.retrieve(Query(user, 20), plant.whole, Deadline(5.0), impression_id="a"),
            retriever(plant).retrieve(Query(user, 20), plant.whole, Deadline(5.0)),
        )
        for user in ("fan-100", "fan-101", "fan-102", "fan-103")
    ]
    assert filters
    for with_quota, without in answers:
        natural = sum(int(one.removeprefix("item-")) >= 100 for one in plain(without))
        assert len(quota_places(with_quota)) == max(0, 2 - natural)
        if natural >= 2:
            assert plain(with_quota) == plain(without)


def test_the_same_impression_gives_the_same_answer(plant: Plant) -> None:
    young = retriever(plant, quota_young=0.2, quota_fresh=0.1)
    for impression in ("a", "b"):
        first = ask(young, plant, impression, 20)
        assert plain(ask(young, plant, impression, 20)) == plain(first)
    shown = {tuple(plain(ask(young, plant, str(n), 20))) for n in range(30)}
    assert len(shown) > 10


def test_without_an_impression_or_quotas_nothing_is_drawn(plant: Plant) -> None:
    young, without = retriever(plant, quota_young=0.5), retriever(plant)
    assert plain(ask(young, plant, "")) == plain(ask(without, plant, "x"))
    assert not quota_places(ask(young, plant, "")) and NO_QUOTAS.listed == ()


@pytest.mark.parametrize("every", [1, 3, 10])
def test_one_in_so_many_answers_has_them(plant: Plant, every: int) -> None:
    young = retriever(plant, quota_young=0.2, quota_every=every)
    having = sum(bool(quota_places(ask(young, plant, str(n)))) for n in range(300))
    assert abs(having / 300 - 1 / every) < 0.08


@pytest.mark.parametrize("most", [38, 39, 40, 41, 1_000])
def test_how_many_clicks_a_young_item_may_have(plant: Plant, most: int) -> None:
    """Item 0 has 40 clicks; the last twenty have none."""
    young = retriever(plant, quota_young=0.5, quota_young_clicks=most)
    drawn = Counter(
        number(answer, place)
        for n in range(120)
        for answer in [ask(young, plant, str(n))]
        for place in quota_places(answer)
    )
    if most == 1_000:
        assert not drawn  # every item is young: the answer has enough
    else:
        old = {one for one in drawn if one < 100}
        assert old <= ({0, 1} if most == 41 else {0} if most == 40 else set())


def test_an_item_beyond_a_full_list_counts_as_its_last_one(plant: Plant) -> None:
    young = retriever(plant, quota_young=0.2)
    settings, of = plant.popularity._settings, plant.popularity
    assert of.clicks_at_most(["item-99", "item-119", "never"]) == [139.0, 0.0, 0.0]
    of._settings = msgspec.structs.replace(settings, popular_limit=100)
    try:
        assert of.clicks_at_most(["item-99", "item-119"]) == [139.0, 40.0]
        answer = ask(young, plant, "a")
        assert not quota_places(answer)
        line = "worker: quota_young: items beyond the popular list may have 40.0 clicks and are not"
        assert answer.missing[0].startswith(line) and "raise popular_limit" in answer.missing[0]
        assert not ask(retriever(plant, quota_young=0.2, quota_young_clicks=40), plant, "").missing
    finally:
        of._settings = settings
    assert not ask(young, plant, "a").missing


def test_fresh_items_are_those_of_the_last_hours(plant: Plant) -> None:
    fresh = retriever(plant, quota_fresh=0.5, quota_fresh_h=1)
    drawn = [
        number(answer, place)
        for n in range(30)
        for answer in [ask(fresh, plant, str(n), 10)]
        for place in quota_places(answer, "fresh")
    ]
    assert all(one % 10 == 0 for one in drawn) and len(set(drawn)) > 2


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_items_is_shown(plant: Plant, share: float) -> None:
    """The others stay as they are, for a comparison; the hash is that of `item_key`."""
    young = retriever(plant, quota_young=0.5, quota_items=share)
    drawn = {
        answer.items[place].hit.item_id
        for n in range(60)
        for answer in [ask(young, plant, str(n))]
        for place in quota_places(answer)
    }
    assert all(item_key(one) < share * 2**64 for one in drawn)
    candidates = sum(item_key(f"item-{n}") < share * 2**64 for n in range(100, N))
    assert len(drawn) <= candidates and bool(drawn) == bool(candidates)


def test_young_items_near_the_top_are_drawn_more_often() -> None:
    first = Counter(Draw("u", str(n)).order([1, 20, 60], [0, 0, 0], 60)[0] for n in range(2_000))
    assert first[0] > first[1] > first[2] > 20
    # Many clicks: the place decides.
    sure = Counter(Draw("u", str(n)).order([1, 20, 60], [900] * 3, 60)[0] for n in range(500))
    assert sure[0] == 500


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("k", [1, 2, 9, 10, 11, 25, 100])
def test_the_positions_are_as_many_as_the_share_says(k: int, share: float) -> None:
    found = [Draw("ana", str(n)).positions(k, share) for n in range(400)]
    assert all(len(set(places)) == len(places) for places in found)
    assert all(0 <= place < k for places in found for place in places)
    mean = float(np.mean([len(places) for places in found]))
    assert abs(mean - k * share) < 0.12 * max(1.0, k * share)


def test_quotas_keep_limits_pins_filters_and_denials(plant: Plant) -> None:
    text = 'version = "1"\n[[pin]]\nname = "p"\nitems = ["item-50"]\nposition = 10\n'
    text += '[[deny]]\nname = "d"\nitems = ["item-110"]\n'
    plant.rules.take(parse(text.encode(), Known()))
    young = retriever(plant, quota_young=0.3)
    from serving.rules.limits import Limit

    limits = (Limit("categories", 2),)
    for n in range(40):
        answer = ask(young, plant, str(n), limits=limits)
        assert plain(answer)[9] == "item-50" and "item-110" not in plain(answer)
        counts = Counter(int(one.removeprefix("item-")) % 7 for one in plain(answer))
        assert max(counts.values()) <= 2 and len(answer.items) == 10 and not answer.filled


def test_quotas_cost_no_items(plant: Plant) -> None:
    young = retriever(plant, quota_young=0.5, quota_fresh=0.5)
    for k in (N - 3, N - 2, N - 1):
        answer = ask(young, plant, "a", k)
        assert len(set(plain(answer))) == min(k, N - 2)


# ---------------------------------------------------------------- through the service


def test_a_worker_and_a_coordinator_draw_alike_and_explain_it() -> None:
    settings = msgspec.structs.replace(
        SETTINGS, fusion="rrf", quota_young=0.2, quota_every=1, popular_limit=N, k_max=N
    )
    plant = Plant(3, catalogue(N), settings=settings)
    try:
        plant.user("ana", "item-1", "item-2")
        plant.clicked({f"item-{n}": 1_000 * (40 + n) for n in range(100)})

        def fixed(service: RetrievalService) -> None:
            assert service._backend is not None
            service._backend.impressions._prefix = "same"  # type: ignore[attr-defined]

        for service in (plant.alone, plant.service):
            fixed(service)
        for _ in range(10):
            one, other = (c.retrieve("ana", 10) for c in (plant.one, plant.client))
            assert one.impression_id == other.impression_id
            assert [(i.item_id, i.path, i.path_rank) for i in one.items] == [
                (i.item_id, i.path, i.path_rank) for i in other.items
            ]
            drawn = [i for i in one.items if i.path == "young"]
            for item in drawn:
                assert [(rule.kind, rule.name) for rule in item.rules] == [("young", "quota_young")]
                for client in (plant.one, plant.client):
                    [found] = client.explain(
                        "ana", [item.item_id], 10, impression_id=one.impression_id
                    ).items
                    assert found.in_answer and found.rank == item.rank
                    assert found.why.endswith("; young by 'quota_young'")
                    [without] = client.explain("ana", [item.item_id], 10).items
                    assert not without.in_answer
        counts = plant.one.stats().rule_items
        assert counts["young"] > 10
        for size in (256, 257):
            request = pb.ExplainRequest(
                request=pb.RetrieveRequest(user_id="ana", k=3),
                item_ids=["item-1"],
                impression_id="x" * size,
            )
            call: Callable[[], object] = lambda r=request: plant.one._call(  # noqa: E731
                plant.one._stub.Explain, r, 5.0
            )
            if size == 256:
                call()
            else:
                assert fails(call).startswith("INVALID_ARGUMENT: impression_id: ")
    finally:
        plant.close()


def test_the_settings_make_the_quotas() -> None:
    assert quotas_of(Settings()).listed == []
    made = quotas_of(Settings(quota_young=0.1, quota_fresh=0.2, quota_every=5, quota_fresh_h=2))
    kinds: Sequence[tuple[str, float]] = [tuple(one) for one in made.listed]
    assert kinds == [("young", 0.1), ("fresh", 0.2)]
    assert made == Quotas(made.listed, 5, 20, 2 * HOUR_MS)
