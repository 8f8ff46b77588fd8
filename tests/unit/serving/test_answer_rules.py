"""Limits, diversity, editorial rules and pages: by a worker, and alike by a coordinator."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from eddyline.schema.item_key import keys_of
from eddyline.schema.item_record import ItemRecord
from eddyline.settings.answers import LIMITS_MAX, MOST_MAX
from serving.proto import retrieval_pb2 as pb
from serving.rpc.client import Client
from serving.rules import cursor, selection
from serving.rules.diversity import ByMarginalRelevance
from serving.rules.editorial import EditorialRules, Known, parse
from serving.rules.selection import POOL_FACTOR, POOL_MORE
from tests.unit.serving.answers import fails, ids
from tests.unit.serving.test_coordinator import SETTINGS, Plant, catalogue, seen, unit

N = 210
BRANDS = frozenset({"brand"})


def items(n: int = N) -> list[ItemRecord]:
    """Categories c0 … c6 by number, and 1 brand for 3 of 4 items."""
    made = []
    for number, record in enumerate(catalogue(n)):
        more = {"brand": f"b{number % 3}"} if number % 4 else {}
        facts = {**record.attributes, "attributes": more}
        made.append(replace(record, attributes=facts))
    return made


@pytest.fixture(scope="module", params=["cascade", "rrf"])
def plant(request: pytest.FixtureRequest) -> Iterator[Plant]:
    paths = "towers,popular,newest" if request.param == "cascade" else "towers,newest"
    settings = msgspec.structs.replace(
        SETTINGS, fusion=request.param, recall_paths=paths, filter_texts="brand", path_candidates=40
    )
    made = Plant(3, items(), BRANDS, settings)
    made.user("ana", "item-7", "item-9")
    made.clicked({f"item-{n}": 1_000 + n for n in range(0, N, 5)})
    yield made
    made.close()


@pytest.fixture(autouse=True)
def without_rules(plant: Plant) -> None:
    plant.rules.take(EditorialRules())


def rules(plant: Plant, text: str) -> None:
    plant.rules.take(parse(f'version = "7"\n{text}'.encode(), Known(BRANDS)))


def both(plant: Plant, *request: object, **more: object) -> pb.RetrieveResponse:
    """The answer of the worker, once the coordinator has given the same."""
    one = plant.one.retrieve(*request, **more)  # type: ignore[arg-type]
    assert seen(plant.client.retrieve(*request, **more)) == seen(one)  # type: ignore[arg-type]
    return one


def apply(plant: Plant, record: ItemRecord) -> None:
    plant.whole.apply([record])
    for shard in plant.shards:
        shard.index.apply(*shard.share.split([record]))


def kinds(answer: pb.RetrieveResponse) -> dict[str, list[tuple[str, str]]]:
    found = {i.item_id: [(rule.kind, rule.name) for rule in i.rules] for i in answer.items}
    return {item_id: of_item for item_id, of_item in found.items() if of_item}


def category(item_id: str) -> int:
    return int(item_id.removeprefix("item-")) % 7


def explained(plant: Plant, item_id: str, *request: object, **more: object) -> pb.ExplainedItem:
    user, k = request
    [one] = plant.one.explain(user, [item_id], k, **more).items  # type: ignore[arg-type]
    [other] = plant.client.explain(user, [item_id], k, **more).items  # type: ignore[arg-type]
    other.age_ms = one.age_ms
    assert one == other
    return one


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("user", ["ana", "nobody"])
def test_no_value_has_more_items_than_the_limit(plant: Plant, user: str, most: int) -> None:
    plain = both(plant, user, 7 * most)
    answer = both(plant, user, 7 * most, limits={"categories": most})
    counts = Counter(map(category, ids(answer)))
    assert counts == dict.fromkeys(range(7), most) and not answer.filled and not kinds(answer)
    # The best item of each value is its best one without the limit.
    first = next(iter(ids(plain)))
    assert ids(answer)[0] == first
    for value in range(7):
        of_value = [one for one in ids(plain) if category(one) == value]
        within = [one for one in ids(answer) if category(one) == value]
        assert within[: len(of_value[:most])] == of_value[:most]


def test_the_answer_has_the_first_items_of_the_fused_list_within_the_limits(plant: Plant) -> None:
    every = ids(both(plant, "ana", 90))  # what the rules choose from for ten items
    counts, expected = Counter[str](), []
    for item_id in every:
        number = int(item_id.removeprefix("item-"))
        values = [f"c{number % 7}", *([f"b{number % 3}"] if number % 4 else [])]
        if all(counts[value] < (2 if value[0] == "c" else 3) for value in values):
            counts.update(values)
            expected.append(item_id)
    answer = both(plant, "ana", 10, limits={"categories": 2, "brand": 3})
    assert ids(answer) == expected[:10]


def test_what_is_beyond_a_limit_fills_the_answer_and_says_so(plant: Plant) -> None:
    plain = both(plant, "ana", 40)
    answer = both(plant, "ana", 40, limits={"tags": 4})
    assert Counter(map(category, ids(answer))).total() == 40 and not answer.short_because
    over = kinds(answer)
    assert list(over) == ids(answer)[8:]
    assert set(map(tuple, over.values())) == {(("over_limit", "tags"),)}
    assert list(answer.filled) == [
        "32 items are beyond the limit of 4 for each of 'tags': no other item was found"
    ]
    rest = [one for one in ids(plain) if one not in ids(answer)[:8]]
    assert ids(answer)[8:][: len(rest)] == rest
    assert [item.rank for item in answer.items] == list(range(1, 41))


def test_k_items_while_there_are_k(plant: Plant) -> None:
    live = N - 2
    for k in (live - 1, live, live + 1):
        answer = both(plant, "ana", k, limits={"categories": 1, "brand": 1})
        assert len(set(ids(answer))) == min(k, live)
        assert bool(answer.short_because) == (k > live)


def test_items_without_the_attribute_are_not_limited(plant: Plant) -> None:
    answer = both(plant, "nobody", 30, limits={"brand": 1})
    numbers = [int(one.removeprefix("item-")) for one in ids(answer)]
    assert sum(number % 4 > 0 for number in numbers) == 3 and not answer.filled


def test_rare_values_are_looked_for_beyond_the_first_candidates() -> None:
    """All first candidates have a full value: a further recall leaves that value out."""
    rng = np.random.default_rng(2)
    near = unit(np.eye(16)[0] + 0.1 * rng.normal(size=(200, 16)))
    far = unit(np.eye(16)[1] + 0.1 * rng.normal(size=(12, 16)))
    tags = [*["common"] * 200, *(f"rare-{n // 2}" for n in range(12))]
    records = [
        ItemRecord(f"item-{n}", 0, n, n, 1, vector, {"tags": [tag]})
        for n, (vector, tag) in enumerate(zip(np.concatenate((near, far)), tags, strict=True))
    ]
    plant = Plant(2, records)
    try:
        plant.user("ana", "item-0")
        assert POOL_FACTOR * 8 + POOL_MORE < 199
        answer = both(plant, "ana", 8, limits={"tags": 1})
        found = plant.whole.terms_of(ids(answer), ["tags"])
        assert {text for of_item in found[:7] for _, text in of_item} == {
            "common",
            *(f"rare-{n}" for n in range(6)),
        }
        assert kinds(answer) == {ids(answer)[7]: [("over_limit", "tags")]}
        assert found[7] == {("tags", "common")}
    finally:
        plant.close()


@pytest.mark.parametrize("most", [-1, 0, 1, MOST_MAX, MOST_MAX + 1, 10**9])
def test_the_number_of_a_limit_has_limits(plant: Plant, most: int) -> None:
    if 0 <= most <= MOST_MAX:
        answer = both(plant, "nobody", 14, limits={"categories": most})
        plain = both(plant, "nobody", 14)
        assert bool(kinds(answer)) == (most == 1)
        assert most == 1 or ids(answer) == ids(plain)
        return
    for client in (plant.one, plant.client):
        assert fails(lambda client=client: client.retrieve("ana", 3, limits={"tags": most})) == (
            f"INVALID_ARGUMENT: limits.most: {most}, allowed are 0 … 1000"
        )


def test_which_attributes_a_limit_may_name(plant: Plant) -> None:
    for client in (plant.one, plant.client):

        def refusal(*limits: tuple[str, int], client: Client = client) -> str:
            made = [pb.AttributeLimit(attribute=name, most=most) for name, most in limits]
            request = pb.RetrieveRequest(user_id="ana", k=3, limits=made)
            return fails(lambda: client._call(client._stub.Retrieve, request, 5.0))

        assert refusal(("color", 1)) == (
            "INVALID_ARGUMENT: limits: 'color' is not in the setting filter_texts; it has 'brand'"
        )
        assert (
            refusal(("tags", 1), ("tags ", 2)) == "INVALID_ARGUMENT: limits: 'tags' is given twice"
        )
        assert refusal(("", 1)).startswith("INVALID_ARGUMENT: limits.attribute: '' has 0 bytes")
        for count in (LIMITS_MAX + 1, 20 * LIMITS_MAX):
            assert refusal(*((f"a{n}", 1) for n in range(count))) == (
                f"INVALID_ARGUMENT: limits: {count} values, allowed are 0 … {LIMITS_MAX}"
            )


def test_why_an_item_is_beyond_a_limit(plant: Plant) -> None:
    plain = both(plant, "ana", 10)
    answer = both(plant, "ana", 10, limits={"categories": 1})
    dropped = next(one for one in ids(plain) if one not in ids(answer))
    found = explained(plant, dropped, "ana", 10, limits={"categories": 1})
    value = f"c{category(dropped)}"
    assert found.why.endswith(
        f"; left out: the answer has 1 items of 'categories' '{value}', its limit"
    )
    assert [(rule.kind, rule.name) for rule in found.rules] == [("limit", "categories")]
    assert not found.in_answer and 0 < found.rank <= 10
    over = ids(answer)[-1]
    found = explained(plant, over, "ana", 10, limits={"categories": 1})
    assert found.in_answer and found.why.endswith("; over_limit by 'categories'")


# ---------------------------------------------------------------- diversity


def reference(vectors: np.ndarray, diversity: float, k: int) -> list[int]:
    """MMR by its definition, pair by pair."""
    chosen: list[int] = []
    while len(chosen) < min(k, len(vectors)):
        best, most = -1, -np.inf
        for at in range(len(vectors)):
            if at in chosen:
                continue
            near = max((float(vectors[at] @ vectors[one]) for one in chosen), default=0.0)
            value = (1 - diversity) / np.log2(2 + at) - diversity * near
            if value > most + 1e-12:
                best, most = at, value
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("diversity", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_maximal_marginal_relevance_agrees_with_its_definition(diversity: float) -> None:
    vectors = unit(np.random.default_rng(3).normal(size=(60, 8)))
    order = ByMarginalRelevance(vectors, diversity, count=62)
    taken = [order.take(lambda place: True) for _ in range(63)]
    assert taken == [*reference(vectors, diversity, 60), 60, 61, None]


def test_the_items_of_an_answer_differ_more_with_more_diversity(plant: Plant) -> None:
    assert ids(both(plant, "ana", 10, diversity=0.0)) == ids(both(plant, "ana", 10))
    pool = ids(both(plant, "ana", POOL_FACTOR * 10 + POOL_MORE))
    vectors = plant.whole.vectors_of(pool)
    near = []
    for diversity in (0.0, 0.3, 0.6, 1.0):
        answer = both(plant, "ana", 10, diversity=diversity)
        assert ids(answer) == [pool[at] for at in reference(vectors, diversity, 10)]
        found = plant.whole.vectors_of(ids(answer)).astype(np.float64)
        near.append(float((found @ found.T)[np.triu_indices(10, 1)].max()))
    assert near[0] > near[-1]


def test_diversity_and_limits_hold_together(plant: Plant) -> None:
    answer = both(plant, "nobody", 14, diversity=0.7, limits={"categories": 2})
    assert Counter(map(category, ids(answer))) == dict.fromkeys(range(7), 2)


@pytest.mark.parametrize("diversity", [-0.01, 1.01, float("nan"), float("inf"), 1e9])
def test_diversity_has_limits(plant: Plant, diversity: float) -> None:
    sentence = f"INVALID_ARGUMENT: diversity: {diversity}, allowed are 0 … 1"
    for client in (plant.one, plant.client):
        assert fails(lambda c=client: c.retrieve("ana", 3, diversity=diversity)) == sentence


def test_an_item_that_gave_its_place_to_others_says_so(plant: Plant) -> None:
    plain, answer = both(plant, "ana", 10), both(plant, "ana", 10, diversity=0.9)
    gone = next(one for one in ids(plain) if one not in ids(answer))
    found = explained(plant, gone, "ana", 10, diversity=0.9)
    assert found.why.endswith("; its place went to items that differ more")


def test_a_changed_vector_counts_at_once(plant: Plant) -> None:
    """Also where a coordinator has the item's earlier vector in its cache."""
    both(plant, "nobody", 10, diversity=0.8)
    first, second = ids(both(plant, "nobody", 10))[:2]
    record = next(r for r in items() if r.item_id == second)
    near = plant.whole.vectors_of([first])[0]
    apply(plant, replace(record, offset=5_000, vector=near))
    answer = both(plant, "nobody", 10, diversity=0.8)
    assert second not in ids(answer)[:5]
    apply(plant, replace(record, offset=5_001))


# ---------------------------------------------------------------- editorial rules


def test_denied_items_are_in_no_answer(plant: Plant) -> None:
    first, second, *_ = ids(both(plant, "ana", 10))
    value = (category(first) + 1) % 7
    rules(
        plant,
        f'[[deny]]\nname = "d1"\nitems = ["{first}"]\n'
        f'[[deny]]\nname = "d2"\nattribute = "categories"\nvalues = ["c{value}"]\n',
    )
    answer = both(plant, "ana", 150)
    assert first not in ids(answer) and value not in set(map(category, ids(answer)))
    assert answer.rules_version == "7" and len(answer.items) == 150
    found = explained(plant, first, "ana", 10)
    assert found.why == "the editorial rule 'd1' denies it" and found.live
    assert [(rule.kind, rule.name) for rule in found.rules] == [("denied", "d1")]
    other = next(f"item-{n}" for n in range(20, N) if n % 7 == value)
    assert explained(plant, other, "ana", 10).why == "the editorial rule 'd2' denies it"
    for client in (plant.one, plant.client):
        near = client.similar_items([second], 150)
        assert first not in ids(near) and value not in set(map(category, ids(near)))
        short = client.similar_items([second], N)
        assert short.short_because.endswith("no more other items are live, without denied ones")
    answer = both(plant, "ana", N)
    assert answer.short_because.endswith(", and editorial rules deny some")


def test_a_denial_comes_on_top_of_the_requests_filter(plant: Plant) -> None:
    values = [f"never-{n}" for n in range(64)]
    rules(plant, '[[deny]]\nname = "d"\nattribute = "brand"\nvalues = ["b1"]\n')
    filters = pb.Filters(texts_none=[pb.Texts(attribute="brand", values=values)])
    answer = both(plant, "nobody", 100, filters=filters)
    brands = plant.whole.terms_of(ids(answer), ["brand"])
    assert frozenset({("brand", "b1")}) not in brands and len(answer.items) == 100


def test_pinned_items_have_their_positions(plant: Plant) -> None:
    plain = ids(both(plant, "ana", 10))
    rules(
        plant,
        '[[pin]]\nname = "third"\nitems = ["item-100", "gone", "item-101"]\nposition = 3\n'
        f'[[pin]]\nname = "first"\nitems = ["{plain[5]}"]\nposition = 1\n'
        '[[pin]]\nname = "seen"\nitems = ["item-7"]\nposition = 2\n'
        '[[pin]]\nname = "outside"\nitems = ["item-102"]\nposition = 11\n',
    )
    answer = both(plant, "ana", 10)
    placed = (plain[5], "item-100", "item-101")
    rest = [one for one in plain if one not in placed]
    expected = [plain[5], rest[0], "item-100", "item-101", *rest[1:7]]
    assert ids(answer) == expected
    assert kinds(answer) == {
        plain[5]: [("pinned", "first")],
        "item-100": [("pinned", "third")],
        "item-101": [("pinned", "third")],
    }
    # With the rank by its path where a path returned it.
    assert answer.items[0].path != "pinned"
    found = explained(plant, "item-100", "ana", 10)
    assert found.in_answer and found.rank == 3 and found.why.endswith("; pinned by 'third'")
    gone = explained(plant, plain[9], "ana", 10)
    assert gone.why.endswith("; its place went to pinned items")


def test_a_pinned_item_that_may_not_be_shown_is_not(plant: Plant) -> None:
    rules(
        plant,
        '[[pin]]\nname = "p"\nitems = ["item-100", "item-101", "item-103"]\n'
        '[[deny]]\nname = "d"\nitems = ["item-101"]\n',
    )
    filters = pb.Filters(categories=["c5"])  # item-103
    assert kinds(both(plant, "nobody", 5, filters=filters)) == {"item-103": [("pinned", "p")]}
    answer = both(plant, "nobody", 5, session=["item-100"])
    assert list(kinds(answer)) == ["item-103"] and ids(answer)[0] == "item-103"
    record = next(r for r in items() if r.item_id == "item-103")
    apply(plant, replace(record, offset=9_000, vector=None))
    assert list(kinds(both(plant, "nobody", 5))) == ["item-100"]
    apply(plant, replace(record, offset=9_001))


def test_pins_by_value_take_the_first_items_of_the_fusion(plant: Plant) -> None:
    of_brand = pb.Filters(texts=[pb.Texts(attribute="brand", values=["b2"])])
    first = ids(both(plant, "ana", 3, filters=of_brand))
    rules(
        plant, '[[pin]]\nname = "p"\nattribute = "brand"\nvalues = ["b2"]\nposition = 2\nmost = 3\n'
    )
    answer = both(plant, "ana", 10)
    assert ids(answer)[1:4] == first
    filters = pb.Filters(texts=[pb.Texts(attribute="brand", values=["b1"])])
    assert not kinds(both(plant, "ana", 10, filters=filters))
    filters = pb.Filters(categories=["c3"])
    assert set(map(category, ids(both(plant, "ana", 10, filters=filters)))) == {3}


def test_pins_at_the_end_of_a_short_answer_come_last(plant: Plant) -> None:
    rules(plant, '[[pin]]\nname = "p"\nitems = ["item-3"]\nposition = 40\n')
    filters = pb.Filters(allow=["item-1", "item-2", "item-3"])
    answer = both(plant, "nobody", 50, filters=filters)
    assert len(answer.items) == 3 and ids(answer)[2] == "item-3"


def test_boosted_items_move_up_and_down(plant: Plant) -> None:
    plain = ids(both(plant, "ana", 20))
    rules(
        plant,
        f'[[boost]]\nname = "up"\nitems = ["{plain[11]}"]\nfactor = 8.0\n'
        f'[[boost]]\nname = "down"\nitems = ["{plain[0]}"]\nfactor = 0.25\n',
    )
    answer = both(plant, "ana", 20)
    # Rank 12 counts as 1.5, rank 1 as 4, equal with the item of rank 4, which it comes before.
    rest = [plain[1], plain[2]]
    assert ids(answer)[:5] == [plain[11], *rest, plain[0], plain[3]]
    assert kinds(answer) == {plain[11]: [("boosted", "up")], plain[0]: [("boosted", "down")]}
    assert explained(plant, plain[11], "ana", 20).why.endswith("; boosted by 'up'")
    rules(
        plant, '[[boost]]\nname = "v"\nattribute = "categories"\nvalues = ["c2"]\nfactor = 100.0\n'
    )
    answer = both(plant, "ana", 10)
    assert set(map(category, ids(answer)[:5])) == {2}


def test_rules_of_a_scene_need_the_scene(plant: Plant) -> None:
    rules(plant, '[[pin]]\nname = "p"\nitems = ["item-100"]\nscene = "home"\n')
    assert kinds(both(plant, "ana", 5, scene="home")) == {"item-100": [("pinned", "p")]}
    assert not kinds(both(plant, "ana", 5)) and not kinds(both(plant, "ana", 5, scene="cart"))


def test_a_file_that_cannot_be_used_is_missing(plant: Plant) -> None:
    plant.rules.why = "the rules of version '7' stay, rules.toml: bad"
    try:
        line = f"worker: {plant.rules.why}"
        assert list(both(plant, "ana", 3).missing) == [line]
        assert line in plant.one.stats().missing and line in plant.client.stats().missing
        assert line in plant.one.similar_items(["item-1"], 3).missing
    finally:
        plant.rules.why = ""


# ---------------------------------------------------------------- pages


def pages(plant: Plant, user: str, k: int, **more: object) -> Iterator[pb.RetrieveResponse]:
    """Every page, in turn from the worker and from the coordinator."""
    token, clients = "", [plant.one, plant.client]
    for number in range(1_000):
        page = clients[number % 2].retrieve(user, k, cursor=token, **more)  # type: ignore[arg-type]
        yield page
        token = page.next_cursor
        if not token:
            return


@pytest.mark.parametrize("k", [7, 50])
def test_the_pages_have_every_item_once(plant: Plant, k: int) -> None:
    found = list(pages(plant, "ana", k))
    every = [one for page in found for one in ids(page)]
    assert len(every) == len(set(every)) == N - 2
    assert [len(page.items) for page in found[:-1]] == [k] * (len(found) - 1)
    earlier = N - 2 - len(found[-1].items)
    assert found[-1].short_because == (
        f"{len(found[-1].items)} of {k}: {N} items are live, 2 of them are in the user's list, "
        f"{earlier} were on earlier pages"
    )


def test_pages_repeat_nothing_while_clicks_and_rules_change(plant: Plant) -> None:
    rules(plant, '[[pin]]\nname = "p"\nitems = ["item-100"]\n')
    every: list[str] = []
    for number, page in enumerate(pages(plant, "cyd", 20, limits={"categories": 3}, diversity=0.3)):
        assert not set(every) & set(ids(page))
        every += ids(page)
        assert ("item-100" in ids(page)) == (number == 0)
        plant.user("cyd", *(f"item-{n}" for n in range(number, number + 3)))
        if number == 3:
            break


def test_a_page_explains_what_was_on_earlier_ones(plant: Plant) -> None:
    first = plant.one.retrieve("ana", 5, cursor="")
    found = explained(plant, ids(first)[0], "ana", 5, cursor=first.next_cursor)
    assert found.why == "it was on an earlier page: pages repeat no item" and not found.in_answer
    second = plant.client.retrieve("ana", 5, cursor=first.next_cursor)
    found = explained(plant, ids(second)[0], "ana", 5, cursor=first.next_cursor)
    assert found.in_answer and found.rank == 1


def test_a_cursor_of_another_generation_goes_on(plant: Plant) -> None:
    first = plant.one.retrieve("ana", 5, cursor="")
    assert not first.generation_changed
    known = cursor.decode(first.next_cursor, "ana", 60)
    assert np.array_equal(known.keys, keys_of(ids(first)))
    other = cursor.encode(cursor.FIRST_PAGE, ids(first), "ana", "g0", time.time())
    second = plant.one.retrieve("ana", 5, cursor=other)
    assert second.generation_changed and not set(ids(first)) & set(ids(second))
    assert not plant.one.retrieve("ana", 5, cursor=first.next_cursor).generation_changed


def test_a_cursor_that_cannot_be_used_is_refused(plant: Plant) -> None:
    token = plant.one.retrieve("ana", 5, cursor="").next_cursor
    old = cursor.encode(cursor.FIRST_PAGE, ["a"], "ana", "g1", time.time() - 3_700)
    for client in (plant.one, plant.client):

        def refusal(user: str, text: str, client: Client = client) -> str:
            return fails(lambda: client.retrieve(user, 5, cursor=text))

        assert refusal("bob", token) == "INVALID_ARGUMENT: cursor: it was made for another user"
        assert refusal("ana", "x" + token).startswith("INVALID_ARGUMENT: cursor: it is ")
        assert refusal("ana", old).startswith("INVALID_ARGUMENT: cursor: it is 3,70")
        assert refusal("ana", "A" * 30_000).startswith(
            "INVALID_ARGUMENT: cursor: 30,000 characters"
        )


def test_without_a_cursor_no_answer_has_one(plant: Plant) -> None:
    answer = both(plant, "ana", 5)
    assert not answer.next_cursor and not answer.rules_version and not answer.filled


# ---------------------------------------------------------------- the work


@pytest.fixture
def recalled(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The k of every recall."""
    asked: list[int] = []
    fusion = plant.backend.retriever.rules.fusion
    fuse = fusion.fuse

    def noted(paths: Any, request: Any, index: Any) -> Any:
        asked.append(request.k)
        return fuse(paths, request, index)

    monkeypatch.setattr(fusion, "fuse", noted)
    return asked


def test_a_query_without_wishes_recalls_once(plant: Plant, recalled: list[int]) -> None:
    plant.one.retrieve("ana", 10)
    assert recalled == [10]
    plant.one.retrieve("ana", 10, diversity=0.5)
    assert recalled == [10, POOL_FACTOR * 10 + POOL_MORE]


def test_the_recalls_of_an_answer_are_limited(plant: Plant, recalled: list[int]) -> None:
    plant.one.retrieve("ana", 100, limits={"categories": 1, "tags": 1, "brand": 1})
    assert 1 < len(recalled) <= 1 + selection.ROUNDS_MAX
    assert max(recalled) <= POOL_FACTOR * 100 + POOL_MORE


def test_the_items_of_rules_are_counted(plant: Plant) -> None:
    counts = plant.backend.retriever.rules.counts
    before = counts().get("pinned", 0)
    rules(plant, '[[pin]]\nname = "p"\nitems = ["item-100"]\n')
    plant.one.retrieve("ana", 5)
    plant.one.explain("ana", ["item-1"], 5)
    assert counts()["pinned"] == before + 1
