"""The maps in `examples/maps` read the data sets that they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pytest

from eddyline.settings.loader import Settings
from streams.importing.files import open_file
from streams.importing.rows import FileMap, RowReader

MAPS = Path(__file__).parents[3] / "examples" / "maps"
GENRES = "|".join(["0", "1", "0"] + ["0"] * 16)
# (map, topic, two lines of a file, what the first row becomes)
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    (
        "movielens",
        "clicks",
        "userId,movieId,rating,timestamp\n1,3,4.0,964981247\n1,4,1.5,964981248\n",
        {"user_id": "1", "item_id": "3", "kind": "like", "at_ms": 964981247000},
    ),
    (
        "movielens",
        "items",
        'movieId,title,genres\n11,"American President, The (1995)",Comedy|Drama\n2,B,War\n',
        {"title": "American President, The (1995)", "categories": ["Comedy", "Drama"]},
    ),
    (
        "movielens-1m",
        "clicks",
        "1::1193::5::978300760\n1::661::3::978302109\n",
        {"user_id": "1", "item_id": "1193", "kind": "like", "at_ms": 978300760000},
    ),
    (
        "movielens-1m",
        "items",
        "1::Toy Story (1995)::Animation|Children's|Comedy\n2::Jumanji (1995)::Fantasy\n",
        {"item_id": "1", "categories": ["Animation", "Children's", "Comedy"]},
    ),
    (
        "movielens-1m",
        "users",
        "1::F::1::10::48067\n2::M::56::16::70072\n",
        {"attributes": {"gender": "F", "age": 1, "occupation": "10", "zip": "48067"}},
    ),
    (
        "movielens-100k",
        "clicks",
        "196\t242\t3\t881250949\n186\t302\t1\t891717742\n",
        {"user_id": "196", "item_id": "242", "kind": "click", "at_ms": 881250949000},
    ),
    (
        "movielens-100k",
        "items",
        f"1|Les Misérables (1995)|01-Jan-1995||http://x|{GENRES}\n"
        f"2|GoldenEye (1995)|01-Jan-1995||http://x|{GENRES}\n",
        {"item_id": "1", "title": "Les Misérables (1995)"},
    ),
    (
        "movielens-100k",
        "users",
        "1|24|M|technician|85711\n2|53|F|other|94043\n",
        {"attributes": {"age": 24, "gender": "M", "occupation": "technician", "zip": "85711"}},
    ),
    (
        "movietweetings",
        "clicks",
        "1::0054890::9::1381945744\n2::1408101::10::1382400295\n",
        {"user_id": "1", "item_id": "0054890", "kind": "like", "at_ms": 1381945744000},
    ),
    (
        "movietweetings",
        "items",
        "0000008::Edison Kinetoscopic Record of a Sneeze (1894)::Documentary|Short\n1::A::War\n",
        {"item_id": "0000008", "categories": ["Documentary", "Short"]},
    ),
    (
        "online-retail",
        "clicks",
        "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
        "536365,85123A,HOLDER,6,2010-12-01 08:26:00,2.55,17850.0,United Kingdom\n",
        {"user_id": "17850", "kind": "purchase", "at_ms": 1291191960000},
    ),
    (
        "online-retail",
        "items",
        "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
        "536365,85123A,HOLDER,6,12/1/2010 8:26,2.55,17850,United Kingdom\n",
        {"item_id": "85123A", "title": "HOLDER", "attributes": {"price": 2.55}},
    ),
    (
        "retailrocket",
        "clicks",
        "timestamp,visitorid,event,itemid,transactionid\n1433221332117,257597,addtocart,355908,\n",
        {"user_id": "257597", "item_id": "355908", "kind": "cart", "at_ms": 1433221332117},
    ),
    (
        "retailrocket-items",
        "items",
        "itemid,timestamp,categoryid,available\n460429,1435460400000,1338,0\n",
        {"categories": ["1338"], "available": False, "at_ms": 1435460400000},
    ),
    (
        "yoochoose-clicks",
        "clicks",
        "1,2014-04-07T10:51:09.277Z,214536502,0\n1,2014-04-07T10:54:09.868Z,214536500,0\n",
        {"user_id": "1", "item_id": "214536502", "kind": "click", "at_ms": 1396867869277},
    ),
    (
        "yoochoose-buys",
        "clicks",
        "420374,2014-04-06T18:44:58.314Z,214537888,12462,1\n4,2014-04-06T18:44:58.325Z,2,10,1\n",
        {"user_id": "420374", "item_id": "214537888", "kind": "purchase"},
    ),
    (
        "amazon-2018",
        "clicks",
        '{"overall": 5.0, "reviewerID": "A1", "asin": "0151004714", "unixReviewTime": 937612800}\n',
        {"user_id": "A1", "item_id": "0151004714", "kind": "like", "at_ms": 937612800000},
    ),
    (
        "amazon-2018",
        "items",
        '{"asin": "0151004714", "title": "A", "category": ["Books", "Art"], "price": "$2.40"}\n',
        {"categories": ["Books", "Art"], "attributes": {"price": "$2.40"}},
    ),
    (
        "amazon-2023",
        "clicks",
        '{"rating": 1.0, "user_id": "AG", "parent_asin": "B0", "timestamp": 1588687728923}\n',
        {"user_id": "AG", "item_id": "B0", "kind": "dislike", "at_ms": 1588687728923},
    ),
    (
        "amazon-2023",
        "items",
        '{"parent_asin": "B0", "title": "A", "categories": ["X"], "main_category": "Beauty",'
        ' "price": 9.5, "store": "S"}\n',
        {"categories": ["X"], "tags": ["Beauty"], "attributes": {"store": "S", "price": 9.5}},
    ),
]


@pytest.mark.parametrize(
    ("name", "topic", "text", "expected"), CASES, ids=[f"{n}-{t}" for n, t, *_ in CASES]
)
def test_a_map_reads_its_data_set(
    tmp_path: Path, name: str, topic: str, text: str, expected: dict[str, Any]
) -> None:
    path = tmp_path / "f"
    encoding = "latin-1" if name == "movielens-100k" else "utf-8"
    path.write_text(text, encoding=encoding)
    no_header = False if name.startswith("yoochoose") else None
    file = open_file(path, header=no_header)
    file_map = FileMap((MAPS / f"{name}.toml").read_text(encoding="utf-8"), name)
    known = Settings(kafka_bootstrap_servers="k:1", redis_url="redis://r")
    reader = RowReader(known, file, "d", topic, file_map)
    ((_, event),) = reader.events(0, next(file.rows()))
    found = msgspec.to_builtins(event)
    assert {name: found[name] for name in expected} == expected


def test_properties_of_items_become_their_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = "timestamp,itemid,property,value\n"
    parts = [
        "200,7,available,0\n100,7,categoryid,1338\n100,7,790,n32880.000\n300,7,categoryid,9\n",
        "50,8,available,1\n200,7,888,n1 n2\n1000,7,available,1\n",
    ]
    for number, part in enumerate(parts):
        (tmp_path / f"item_properties_part{number + 1}.csv").write_text(
            header + part, encoding="utf-8"
        )
    monkeypatch.chdir(tmp_path)
    duckdb.sql((MAPS / "retailrocket-items.sql").read_text(encoding="utf-8"))
    states = duckdb.sql("SELECT itemid, timestamp, categoryid, available FROM 'items.parquet'")
    assert states.fetchall() == [
        ("8", "50", None, "1"),
        ("7", "100", "1338", "1"),
        ("7", "200", "1338", "0"),
        ("7", "300", "9", "0"),
        ("7", "1000", "9", "1"),
    ]
    file = open_file(tmp_path / "items.parquet")
    name = "retailrocket-items"
    file_map = FileMap((MAPS / f"{name}.toml").read_text(encoding="utf-8"), name)
    known = Settings(kafka_bootstrap_servers="k:1", redis_url="redis://r", at_ms_min=0)
    reader = RowReader(known, file, "d", "items", file_map)
    found = [
        event for number, row in enumerate(file.rows()) for _, event in reader.events(number, row)
    ]
    assert [(item.categories, item.available) for item in found] == [
        ([], True),
        (["1338"], True),
        (["1338"], False),
        (["9"], False),
        (["9"], True),
    ]


def test_every_map_is_tested() -> None:
    tested = {(name, topic) for name, topic, *_ in CASES}
    for path in MAPS.glob("*.toml"):
        for topic in FileMap(path.read_text(encoding="utf-8"), path.name).tables():
            assert (path.stem, topic) in tested
