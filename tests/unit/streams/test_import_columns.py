"""What columns of tables are taken for, by their names and values."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eddyline.errors import SettingsError
from eddyline.schema.mapping import mapper, spec
from streams.importing.columns import guess_map

S, MS = "1577836800", "1577836800000"


def guessed(rows: list[dict[str, Any]], stem: str = "data", topic: str = "") -> dict[str, Any]:
    text = guess_map(rows, stem, topic)
    for name in tomllib.loads(text):
        found = spec.parse(text.encode(), name, "guess")
        assert found is not None
        mapper.compiled(found, name, "guess")
    return tomllib.loads(text)


@pytest.mark.parametrize(
    ("user", "item", "at", "format_"),
    [
        ("userId", "movieId", S, "s"),
        ("user_id", "product_id", MS, "ms"),
        ("visitorid", "itemid", MS, "ms"),
        ("Customer ID", "StockCode", "2010-12-01 08:26:00", "iso"),
        ("customer", "sku", "01.12.2010 08:26", "%d.%m.%Y %H:%M"),
        ("reviewerID", "asin", S, "s"),
        ("session", "article", "20200101", "%Y%m%d"),
        ("USER", "ISBN", "12/31/2019 08:26", "%m/%d/%Y %H:%M"),
    ],
)
def test_users_items_and_times_are_found(user: str, item: str, at: str, format_: str) -> None:
    rows = [{user: f"u{n}", item: f"i{n}", "timestamp": at} for n in range(3)]
    fields = guessed(rows)["clicks"]["fields"]
    assert (fields["user_id"], fields["item_id"]) == (user, item)
    assert fields["at_ms"] == {"path": "timestamp", "format": format_}


def test_a_rating_is_a_like_a_click_or_a_dislike() -> None:
    rows = [
        {"user": "1", "item": "2", "rating": one, "timestamp": S}
        for one in ("0.5", "2.0", "3.0", "4.0", "5.0")
    ]
    clicks = guessed(rows)["clicks"]
    assert clicks["kinds"] == dict.fromkeys(("0.5", "2.0"), "dislike") | {
        "3.0": "click",
        "4.0": "like",
        "5.0": "like",
    }
    assert clicks["other_kinds"] == "click"


def test_own_kinds_are_found() -> None:
    rows = [
        {"visitorid": "1", "itemid": "2", "event": one, "timestamp": MS}
        for one in ("view", "addtocart", "transaction")
    ]
    clicks = guessed(rows)["clicks"]
    assert clicks["kinds"] == {"view": "view", "addtocart": "cart", "transaction": "purchase"}


def test_an_event_id_must_be_unique() -> None:
    rows = [{"user": "1", "item": "2", "transactionid": n, "ts": MS} for n in ("7", "7")]
    assert "event_id" not in guessed(rows)["clicks"]["fields"]
    rows = [{"user": "1", "item": "2", "uuid": n, "ts": MS} for n in ("7", "8")]
    assert guessed(rows)["clicks"]["fields"]["event_id"] == "uuid"


@pytest.mark.parametrize("separator", ["|", ";", ","])
def test_items_have_titles_categories_prices_and_stock(separator: str) -> None:
    rows = [
        {
            "sku": f"00{n}",
            "name": f"Lamp {n}",
            "genres": separator.join(["Home", "Light"]),
            "price": "9.90",
            "stock": str(n),
            "colour": "red",
            "code": "007",
        }
        for n in range(5)
    ]
    assert guessed(rows)["items"]["fields"] == {
        "item_id": "sku",
        "title": "name",
        "categories": {"path": "genres", "split": separator},
        "available": {"path": "stock", "above": 0},
        "attributes": {
            "price": {"path": "price", "type": "number"},
            "colour": "colour",
            "code": "code",
        },
    }


def test_an_id_is_of_what_the_name_of_the_file_says() -> None:
    rows = [{"id": "1", "name": "Ana", "age": "30"}]
    assert list(guessed(rows, "users")) == ["users"]
    assert list(guessed(rows, "products")) == ["items"]
    assert list(guessed(rows, "x", "users")) == ["users"]


def test_orders_also_describe_items() -> None:
    rows = [
        {
            "InvoiceNo": str(n // 3),
            "StockCode": f"s{n % 5}",
            "Description": f"Thing {n % 5}",
            "Quantity": "-1" if n == 7 else "2",
            "InvoiceDate": f"2010-12-01 08:{n:02}:00",
            "UnitPrice": f"{n % 5}.5",
            "CustomerID": f"{100 + n // 3}.0",
            "Country": "UK" if n % 7 else "FR",
        }
        for n in range(50)
    ]
    found = guessed(rows)
    assert found["clicks"]["fields"] == {
        "user_id": {"path": "CustomerID", "type": "integer"},
        "item_id": "StockCode",
        "at_ms": {"path": "InvoiceDate", "format": "iso"},
        "kind": {"const": "purchase"},
    }
    assert found["clicks"]["rule"] == [{"where": {"Quantity": {"above": 0}}}]
    assert found["items"]["fields"] == {
        "item_id": "StockCode",
        "title": "Description",
        "attributes": {"UnitPrice": {"path": "UnitPrice", "type": "number"}},
    }


def orders(prices: Sequence[str]) -> list[dict[str, str]]:
    return [
        {
            "order": str(n),
            "sku": f"s{n % 5}",
            "title": f"Thing {n % 5}" if float(price) else "damaged",
            "price": price,
            "at": f"2010-12-01 08:{n:02}:00",
            "user": f"u{n % 7}",
        }
        for n, price in enumerate(prices)
    ]


def test_a_line_without_a_price_does_not_describe_an_item() -> None:
    """Corrections of the stock have a title such as "damaged"."""
    now_and_then = orders([f"{n % 5}.5" if n % 11 else "0.0" for n in range(50)])
    title = {"exists": True}
    rule = guessed(now_and_then)["items"]["rule"]
    assert rule == [{"where": {"title": title, "price": {"above": 0}}}]
    free = orders([f"{n % 5}.0" for n in range(50)])
    assert guessed(free)["items"]["rule"] == [{"where": {"title": title}}]


def test_files_without_names_are_read_by_their_values() -> None:
    rows = [{"column0": "1", "column1": f"00{n}", "column2": "9", "column3": S} for n in range(3)]
    clicks = guessed(rows)["clicks"]
    assert clicks["fields"]["item_id"] == "column1"
    assert clicks["kinds"] == {"9": "like"}
    rows = [{"column0": "1", "column1": "Heat (1995)", "column2": "Crime|Drama"}]
    assert guessed(rows)["items"]["fields"] == {
        "item_id": "column0",
        "title": "column1",
        "categories": {"path": "column2", "split": "|"},
    }


def test_nested_records_and_presets_are_left_to_the_guess_of_maps() -> None:
    rows = [{"user": {"id": "1"}, "sku": "2", "timestamp": 1577836800}] * 3
    assert guessed(rows)["clicks"]["fields"]["user_id"] == "user.id"
    rows = [{"messageId": "1", "userId": "2", "event": "Product Viewed"}] * 3
    assert guessed(rows)["clicks"] == {"preset": "segment"}


_names = st.text(alphabet='abid_."[]$^=\\ 7\x7f', max_size=6)
_cells = st.one_of(st.none(), st.text(max_size=6), st.sampled_from(["1", "0.5", S, "x|y", "1.0"]))


@given(st.lists(_names, min_size=1, max_size=5, unique=True), st.data())
def test_any_table_gives_a_map_or_one_sentence(names: list[str], data: st.DataObject) -> None:
    names = [name or "column0" for name in names]
    rows = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(names, _cells)), min_size=1))
    topic = data.draw(st.sampled_from(["", "clicks", "items", "users"]))
    try:
        guessed(rows, "data", topic)
    except SettingsError as error:
        assert "needs user_id" in str(error) or "needs item_id" in str(error)
