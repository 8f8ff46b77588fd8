"""Paths of a map."""

from __future__ import annotations

from typing import Any

import pytest

from eddyline.schema.mapping import paths
from eddyline.schema.mapping.paths import Scope, Source, compile_path

ROOT = {
    "a": {"b": 1, "c": [1, 2]},
    "d.e": 3,
    "l": [{"k": "x", "v": 7}, 5, {"k": "y", "v": 8}],
    "n": None,
}


def read(path: str, key: bytes | None = b'{"id":5}', root: Any = ROOT) -> Any:
    source = Source(key, [("ce_id", b"x"), ("bad", b"\xff"), ("none", None)])
    source.root = root
    outer = Scope(root, None, source)
    return compile_path(path)(Scope({"v": 9}, outer, source) if path.startswith("!") else outer)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a", ROOT["a"]),
        ("a.b", 1),
        ("a.c[1]", 2),
        ("a.c[2]", None),
        ('"d.e"', 3),
        ("l[k=y].v", 8),
        ("l[k=z].v", None),
        ("l[*].v", [7, 8]),
        ("l[*]", ROOT["l"]),
        ("a[*]", None),
        (".", ROOT),
        ("$", ROOT),
        ("$.a.b", 1),
        ("^.a", None),
        ("$key.id", 5),
        ("$key", {"id": 5}),
        ("$headers.ce_id", "x"),
        ("$headers.bad", None),
        ("$headers.none", None),
        ("$headers.nope", None),
        ("n", None),
        ("n.x", None),
        ("a.b.c", None),
    ],
)
def test_a_path_reads_what_it_names_or_nothing(path: str, expected: Any) -> None:
    assert read(path) == expected


def test_an_outer_element_is_reached() -> None:
    source = Source(None, ())
    root = Scope({"a": 1}, None, source)
    inner = Scope({"c": 3}, Scope({"b": 2}, root, source), source)
    found = [compile_path(path)(inner) for path in ("c", "^.b", "^^.a", "^^^.a", "^")]
    assert found == [3, 2, 1, None, {"b": 2}]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (None, None),
        (b"17", "17"),
        (b'"a"', "a"),
        (b"{bad", "{bad"),
        (b'{"schema":null,"payload":{"id":1}}', {"id": 1}),
        (b"\xff", "\udcff"),
    ],
)
def test_a_key_is_decoded_where_it_is_json(key: bytes | None, expected: Any) -> None:
    assert read("$key", key) == expected


@pytest.mark.parametrize(
    "path", ["", "a..b", "a[", "a[0]b", "$a", "^a", "$headers", "$headers.a.b", "a[x]", "a]", "a="]
)
def test_a_wrong_path_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        compile_path(path)


def test_the_length_of_a_path_is_limited() -> None:
    for depth in (paths.DEPTH_MAX - 1, paths.DEPTH_MAX):
        assert read(".".join("a" * depth)) is None
    with pytest.raises(ValueError, match="at most 16 parts"):
        compile_path(".".join("a" * (paths.DEPTH_MAX + 1)))
    for chars in (paths.CHARS_MAX - 1, paths.CHARS_MAX):
        assert read("a" * chars) is None
    with pytest.raises(ValueError, match="at most 500 characters"):
        compile_path("a" * (paths.CHARS_MAX + 1))
