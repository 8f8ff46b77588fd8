"""Exported files are imported as the same events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eddyline.errors import SettingsError
from eddyline.schema.events import Click, Item, UserProfile
from eddyline.settings.loader import Settings
from streams.importing import rows, writing
from streams.importing.files import open_file
from streams.importing.rows import FileMap, RowReader

EVENTS: dict[str, list[Any]] = {
    "clicks": [
        Click(user_id="007", item_id='a,"b"', at_ms=1_600_000_000_000, event_id="e1", weight=0.5),
        Click(
            user_id="ü",
            item_id="2",
            at_ms=1_600_000_000_001,
            kind="like",
            event_id="7",
            context={"dwell_ms": 5, "page": "1", "new": True},
            impression_id="i",
        ),
    ],
    "items": [
        Item(
            item_id="1",
            title='Line\nbreak, "quoted"',
            categories=["a|b", "c"],
            tags=["1"],
            attributes={"price": 1.5, "code": "007", "sold": True, "n": 3},
            available=False,
            at_ms=1_600_000_000_000,
            vector=[0.25, -1.0],
        ),
        Item(item_id="02"),
    ],
    "users": [UserProfile(user_id="1", attributes={"age": 30, "zip": "01234"})],
}
KINDS: dict[str, Any] = {"clicks": Click, "items": Item, "users": UserProfile}


def imported(path: Path, topic: str) -> list[Any]:
    file = open_file(path)
    sample = rows.sample(file)
    file_map = FileMap(rows.guess_map(file, sample), "guess")
    assert file_map.text == f'[{topic}]\npreset = "eddyline"\n'
    known = Settings(kafka_bootstrap_servers="k:1", redis_url="redis://r", item_vector_dimension=2)
    reader = RowReader(known, file, "d", topic, file_map)
    return [event for n, row in enumerate(file.rows()) for _, event in reader.events(n, row)]


@pytest.mark.parametrize("topic", ["clicks", "items", "users"])
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "csv.zst", "parquet"])
def test_what_is_exported_is_imported_again(tmp_path: Path, topic: str, ending: str) -> None:
    path = tmp_path / f"it's [1].{ending}"
    writing.write(path, KINDS[topic], EVENTS[topic])
    assert imported(path, topic) == EVENTS[topic]
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("topic", ["items", "users"])
def test_the_last_row_of_an_id_counts_in_any_spelling(tmp_path: Path, topic: str) -> None:
    field = "item_id" if topic == "items" else "user_id"
    spellings = ["é", "e\u0301", "b", "é "]
    lines = [json.dumps({field: one, "attributes": {"n": n}}) for n, one in enumerate(spellings)]
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    known = Settings(kafka_bootstrap_servers="k:1", redis_url="redis://r")
    reader = RowReader(known, open_file(path), "d", topic, FileMap("", ""))
    reader.keep_last()
    found = [e for n, row in enumerate(reader.file.rows()) for e in reader.events(n, row)]
    assert [(key, event.attributes) for key, event in found] == [("b", {"n": 2}), ("é", {"n": 3})]


@pytest.mark.parametrize("name", ["x", "x.txt", "x.parquet.gz", "x.gz"])
def test_other_endings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="expected a name that ends with"):
        writing.write(tmp_path / name, Item, EVENTS["items"])
    assert not list(tmp_path.iterdir())


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(SettingsError, match="exists already"):
        writing.write(path, Item, EVENTS["items"])
    with pytest.raises(SettingsError, match="No such file"):
        writing.write(tmp_path / "none" / "x.csv", Item, EVENTS["items"])
    assert path.read_text(encoding="utf-8") == "mine"


_text = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"), max_size=20
)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(_text, min_size=1, max_size=5), st.sampled_from(["csv", "parquet", "jsonl"]))
def test_any_title_and_attribute_stays_what_it_is(
    tmp_path: Path, texts: list[str], ending: str
) -> None:
    path = tmp_path / f"x.{ending}"
    path.unlink(missing_ok=True)
    items = [
        Item(item_id=f"i{n}", title=text, attributes={"text": text}) for n, text in enumerate(texts)
    ]
    writing.write(path, Item, items)
    assert imported(path, "items") == items
