"""`eddyline map`: what a map makes of a sample, what would cure it, and a first guess."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.commands import replay_file, send
from cli.main import app
from eddyline.errors import EddylineError, SettingsError
from eddyline.schema.mapping import check as checking
from eddyline.schema.mapping import guess, mapper, spec
from eddyline.schema.mapping.check import Refusal
from eddyline.settings.loader import Settings
from streams.operations import resync

GOLDEN = Path(__file__).parents[2] / "golden" / "feeds"
VIEWS = [
    {"visitorid": n, "event": kind, "itemid": n * 7, "timestamp": 1_433_221_332_117 + n}
    for n, kind in enumerate(["view", "addtocart", "transaction"] * 3)
]


def lines(folder: Path, *records: Any) -> str:
    file = folder / "sample.jsonl"
    text = (one if isinstance(one, str) else json.dumps(one) for one in records)
    file.write_text("\n".join(text) + "\n", encoding="utf-8")
    return str(file)


def run(*words: str, error: type[EddylineError] | None = None) -> tuple[str, str]:
    """(what was printed on one long line, the error)"""
    result = CliRunner().invoke(app, ["map", *words])
    if error is None:
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output, ""
    assert isinstance(result.exception, error), (result.output, result.exception)
    return result.output, str(result.exception)


def test_a_guessed_map_reads_the_sample_that_it_was_guessed_from(tmp_path: Path) -> None:
    sample, out = lines(tmp_path, *VIEWS), str(tmp_path / "map.toml")
    printed, _ = run("guess", sample, "--out", out)
    assert f"then: eddyline map check {sample} --topic clicks --map {out}" in printed
    table = tomllib.loads(Path(out).read_text(encoding="utf-8"))["clicks"]
    assert table["kinds"] == {"view": "view", "addtocart": "cart", "transaction": "purchase"}
    assert table["fields"]["at_ms"] == {"path": "timestamp", "format": "ms"}
    printed, _ = run("check", sample, "--map", out)
    assert "clicks: 9 records, 9 events; 0 ignored, 0 refused" in printed
    assert '{"user_id": "1", "item_id": "7", "at_ms": 1433221332118, "kind": "cart"' in printed
    _, message = run("guess", sample, "--out", out, error=SettingsError)
    assert "File exists" in message


def test_each_refusal_is_counted_with_what_would_cure_it(tmp_path: Path) -> None:
    map_ = tmp_path / "map.toml"
    map_.write_text(
        '[clicks]\nkinds = { view = "view" }\n[clicks.fields]\nuser_id = "user"\n'
        'item_id = "itemid"\nkind = "event"\nat_ms = { path = "timestamp", format = "iso" }\n',
        encoding="utf-8",
    )
    known = {"user": 1, "event": "view", "itemid": 3}
    odd = [{"user": 1, "event": "addtocart", "itemid": 3}] * 2
    sample = lines(
        tmp_path,
        *odd,
        {"visitorid": 1, "event": "view", "itemid": 3},
        known | {"timestamp": 1_433_221_332},
        known | {"timestamp": "1970-01-02"},
        "nope",
        known,
    )
    printed, message = run(
        "check", sample, "--map", str(map_), "--topic", "clicks", error=EddylineError
    )
    assert message == "6 of 7 records are refused"
    assert "2 × unknown_kind: kind" in printed
    assert 'cure: kinds = { "addtocart" = "cart" }, or other_kinds = "ignore"' in printed
    assert 'cure: user_id = "visitorid"' in printed
    assert 'cure: at_ms = { path = "timestamp", format = "s" }' in printed
    assert 'cure: set the unit of the time: format = "s"' in printed
    assert "a map reads JSON only" in printed


def test_digits_are_a_day_or_a_code_where_they_look_so(tmp_path: Path) -> None:
    day = {"user": "1", "sku": "2", "date": "20200131"}
    printed, _ = run("guess", lines(tmp_path, day, day))
    assert tomllib.loads(printed)["clicks"]["fields"]["at_ms"] == {
        "path": "date",
        "format": "%Y%m%d",
    }
    item = {"sku": "2", "title": "x", "code": "007", "price": "0.50"}
    printed, _ = run("guess", lines(tmp_path, item, item))
    assert tomllib.loads(printed)["items"]["fields"]["attributes"] == {
        "price": {"path": "price", "type": "number"}
    }


def test_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    map_ = tmp_path / "map.toml"
    map_.write_text(
        '[clicks]\nfields = { user_id = "user", item_id = "item" }\n'
        '[[clicks.rule]]\nwhere = { seen = "yes" }\n',
        encoding="utf-8",
    )
    odd, good = {"user": "[bold]a", "item": "[/]"}, {"user": "[u]b", "item": "c", "seen": "yes"}
    words = ("check", lines(tmp_path, odd, good), "--topic", "clicks", "--map", str(map_))
    printed, _ = run(*words, error=EddylineError)
    assert json.dumps(odd) in printed and '"user_id": "[u]b"' in printed
    assert "cure: add a [[rule]] whose" in printed


def test_the_kinds_that_a_map_lacks_are_listed(tmp_path: Path) -> None:
    map_ = tmp_path / "map.toml"
    map_.write_text(
        '[clicks]\nfields = { user_id = "visitorid", item_id = "itemid", kind = "event" }\n',
        encoding="utf-8",
    )
    words = ("check", lines(tmp_path, *VIEWS), "--map", str(map_))
    printed, message = run(*words, error=EddylineError)
    assert message == "6 of 9 records are refused"
    assert 'cure: kinds = { "addtocart" = "cart", "transaction" = "purchase" }' in printed


def test_records_are_read_whole_from_arrays_and_over_several_lines(tmp_path: Path) -> None:
    [binary] = [
        one
        for line in (GOLDEN / "cloudevents.jsonl").read_text(encoding="utf-8").splitlines()
        if (one := json.loads(line))["name"] == "cloudevents-binary"
    ]
    whole = {name: binary[name] for name in ("key", "value", "headers")}
    printed, _ = run("check", lines(tmp_path, whole), "--topic", "clicks", "--map", "cloudevents")
    assert "1 records, 1 events" in printed and "visitor-204" in printed
    for text in (json.dumps(VIEWS), json.dumps(VIEWS, indent=1)):
        printed, _ = run("guess", lines(tmp_path, text))
        assert 'user_id = "visitorid"' in printed
    printed, _ = run("guess", lines(tmp_path, json.dumps(VIEWS[0], indent=1)), "--topic", "clicks")
    assert 'item_id = "itemid"' in printed


@pytest.mark.parametrize("preset", [one for one in spec.PRESETS if one != "eddyline"])
def test_a_preset_is_recognised_by_its_records(preset: str, tmp_path: Path) -> None:
    text = (GOLDEN / f"{preset}.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    values = [one["value"] for one in found if one["value"] is not None]
    if preset in ("debezium", "cloudevents"):  # the others of them have lost their envelope
        values = [one for one in values if '"op"' in one or "specversion" in one]
    printed, _ = run("guess", lines(tmp_path, *values), "--topic", found[0]["topic"])
    assert f'preset = "{preset}"' in printed


def test_orders_items_and_users_are_guessed(tmp_path: Path) -> None:
    orders = [
        {"customer": {"id": n}, "created_at": "2026-03-01T09:00:00Z", "lines": [{"sku": "a"}]}
        for n in range(3)
    ]
    items = [
        {"id": n, "name": "Oak", "price": "20.90", "stock": 3, "category": "x", "a b": 1}
        for n in range(3)
    ]
    users = [{"user": {"id": n}, "country": "AT"} for n in range(3)]
    expected: list[tuple[Any, str, Any]] = [
        (orders, "clicks", {"user_id": "0", "item_id": "a", "at_ms": 1_772_355_600_000}),
        (
            items,
            "items",
            {
                "item_id": "0",
                "title": "Oak",
                "categories": ["x"],
                "available": True,
                "attributes": {"price": 20.9, "a b": 1},
            },
        ),
        (users, "users", {"user_id": "0", "attributes": {"country": "AT"}}),
    ]
    for records, topic, event in expected:
        assert guess.topic_of(records) == topic
        text = guess.guess(records, topic)
        found = spec.parse(text.encode(), topic, "guessed")
        assert found is not None
        [record] = list(_records(lines(tmp_path, records[0])))
        [one] = mapper.compiled(found, topic, "guessed").records(record)
        assert json.loads(one.value or b"").items() >= event.items()


def _records(file: str) -> Any:
    from cli.commands import maps

    return maps._of_file(file, "t", 10)


def test_whatever_is_sampled_a_guess_is_toml() -> None:
    odd = [{'a"b\\.c': 1, "\x7f\n": "x", "event": '"]\n', "é": [1], "": 2, "user": None}, 5, [], {}]
    for topic in spec.TOPICS:
        assert topic in tomllib.loads(guess.guess(odd, topic))
        assert topic in tomllib.loads(guess.guess([], topic))


@pytest.mark.parametrize("reason", [*checking.ADVICE, "id_too_long", "bad_field", "missing_field"])
def test_every_refusal_has_a_cure(reason: str) -> None:
    assert len(checking.cure(reason, "item_id", Refusal(1, "it", [None]))) > 10


def test_wrong_words_are_named(tmp_path: Path) -> None:
    sample = lines(tmp_path, *VIEWS)
    _, message = run("check", sample, "--topic", "orders", "--map", "ga4", error=SettingsError)
    assert "--topic 'orders': expected one of clicks, items, users" in message
    _, message = run("check", sample, error=SettingsError)
    assert "clicks_map is not set: name a map with --map" in message
    _, message = run("check", str(tmp_path / "gone"), "--map", "ga4", error=SettingsError)
    assert "No such file" in message
    _, message = run("guess", lines(tmp_path, "nope"), error=SettingsError)
    assert "no line is a JSON object" in message


def test_items_are_only_written_by_the_producer_whose_key_counts(tmp_path: Path) -> None:
    settings = Settings(items_map="debezium")
    for call in (
        lambda: send.delete_item(settings, "1"),
        lambda: send.item(
            settings, "1", title="", categories=[], tags=[], attributes=[], available=True
        ),
        lambda: replay_file.replay_file(
            settings, tmp_path / "items", speed=0, topic="items", shift_to_now=False
        ),
        lambda: resync.run(settings),
    ):
        with pytest.raises(SettingsError, match="items_map = 'debezium'"):
            call()
