"""Filters over every index: some by hand, and random ones against the definition `matches`."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eddyline.schema.item_key import keys_of
from eddyline.schema.item_record import ItemRecord
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.filters import Filter, Range, matches
from index.port import Hit, Index
from index.search import filtered

D = 8
WORDS = ("a", "b", "c", "rare")
TEXTS = frozenset({"brand", "color", "signed"})


class Built(HnswIndex):
    """Rebuilds after every write, so that the main segment answers all that it can."""

    def apply(self, records):  # type: ignore[no-untyped-def]
        counted = super().apply(records)
        assert self.rebuild()
        return counted


MAKERS: dict[str, Callable[[], Index]] = {
    "exact": lambda: ExactIndex(D, TEXTS),
    "hnsw-scan": lambda: HnswIndex(D, text_names=TEXTS),
    "hnsw-fresh": lambda: HnswIndex(D, exact_below=0, fresh_max=1_000_000, text_names=TEXTS),
    "hnsw-graph": lambda: Built(D, exact_below=0, text_names=TEXTS),
}


@pytest.fixture(params=list(MAKERS))
def index(request: pytest.FixtureRequest) -> Iterator[Index]:
    made = MAKERS[request.param]()
    yield made
    made.close()


def units(n: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


POOL = units(64, 1)


def put(item_id: str, offset: int = 0, at: int = 0, **attributes: Any) -> ItemRecord:
    return ItemRecord(item_id, 0, offset, offset, 0, POOL[at], attributes)


def ids(hits: list[Hit]) -> list[str]:
    return sorted(hit.item_id for hit in hits)


def of(*names: str) -> frozenset[str]:
    return frozenset(names)


CATALOGUE = [
    put(
        "film",
        1,
        1,
        categories=["Drama", "War"],
        tags=["long", "old"],
        attributes={"year": 1995, "stars": 4.5, "brand": "Acme", "color": "blue"},
    ),
    put(
        "book", 2, 2, categories=["Drama"], tags=["old"], attributes={"year": 1870, "signed": True}
    ),
    put(
        "song",
        3,
        3,
        categories=["Pop"],
        tags=["new"],
        attributes={"year": "1999", "stars": float("nan"), "brand": "acme", "color": "red"},
    ),
    put("bare", 4, 4),
    put("odd", 5, 5, categories="Drama", tags=[1, None], attributes=["year"]),
]


DAY_MS = 86_400_000.0
DATES = {
    "day": "1970-01-03",
    "zulu": "1970-01-03T00:00:00Z",
    "east": "1970-01-03T02:00:00+02:00",
    "later": "1970-01-03 00:00:00.001",
    "epoch": 2 * DAY_MS,
    "before": "1969-12-31",
    "number": " 172800000.0 ",
    "text": "on 1970-01-03",
    "none": "1970-02-30",
}


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (Range(2 * DAY_MS, 2 * DAY_MS), ["day", "east", "epoch", "number", "zulu"]),
        (Range(2 * DAY_MS), ["day", "east", "epoch", "later", "number", "zulu"]),
        (Range(high=2 * DAY_MS), ["before", "day", "east", "epoch", "number", "zulu"]),
        (Range(2 * DAY_MS + 1, 2 * DAY_MS + 1), ["later"]),
        (Range(-DAY_MS, -DAY_MS), ["before"]),
        (Range(), ["before", "day", "east", "epoch", "later", "number", "zulu"]),
    ],
)
def test_dates_are_milliseconds_since_1970(
    index: Index, between: Range, expected: list[str]
) -> None:
    """A date or time in ISO 8601, UTC without a zone."""
    index.upsert(
        [
            put(name, n, n, attributes={"released": value})
            for n, (name, value) in enumerate(DATES.items())
        ]
    )
    filters = Filter(ranges={"released": between})
    assert ids(index.query(POOL[0], 20, (), filters)) == expected
    described = index.describe(list(DATES), filters)
    assert sorted(hit.item_id for hit in described if hit) == expected


PRICES = {
    "number": 19.9,
    "text": "19.90",
    "exponent": "1.99e1",
    "blanks": " +19.9\t",
    "cheap": "7",
    "german": "19,90",
    "currency": "19.90 €",
    "words": "on request",
    "nan": "nan",
    "infinite": "inf",
    "huge": "1e999",
    "truth": True,
    "empty": "",
}


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (Range(19.9, 19.9), ["blanks", "exponent", "number", "text"]),
        (Range(high=19.8), ["cheap"]),
        (Range(), ["blanks", "cheap", "exponent", "number", "text"]),
    ],
)
def test_a_number_sent_as_text_is_that_number(
    index: Index, between: Range, expected: list[str]
) -> None:
    """Whatever the other items have: the first item, and one that arrives later."""
    for n, (name, value) in enumerate(PRICES.items()):
        index.upsert([put(name, n, n, attributes={"price": value})])
    filters = Filter(ranges={"price": between})
    assert ids(index.query(POOL[0], 20, (), filters)) == expected
    assert ids(index.newest(20, (), filters)) == expected
    described = index.describe(list(PRICES), filters)
    assert sorted(hit.item_id for hit in described if hit) == expected


def test_an_attribute_of_texts_alone_has_a_name_if_one_is_a_number(index: Index) -> None:
    index.upsert([put("a", 1, 1, attributes={"price": "on request", "size": "12"})])
    assert set(index.number_names() or ()) == {"size"}


def test_names_of_numbers_outlive_their_items(index: Index) -> None:
    """They tell a mistyped name from a condition that no live item meets."""
    assert index.number_names() is None
    index.upsert(CATALOGUE)
    names = {"year", "stars"}
    assert set(index.number_names() or ()) == names
    index.retire([ItemRecord("film", 0, 10, 10, 0, None)])
    index.upsert([put(f"x{n}", 20 + n, n % 60, attributes={"price": n}) for n in range(3_000)])
    names.add("price")
    assert set(index.number_names() or ()) == names
    index.retire([ItemRecord(f"x{n}", 0, 5_000 + n, 0, 0, None) for n in range(3_000)])
    index.upsert([put(f"y{n}", 10_000 + n, n % 60) for n in range(3_000)])  # a new vector table
    assert set(index.number_names() or ()) == names
    index.retire([ItemRecord(r.item_id, 0, 90_000, 0, 0, None) for r in CATALOGUE])
    index.retire([ItemRecord(f"y{n}", 0, 90_000, 0, 0, None) for n in range(3_000)])
    assert index.number_names() is None


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filter(), ["bare", "book", "film", "odd", "song"]),
        (Filter(categories=of("Drama")), ["book", "film"]),
        (Filter(categories=of("Pop", "War")), ["film", "song"]),
        (Filter(categories=of("Dram")), []),
        (Filter(tags=of("old", "new")), ["book", "film", "song"]),
        (Filter(tags_all=of("old", "long")), ["film"]),
        (Filter(tags_all=of("old", "unknown")), []),
        (Filter(ranges={"year": Range(1870, 1995)}), ["book", "film"]),
        (Filter(ranges={"year": Range(1870.5)}), ["film", "song"]),
        (Filter(ranges={"year": Range(high=1994)}), ["book"]),
        (Filter(ranges={"stars": Range()}), ["film"]),
        (Filter(ranges={"signed": Range(0, 1)}), []),
        (Filter(ranges={"year": Range(), "stars": Range(4, 5)}), ["film"]),
        (Filter(allow=of("song", "bare", "unknown")), ["bare", "song"]),
        (Filter(allow=of()), []),
        (Filter(deny=of("song", "unknown")), ["bare", "book", "film", "odd"]),
        (Filter(allow=of("song", "bare"), deny=of("bare")), ["song"]),
        (Filter(categories=of("Drama"), deny=of("film")), ["book"]),
        (Filter(categories=of("Drama"), tags=of("new")), []),
        (Filter(texts={"brand": of("Acme")}), ["film"]),
        (Filter(texts={"brand": of("Acme", "acme")}), ["film", "song"]),
        (Filter(texts={"color": of("red", "blue")}), ["film", "song"]),
        (Filter(texts={"color": of("red", "blue"), "brand": of("acme")}), ["song"]),
        (Filter(texts={"color": of("red"), "brand": of("Acme")}), []),
        (Filter(texts={"signed": of("true")}), ["book"]),
        (Filter(texts={"signed": of("True", "1")}), []),
        (Filter(texts={"brand": of("Acme")}, tags=of("new")), []),
        (Filter(categories_none=of("Drama")), ["bare", "odd", "song"]),
        (Filter(tags_none=of("old", "new")), ["bare", "odd"]),
        (Filter(tags_none=of("unknown")), ["bare", "book", "film", "odd", "song"]),
        (Filter(texts_none={"color": of("blue")}), ["bare", "book", "odd", "song"]),
        (Filter(texts={"color": of("red", "blue")}, texts_none={"color": of("blue")}), ["song"]),
        (Filter(categories=of("Drama"), categories_none=of("War")), ["book"]),
    ],
)
def test_what_passes(index: Index, filters: Filter, expected: list[str]) -> None:
    index.upsert(CATALOGUE)
    assert ids(index.query(POOL[0], 9, (), filters)) == expected
    assert ids(index.newest(9, (), filters)) == expected
    names = [record.item_id for record in CATALOGUE]
    described = index.describe([*names, "unknown"], filters)
    assert sorted(hit.item_id for hit in described if hit) == expected
    assert index.find_keys(keys_of([*names, "unknown"]), filters) == described
    assert len(index.query(POOL[0], 2, (), filters)) == min(2, len(expected))
    assert ids(index.query(POOL[0], 9, ["film"], filters)) == [
        name for name in expected if name != "film"
    ]


def test_the_filter_uses_the_newest_record_and_no_deleted_item(index: Index) -> None:
    index.upsert([put("x", 1, 1, categories=["old"]), put("y", 2, 2, categories=["old"])])
    index.apply([put("x", 3, 1, categories=["new"]), ItemRecord("y", 0, 4, 0, 0, None)])
    assert index.query(POOL[0], 9, (), Filter(categories=of("old"))) == []
    assert ids(index.query(POOL[0], 9, (), Filter(categories=of("new")))) == ["x"]
    assert index.query(POOL[0], 9, (), Filter(allow=of("y"))) == []
    index.upsert([put("y", 5, 2, categories=["new"])])
    assert ids(index.query(POOL[0], 9, (), Filter(categories=of("new")))) == ["x", "y"]


def test_the_terms_of_items(index: Index) -> None:
    index.upsert(CATALOGUE)
    names = ["categories", "tags", "brand", "signed", "year", "none"]
    found = index.terms_of(["song", "never", "film", "book", "odd", "song"], names)
    song = {("categories", "Pop"), ("tags", "new"), ("brand", "acme")}
    assert [set(of_item) for of_item in found] == [
        song,
        set(),
        {("categories", "Drama"), ("categories", "War"), ("tags", "long"), ("tags", "old")}
        | {("brand", "Acme")},
        {("categories", "Drama"), ("tags", "old"), ("signed", "true")},
        set(),
        song,
    ]
    assert index.terms_of(["film"], ["color"]) == [{("color", "blue")}]
    assert index.terms_of(["film"], []) == [frozenset()] and index.terms_of([], names) == []
    index.upsert([put("film", 11, 1, tags=["other"])])
    index.retire([ItemRecord("song", 0, 12, 12, 0, None)])
    assert index.terms_of(["film", "song"], names) == [{("tags", "other")}, frozenset()]


def test_columns_survive_a_replaced_table(index: Index) -> None:
    records = [
        put(f"i{n}", n, n % 64, tags=[WORDS[n % 3]], attributes={"n": n % 10}) for n in range(300)
    ]
    for turn in range(8):  # 2,400 rows: more than the first table holds
        index.upsert(
            [
                ItemRecord(r.item_id, 0, 300 * turn + n, 0, 0, r.vector, r.attributes)
                for n, r in enumerate(records)
            ]
        )
        filters = Filter(tags=of("b"), ranges={"n": Range(3, 4)})
        assert ids(index.query(POOL[0], 999, (), filters)) == sorted(
            r.item_id for r in records if matches(filters, r.item_id, r.attributes)
        )


def terms_by_definition(record: ItemRecord) -> frozenset[tuple[str, str]]:
    if record.vector is None:
        return frozenset()
    lists = [(name, word) for name in ("categories", "tags") for word in record.attributes[name]]
    brand = record.attributes["attributes"].get("brand")
    return frozenset([*lists, *([("brand", brand)] if brand else [])])


words = st.frozensets(st.sampled_from(WORDS), max_size=3)
numbers = st.one_of(st.integers(-2, 6), st.floats(-2, 6, allow_nan=False))
values = numbers | numbers.map(str) | st.just("much")
items = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.integers(0, 30),
            "at": st.integers(0, 63),
            "gone": st.integers(0, 5),
            "categories": words,
            "tags": words,
            "numbers": st.dictionaries(st.sampled_from("xy"), values, max_size=2),
            "brand": st.none() | st.sampled_from(WORDS),
        }
    ),
    max_size=60,
)
ranges = st.tuples(numbers, numbers).map(lambda pair: Range(min(pair), max(pair)))
names = st.frozensets(st.integers(0, 32).map("i{}".format), max_size=8)
few_words = st.frozensets(st.sampled_from(WORDS), max_size=1)
filters = st.builds(
    Filter,
    categories=words,
    tags=words,
    tags_all=words,
    deny=names,
    allow=st.none() | names,
    texts=st.dictionaries(st.just("brand"), words, max_size=1),
    categories_none=few_words,
    tags_none=few_words,
    texts_none=st.dictionaries(st.just("brand"), few_words, max_size=1),
    ranges=st.dictionaries(st.sampled_from("xyz"), ranges, max_size=2),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(items, filters, st.integers(0, 40), names, st.sampled_from([0, 1, 25]), st.integers(0, 63))
def test_random_filters_against_the_definition(
    found: list[dict[str, Any]],
    filters: Filter,
    k: int,
    exclude: frozenset[str],
    cost: int,
    at: int,
) -> None:
    records = []
    for offset, item in enumerate(found):
        parts = {
            "categories": sorted(item["categories"]),
            "tags": sorted(item["tags"]),
            "attributes": item["numbers"] | ({"brand": item["brand"]} if item["brand"] else {}),
        }
        vector = POOL[item["at"]] if item["gone"] else None
        records.append(ItemRecord(f"i{item['name']}", 0, offset, offset, 0, vector, parts))
    latest = {record.item_id: record for record in records}
    live = [r for r in latest.values() if r.vector is not None and r.item_id not in exclude]
    passing = [r for r in live if matches(filters, r.item_id, r.attributes)]
    scored = [
        (-float((r.vector.astype(np.float64) * POOL[at].astype(np.float64)).sum()), r.item_id)
        for r in passing
    ]  # type: ignore[union-attr]
    expected = [name for _, name in sorted(scored)[:k]]
    before = filtered.ROWS_A_CANDIDATE
    filtered.ROWS_A_CANDIDATE = cost  # 0: search the segments at any cost
    try:
        for make in MAKERS.values():
            index = make()
            index.apply(records[: len(records) // 2])
            index.apply(records[len(records) // 2 :])
            assert [hit.item_id for hit in index.query(POOL[at], k, exclude, filters)] == expected
            newest = sorted(passing, key=lambda r: (-r.at_ms, r.item_id))[:k]
            assert [hit.item_id for hit in index.newest(k, exclude, filters)] == [
                r.item_id for r in newest
            ]
            terms = index.terms_of([*latest, "never"], ["categories", "tags", "brand"])
            assert terms == [*map(terms_by_definition, latest.values()), frozenset()]
            index.close()
    finally:
        filtered.ROWS_A_CANDIDATE = before


@pytest.mark.parametrize(("low", "high"), [(1, 0), (float("nan"), 1), (0, float("nan"))])
def test_an_empty_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="holds no number"):
        Range(low, high)


@pytest.mark.parametrize("share", [0.001, 0.03, 0.3, 0.6, 0.95, 1.0])
def test_k_items_whether_by_search_or_by_scan(share: float) -> None:
    n = 6_000
    rng = np.random.default_rng(5)
    has = rng.random(n) < share
    vectors = units(n, 9)
    index = HnswIndex(D, exact_below=100, ef=64, fresh_max=10**6)
    exact = ExactIndex(D)
    records = [
        ItemRecord(f"i{at}", 0, at, 0, 0, vectors[at], {"tags": ["yes"]} if has[at] else {})
        for at in range(n)
    ]
    for one in (index, exact):
        one.apply(records[:5_500])
    assert index.rebuild()
    for one in (index, exact):
        one.apply(records[5_500:])
    try:
        for query in units(5, 11):
            got = index.query(query, 20, (), Filter(tags=of("yes")))
            best = exact.query(query, 20, (), Filter(tags=of("yes")))
            assert len(got) == len(best) == min(20, int(has.sum()))
            assert len({h.item_id for h in got} & {h.item_id for h in best}) >= 0.9 * len(best)
    finally:
        index.close()
