"""Editorial rules: what a file may say, when a rule holds, and how a changed file is read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.commands import rules as commands_rules
from eddyline.errors import EddylineError, SettingsError
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from index.filters import TEXT_VALUES_MAX
from serving.dependencies import start_retriever
from serving.rules import editorial
from serving.rules.answer_rules import AnswerRules
from serving.rules.editorial import (
    BOOSTS_NAMED_MAX,
    DENIED_ITEMS_MAX,
    DENIED_VALUES_MAX,
    FILE_BYTES_MAX,
    ITEMS_MAX,
    NO_RULES,
    PINS_BY_VALUE_MAX,
    POSITION_MAX,
    RULES_MAX,
    EditorialRules,
    Known,
    RulesRejected,
    parse,
)
from serving.rules.editorial_watch import RulesWatch
from tests.unit.serving.test_coordinator import LOG, SETTINGS, Mean

TEXTS = frozenset({"brand"})
KNOWN = Known(TEXTS, paths=("towers", "newest"))
NOON = datetime(2026, 12, 1, 12, tzinfo=UTC)
NOON_MS = int(NOON.timestamp() * 1000)


def rules(text: str) -> EditorialRules:
    return parse(f'version = "1"\n{text}'.encode(), KNOWN)


def refusal(text: str) -> str:
    with pytest.raises(RulesRejected) as failed:
        rules(text)
    return str(failed.value)


def test_the_example_of_the_docs_is_a_good_one() -> None:
    _, _, example = (editorial.__doc__ or "").partition("version:\n")
    found = parse(example.replace("\n    ", "\n").encode(), KNOWN)
    assert [(kind, rule.name) for kind, rule in found.rules] == [
        ("pin", "advent calendar"),
        ("boost", "own brand"),
        ("deny", "recall of November"),
    ]
    assert found.version == "2026-12-01"


def test_a_rule_holds_from_its_first_millisecond_to_its_last() -> None:
    found = rules(
        '[[deny]]\nname = "d"\nitems = ["a"]\n'
        "from = 2026-12-01T12:00:00Z\nuntil = 2026-12-01T13:00:00.001+01:00\n"
    )
    held = {at: bool(found.active(NOON_MS + at, "").denied_items) for at in (-1, 0, 1, 10**9)}
    assert held == {-1: False, 0: True, 1: False, 10**9: False}
    # A query of an earlier time may come after one of a later time.
    assert found.active(NOON_MS, "").denied_items == {"a": "d"}


def test_a_rule_of_a_scene_holds_there_alone() -> None:
    found = rules(
        '[[deny]]\nname = "all"\nitems = ["a", "b"]\n'
        '[[deny]]\nname = "home"\nitems = ["b", "c"]\nscene = "home"\n'
    )
    assert found.active(0, "home").denied_items == {"a": "all", "b": "all", "c": "home"}
    for scene in ("", "search", "x" * 64):
        assert found.active(0, scene).denied_items == {"a": "all", "b": "all"}


def test_boosts_of_several_rules_are_multiplied() -> None:
    found = rules(
        '[[boost]]\nname = "i"\nitems = ["a"]\nfactor = 2.0\n'
        '[[boost]]\nname = "v"\nattribute = "tags"\nvalues = ["x", "y"]\nfactor = 3.0\n'
    ).active(0, "")
    assert found.boost_of("a", {("tags", "x")}) == (6.0, ["i", "v"])
    assert found.boost_of("b", {("tags", "y"), ("tags", "x")}) == (3.0, ["v"])
    assert found.boost_of("b", {("categories", "x")}) == (1.0, [])


@pytest.mark.parametrize("count", [BOOSTS_NAMED_MAX, BOOSTS_NAMED_MAX + 1, 20])
def test_an_item_names_the_first_rules_that_boost_it(count: int) -> None:
    found = rules(many(count, lambda n: 'items = ["a"]\nfactor = 1.5', "boost")).active(0, "")
    factor, names = found.boost_of("a", ())
    assert factor == pytest.approx(1.5**count)
    assert names == [f"r{n}" for n in range(BOOSTS_NAMED_MAX)]


def test_ids_and_values_get_the_form_of_items() -> None:
    text = b'version = "1"\n[[deny]]\nname = "d"\nitems = [" a", "cafe\xcc\x81", "a"]\n'
    assert list(parse(text, Known()).active(0, "").denied_items) == ["a", "café"]
    assert len(parse(text, Known(id_form="as_is")).active(0, "").denied_items) == 3
    brand = b'version = "1"\n[[deny]]\nname = "d"\nattribute = "brand"\nvalues = [" Acme "]\n'
    assert list(parse(brand, Known(TEXTS, "as_is")).active(0, "").denied_terms) == [
        ("brand", "Acme")
    ]


def test_without_rules_nothing_is_held() -> None:
    assert EditorialRules().active(0, "") is NO_RULES
    assert rules("").active(0, "").version == "1"


PIN = '[[pin]]\nname = "p"\n'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[pin", "Expected "),
        ("x = 1", "Object contains unknown field `x`"),
        ('[[pin]]\nitems = ["a"]', "Object missing required field `name` - at `$.pin[0]`"),
        (PIN, "pin 'p': name either items, or an attribute and values"),
        (PIN + 'items = ["a"]\nvalues = ["b"]', "pin 'p': name either items, or"),
        (PIN + 'attribute = "tags"', "pin 'p': name either items, or"),
        (PIN + 'values = ["a"]', "pin 'p': name either items, or"),
        (PIN + 'items = [""]', "pin 'p': items: '' has 0 bytes, allowed: 1 … 256"),
        (PIN + 'items = ["a"]\nposition = 0', "Expected `int` >= 1 - at `$.pin[0].position`"),
        (PIN + f'items = ["a"]\nposition = {POSITION_MAX + 1}', "Expected `int` <= 1000"),
        (
            PIN + 'attribute = "color"\nvalues = ["a"]',
            "pin 'p': attribute: 'color', allowed are categories, tags, brand: the setting "
            "filter_texts names further ones",
        ),
        (PIN + 'items = ["a"]\nfrom = 2026-12-01T12:00:00', "pin 'p': from: 2026-12-01 12:00:00"),
        (PIN + 'items = ["a"]\nfrom = 2026-12-01', "Expected `datetime | null`"),
        (
            PIN + 'items = ["a"]\nfrom = 2026-12-01T12:00:00Z\nuntil = 2026-12-01T12:00:00Z',
            "pin 'p': until: 2026-12-01 12:00:00+00:00 is not after 2026-12-01 12:00:00+00:00",
        ),
        (PIN + 'items = ["a"]\n' + PIN + 'items = ["b"]', "pin 'p': another rule has the same"),
        (f'[[pin]]\nname = "{"x" * 65}"\nitems = ["a"]', "name of a pin: "),
        (PIN + f'items = ["a"]\nscene = "{"x" * 65}"', "pin 'p': scene: "),
        ('[[boost]]\nname = "b"\nitems = ["a"]', "Object missing required field `factor`"),
        ('[[boost]]\nname = "b"\nitems = ["a"]\nfactor = 0.0', "Expected `float` >= 0.01"),
        ('[[boost]]\nname = "b"\nitems = ["a"]\nfactor = 101.0', "Expected `float` <= 100.0"),
        ('[[boost]]\nname = "b"\nitems = ["a"]\nfactor = nan', "Expected `float` "),
    ],
)
def test_what_a_rule_may_not_be(text: str, why: str) -> None:
    assert refusal(text).startswith(why)


def listed(count: int, start: int = 0) -> str:
    return "[" + ", ".join(f'"i{n}"' for n in range(start, start + count)) + "]"


def many(count: int, rest: Callable[[int], str], kind: str = "deny") -> str:
    return "".join(f'[[{kind}]]\nname = "r{n}"\n{rest(n)}\n' for n in range(count))


LIMITS: dict[str, tuple[int, Callable[[int], str]]] = {
    f"{RULES_MAX} rules": (RULES_MAX, lambda n: many(n, lambda r: 'items = ["a"]', "pin")),
    "items of a rule": (ITEMS_MAX, lambda n: PIN + f"items = {listed(n)}"),
    "values of a rule": (
        TEXT_VALUES_MAX,
        lambda n: PIN + f'attribute = "tags"\nvalues = {listed(n)}',
    ),
    "pins by values": (
        PINS_BY_VALUE_MAX,
        lambda n: many(n, lambda r: 'attribute = "tags"\nvalues = ["a"]', "pin"),
    ),
    "items in the deny rules": (
        DENIED_ITEMS_MAX,
        lambda n: (
            many(n // 500, lambda r: f"items = {listed(500, 500 * r)}")
            + f'[[deny]]\nname = "last"\nitems = {listed(n % 500 + 1, DENIED_ITEMS_MAX - 1)}'
        ),
    ),
    "values in the deny rules": (
        DENIED_VALUES_MAX,
        lambda n: many(n, lambda r: f'attribute = "tags"\nvalues = ["t{r}"]'),
    ),
}


@pytest.mark.parametrize("what", LIMITS)
def test_the_lists_of_a_file_have_limits(what: str) -> None:
    most, made = LIMITS[what]
    for count in (most - 1, most):
        assert rules(made(count)).rules
    for count in (most + 1, 4 * most):
        assert "allowed are" in refusal(made(count))


def test_the_version_and_the_size_of_a_file_have_limits() -> None:
    for size, good in ((0, False), (1, True), (64, True), (65, False)):
        data = f'version = "{"v" * size}"'.encode()
        if good:
            assert parse(data, Known()).version == "v" * size
        else:
            with pytest.raises(RulesRejected, match="version: "):
                parse(data, Known())
    with pytest.raises(RulesRejected, match="required field `version`"):
        parse(b"", Known())
    head = b'version = "1"\n#'
    assert parse(head + b"x" * (FILE_BYTES_MAX - len(head)), Known()).version == "1"
    with pytest.raises(RulesRejected, match="more than 1,048,576 bytes"):
        parse(head + b"x" * (FILE_BYTES_MAX - len(head) + 1), Known())


@given(st.binary(max_size=80))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    try:
        assert parse(data, KNOWN).version
    except RulesRejected as error:
        assert str(error)


# ---------------------------------------------------------------- the file


def write(path: Path, text: str) -> None:
    """As an editor does: a new file in the place of the old one."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def test_a_changed_file_is_used_and_a_bad_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    write(path, 'version = "1"\n[[deny]]\nname = "d"\nitems = ["a"]')
    watch = RulesWatch(path, Known())
    current = watch.current
    assert current().active(0, "").denied_items == {"a": "d"}
    write(path, 'version = "2"\n[[deny]]\nname = "e"\nitems = ["b"]')
    watch.look()
    assert current().version == "2" and current().active(0, "").denied_items == {"b": "e"}
    write(path, 'version = "3"\n[[deny]]\nname = "e"')
    watch.look()
    assert current().version == "2"
    assert current.why.startswith(f"the rules of version '2' stay, {path}: deny 'e': name either")
    path.unlink()
    watch.look()
    assert "cannot be read: No such file" in current.why and current().version == "2"
    write(path, 'version = "4"')
    watch.look()
    assert (current().version, current.why, current().rules) == ("4", "", [])


def test_a_change_of_the_same_size_and_moment_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    write(path, 'version = "1"')
    watch = RulesWatch(path, Known())
    before = path.stat()
    write(path, 'version = "2"')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    watch.look()
    assert watch.current().version == "2"


def test_a_process_does_not_start_with_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"rules_file = '.*none.toml': it cannot be read"):
        RulesWatch(tmp_path / "none.toml", Known())


def test_a_worker_and_a_coordinator_follow_the_file_of_the_settings(tmp_path: Path) -> None:
    """Both are wired by `start_retriever`."""
    path = tmp_path / "rules.toml"
    write(path, 'version = "1"')
    settings = msgspec.structs.replace(SETTINGS, rules_file=str(path))

    def start(closing: ExitStack) -> AnswerRules:
        return start_retriever(
            settings, MemoryStore(), generation="g", tower=Mean(), clicks=LOG, closing=closing
        ).rules

    with ExitStack() as closing:
        found = start(closing)
        assert found.version == "1"
        write(path, 'version = "2"\n[[deny]]\nname = "d"\nitems = ["a"]')
        deadline = time.monotonic() + 10
        while found.version != "2":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert found.active(0, "").denied_items == {"a": "d"}
    path.unlink()
    with ExitStack() as closing, pytest.raises(SettingsError, match="rules_file = "):
        start(closing)


def test_the_command_shows_what_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands_rules.console, "width", 200)
    path = tmp_path / "rules.toml"
    path.write_text(
        'version = "7"\n[[pin]]\nname = "p"\nitems = ["a", "b", "c", "d"]\nposition = 2\n'
        "until = 2026-01-01T00:00:00Z\n"
        '[[boost]]\nname = "b"\nattribute = "tags"\nvalues = ["x"]\nfactor = 2.5\n'
        "from = 2999-01-01T00:00:00Z\n"
        '[[deny]]\nname = "d"\nitems = ["z"]\nscene = "home"\n',
        encoding="utf-8",
    )
    commands_rules.check(Settings(), path)
    printed = capsys.readouterr().out
    for part in ("pin to 2", "a, b, c and 1 more", "ended 2026", "boost × 2.5", "tags = x"):
        assert part in printed
    for part in ("from 2999", "deny", "home", "now", "version 7: 3 rules"):
        assert part in printed
    path.write_text("version = 7", encoding="utf-8")
    with pytest.raises(EddylineError, match=r"rules.toml: Expected `str`, got `int`"):
        commands_rules.check(Settings(), path)
    with pytest.raises(SettingsError, match="rules_file is not set"):
        commands_rules.check(Settings(), None)
