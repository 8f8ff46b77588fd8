"""Files as rows: formats, compressions, dialects, limits, and any text at all."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streams.importing import files
from streams.importing.files import UnreadableFile, open_file

ROWS = [
    {"user": "u1", "item": "007", "note": 'a "b", c'},
    {"user": "u2", "item": "8", "note": "two\nlines"},
    {"user": "ü3", "item": "9", "note": None},
]
CSV = 'user,item,note\nu1,007,"a ""b"", c"\nu2,8,"two\nlines"\nü3,9,\n'


def written(folder: Path, content: str | bytes, name: str = "f.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, **options: Any) -> list[Any]:
    rows = list(open_file(path, **options).rows())
    return [None if row is None else json.loads(row) for row in rows]


def parquet(path: Path, query: str) -> Path:
    duckdb.sql(f"COPY ({query}) TO '{path}' (FORMAT parquet)")
    return path


def compressed(path: Path, kind: str) -> Path:
    """The file, compressed, under a name that says nothing."""
    out = path.with_name(f"{path.name}-{kind}")
    if kind == "gzip":
        out.write_bytes(gzip.compress(path.read_bytes()))
    else:
        out.write_bytes(path.read_bytes())
    return out


@pytest.mark.parametrize("kind", ["none", "gzip"])
@pytest.mark.parametrize(
    "text",
    [
        CSV,
        CSV.replace("\n", "\r\n").replace("two\r\nlines", "two\nlines"),
        "\ufeff" + CSV,
        "".join(json.dumps(row) + "\n" for row in ROWS),
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
    ],
    ids=["csv", "crlf", "bom", "lines", "array", "indented"],
)
def test_the_content_says_how_a_file_is_read(tmp_path: Path, text: str, kind: str) -> None:
    assert read(compressed(written(tmp_path, text), kind)) == ROWS


def test_zstd_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    duckdb.sql(
        f"COPY (SELECT 'u' || i AS user, i AS item FROM range(5000) r(i)) "
        f"TO '{path}' (FORMAT csv, COMPRESSION zstd)"
    )
    found = read(path)
    assert len(found) == 5_000 and found[-1] == {"user": "u4999", "item": "4999"}


@pytest.mark.parametrize("separator", [",", "\t", ";", "|", "::"])
@pytest.mark.parametrize("has_header", [True, False])
def test_the_separator_and_the_header_are_found(
    tmp_path: Path, separator: str, has_header: bool
) -> None:
    lines = [["u", "i", "t"]] * has_header + [["1", "x y", "4.5"], ["2", "z", "3"]]
    path = written(tmp_path, "".join(separator.join(line) + "\n" for line in lines))
    file = open_file(path)
    assert (file.layout.delimiter, file.layout.has_header) == (separator, has_header)
    names = ["u", "i", "t"] if has_header else ["column0", "column1", "column2"]
    assert read(path)[0] == dict(zip(names, ["1", "x y", "4.5"], strict=True))


def test_the_separator_and_the_header_can_be_named(tmp_path: Path) -> None:
    path = written(tmp_path, "a~b\nc~d\n")
    assert read(path, delimiter="~", header=False)[0] == {"column0": "a", "column1": "b"}
    with pytest.raises(files.SettingsError, match="--delimiter"):
        open_file(path, delimiter="12345")


def test_latin_1_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "id,title\n1,Fräulein\n".encode("latin-1"))
    assert read(path) == [{"id": "1", "title": "Fräulein"}]


def test_equal_names_of_columns_are_kept_apart(tmp_path: Path) -> None:
    found = read(written(tmp_path, "id,Id,id,\n1,2,3,4\n"), header=True)
    assert found == [{"id": "1", "Id": "2", "column2": "3", "column3": "4"}]


def test_lines_that_are_no_rows_are_counted_with_their_numbers(tmp_path: Path) -> None:
    file = open_file(written(tmp_path, "a,b\n1,2\n3\n4,5,6\n7,8\n"))
    found = [json.loads(row or b"") for row in file.rows()]
    assert found == [{"a": "1", "b": "2"}, {"a": "7", "b": "8"}]
    assert [(one.number, one.reason, one.text) for one in file.rejected] == [
        (3, "missing_columns", "3"),
        (4, "too_many_columns", "4,5,6"),
    ]


def test_a_line_that_is_no_json_is_none(tmp_path: Path) -> None:
    assert read(written(tmp_path, '{"a":1}\nnot json\n{"a":2}\n')) == [{"a": 1}, None, {"a": 2}]


def test_parquet_types_become_json(tmp_path: Path) -> None:
    query = (
        "SELECT 'nan'::DOUBLE AS d, 1.5::DECIMAL(5,2) AS p, TIMESTAMP '2020-01-02 03:04:05' AS t,"
        " TIMESTAMPTZ '2020-01-02 03:04:05+02' AS z, ['a', 'b'] AS l, 7::BIGINT AS \"q\"\"x\""
    )
    found = read(parquet(tmp_path / "f", query))[0]
    assert found == {
        "d": None,
        "p": 1.5,
        "t": "2020-01-02 03:04:05",
        "z": "2020-01-02 01:04:05+00",
        "l": ["a", "b"],
        'q"x': 7,
    }


@pytest.mark.parametrize("count", [files.BATCH_ROWS - 1, files.BATCH_ROWS, files.BATCH_ROWS + 1])
def test_rows_keep_their_order_and_can_be_skipped(tmp_path: Path, count: int) -> None:
    file = open_file(written(tmp_path, "n,m\n" + "".join(f"{n},0\n" for n in range(count))))
    every = list(file.rows())
    assert [json.loads(row or b"")["n"] for row in every] == [str(n) for n in range(count)]
    for skip in (0, 1, count - 1, count, count + 1, files.BATCH_ROWS):
        assert list(file.rows(skip)) == every[skip:]


@pytest.mark.parametrize("count", [files.COLUMNS_MAX - 1, files.COLUMNS_MAX])
def test_columns_up_to_the_limit_are_read(tmp_path: Path, count: int) -> None:
    names = [f"c{n}" for n in range(count)]
    text = ",".join(names) + "\n" + ",".join("1" * count) + "\n"
    assert read(written(tmp_path, text)) == [dict.fromkeys(names, "1")]


def test_more_columns_are_refused(tmp_path: Path) -> None:
    text = ",".join(f"c{n}" for n in range(files.COLUMNS_MAX + 1)) + "\n"
    with pytest.raises(UnreadableFile, match="1,001 columns"):
        open_file(written(tmp_path, text))


@pytest.mark.parametrize("name", ["a[1]*.csv", "it's.csv", "a'); DROP TABLE x;--.csv", "a=b.csv"])
def test_a_file_name_is_neither_sql_nor_a_pattern(tmp_path: Path, name: str) -> None:
    written(tmp_path, "x,y\n9,9\n", "a1b.csv")
    assert read(written(tmp_path, "u,i\n1,2\n", name)) == [{"u": "1", "i": "2"}]


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path, "u,i\n1,2\n")
    file = open_file(path)
    written(tmp_path, "u,i\n1,2\n3,4\n")
    os.utime(path, ns=(1, 1))
    with pytest.raises(UnreadableFile, match="changed"):
        list(file.rows())


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"PAR1 no parquet", b"\x1f\x8bno gzip", b"\x28\xb5\x2f\xfdno"]
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, content)
    with pytest.raises(UnreadableFile) as caught:
        open_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UnreadableFile, match="No such file"):
        open_file(tmp_path / "none.csv")
    with pytest.raises(UnreadableFile, match="Is a directory"):
        open_file(tmp_path)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(alphabet='ab1,;|\t"\n\r {}[]:\x00é', max_size=120).map(str.encode),
    )
)
def test_any_file_gives_rows_or_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, content)
    try:
        file = open_file(path)
        rows = list(file.rows())
    except UnreadableFile:
        return
    assert rows == list(file.rows())
    assert all(row is None or json.loads(row) is not NotImplemented for row in rows)
