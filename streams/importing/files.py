"""Rows of CSV, TSV, JSON lines and Parquet files as JSON records, read by DuckDB.

The content says what a file is, not its name. Cells of CSV files stay text: `007` is no number.
Reads in batches within a fixed amount of memory, in the order of the file. DuckDB may open this
one file alone: no network, no extensions, no other path.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from eddyline.errors import EddylineError, SettingsError

MEMORY_MB = 256
BATCH_ROWS = 2_048
# Lines that are looked at to find the format, and characters of one of them.
HEAD_LINES = 1_000
_LINE_CHARS_MAX = 1_000_000
COLUMNS_MAX = 1_000
# Refused lines that are kept in memory, with their text; further ones are not counted.
REJECTS_MAX = 100_000
DELIMITERS = (",", "\t", ";", "|", "::")
_LINE_FORMAT = "\x1f"
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}

Format = Literal["csv", "json", "array", "parquet"]


class UnreadableFile(EddylineError):
    """A file that cannot be read, with the reason."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a file is read.

    names:     of the columns of a CSV file; `column0`, … without header
    strict:    False if the file breaks the rules of CSV; then surplus cells are dropped
    """

    format: Format
    compression: str = "none"
    encoding: str = "utf-8"
    delimiter: str = ","
    quote: str = '"'
    has_header: bool = True
    names: Sequence[str] = ()
    strict: bool = True


@dataclass(frozen=True, slots=True)
class RejectedLine:
    """A line that is no row. reason: in snake case"""

    number: int
    reason: str
    text: str


@dataclass
class DataFile:
    """A file and its layout. Thread rule: one thread.

    total:    rows and refused lines, about
    rejected: lines that are no rows, of the last complete read
    """

    path: Path
    layout: Layout
    size: tuple[int, int]
    total: int = 0
    rejected: list[RejectedLine] = field(default_factory=list)

    def rows(self, skip: int = 0) -> Generator[bytes | None]:
        """The rows from number `skip` on, as JSON; None for a line of a JSON file that is no JSON.

        Raises UnreadableFile, also if the file changed since it was opened.
        """
        self.rejected = []
        with _reading(self.path) as connection:
            query, parameters = _query(self)
            found = connection.execute(query, parameters)
            number = 0
            while batch := found.fetchmany(BATCH_ROWS):
                number += len(batch)
                if number <= skip:
                    continue
                for (row,) in batch[max(0, skip - number + len(batch)) :]:
                    yield None if row is None else row.encode()
            if self.layout.format == "csv":
                self.rejected = _rejected(connection)
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raise UnreadableFile if the file was written to since it was opened."""
        if _size(self.path) != self.size:
            raise UnreadableFile(f"{self.path}: the file changed while it was read")

    def digest(self) -> str:
        """SHA-256 of the file, the first 128 bits in hex. Raises UnreadableFile."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:32]
        except OSError as error:
            raise UnreadableFile(f"{self.path}: {error.strerror}") from None


def open_file(path: Path, *, delimiter: str = "", header: bool | None = None) -> DataFile:
    """Find out how a file is read.

    delimiter, header: of a CSV file; empty and None: found by its first lines
    Raises SettingsError for an option, UnreadableFile.
    """
    if delimiter and not (0 < len(delimiter.encode()) <= 4 and delimiter.isprintable()):
        if delimiter not in ("\t", "\\t"):
            raise SettingsError(f"--delimiter {delimiter!r}: expected 1 to 4 printable characters")
        delimiter = "\t"
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        size = _size(path)
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror}") from None
    compression = next((name for start, name in _MAGIC.items() if magic.startswith(start)), "none")
    if magic == b"PAR1":
        found = DataFile(path, Layout("parquet"), size)
    else:
        lines, encoding = _head(path, compression)
        layout = _layout(lines, compression, encoding, delimiter, header)
        found = DataFile(path, layout, size)
    if found.layout.format == "csv" and not found.layout.names:
        raise UnreadableFile(f"{path}: the file is empty")
    return _counted(found)


def to_parquet(lines: Path, columns: Mapping[str, str]) -> Path:
    """A Parquet file beside a file of JSON lines. columns: name → type of DuckDB"""
    out = lines.with_name(f"{lines.name}.parquet")
    types = ", ".join(f"'{name}': '{kind}'" for name, kind in columns.items())
    with _reading(lines, out) as connection:
        query = f"FROM read_json(?, columns={{{types}}}, format='newline_delimited')"
        target = str(out.absolute()).replace("'", "''")
        connection.execute(f"COPY ({query}) TO '{target}' (FORMAT parquet)", [_escaped(lines)])
    return out


@contextmanager
def _reading(path: Path, *others: Path) -> Iterator[Any]:
    """A connection of DuckDB that may open these files alone; translates its errors."""
    try:
        import duckdb
    except ImportError:
        raise SettingsError(
            "files are read by DuckDB, which is missing: install eddyline[import]"
        ) from None
    try:
        with duckdb.connect(
            config={
                "memory_limit": f"{MEMORY_MB}MB",
                "threads": 1,
                "temp_directory": "",
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            }
        ) as connection:
            names = [form(one) for one in (path, *others) for form in (_absolute, _escaped)]
            connection.execute("SET allowed_paths = ?", [names])
            connection.execute("SET enable_external_access = false")
            connection.execute("SET TimeZone = 'UTC'")
            yield connection
    except duckdb.Error as error:
        first = next(iter(str(error).strip().splitlines()), "unknown error")
        raise UnreadableFile(f"{path}: {first[:300]}") from None


def _absolute(path: Path) -> str:
    return str(path.absolute())


def _escaped(path: Path) -> str:
    """The name for DuckDB, to which `*`, `?` and `[` are patterns."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in str(path.absolute()))


def _size(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _query(file: DataFile) -> tuple[str, list[Any]]:
    """(SQL, its parameters): one JSON text for each row."""
    name, layout = _escaped(file.path), file.layout
    if layout.format == "parquet":
        pairs, parameters = _parquet_columns(file.path)
        return f"SELECT json_object({pairs}) FROM read_parquet(?)", [*parameters, name]
    if layout.format != "csv":
        kind = "array" if layout.format == "array" else "newline_delimited"
        return (
            f"SELECT json FROM read_json_objects(?, format='{kind}', compression=?,"
            f" ignore_errors={kind != 'array'}, hive_partitioning=false)",
            [name, layout.compression],
        )
    cells = ", ".join(f"?, c{n}" for n in range(len(layout.names)))
    source, parameters = _csv(name, layout)
    return f"SELECT json_object({cells}) FROM {source}", [*layout.names, *parameters]


def _csv(name: str, layout: Layout) -> tuple[str, list[Any]]:
    columns = ", ".join(f"'c{n}': 'VARCHAR'" for n in range(len(layout.names)))
    source = (
        f"read_csv(?, columns={{{columns}}}, auto_detect=false, delim=?, quote=?, escape=?,"
        f" header={layout.has_header}, encoding=?, compression=?, strict_mode={layout.strict},"
        " ignore_errors=true, store_rejects=true, hive_partitioning=false,"
        f" rejects_limit={REJECTS_MAX})"
    )
    quote = layout.quote
    return source, [name, layout.delimiter, quote, quote, layout.encoding, layout.compression]


def _parquet_columns(path: Path) -> tuple[str, list[Any]]:
    """Names and values for json_object. NaN and infinity, which JSON lacks, become null."""
    with _reading(path) as connection:
        found = connection.execute("DESCRIBE FROM read_parquet(?)", [_escaped(path)]).fetchall()
    if len(found) > COLUMNS_MAX:
        raise UnreadableFile(f"{path}: has {len(found):,} columns, more than {COLUMNS_MAX:,}")
    cells = []
    for name, kind, *_ in found:
        column = '"' + name.replace('"', '""') + '"'
        real = kind in ("DOUBLE", "FLOAT")
        cells.append(f"CASE WHEN isfinite({column}) THEN {column} END" if real else column)
    return ", ".join(f"?, {cell}" for cell in cells), [name for name, *_ in found]


def _rejected(connection: Any) -> list[RejectedLine]:
    found = connection.execute(
        "SELECT line, min(error_type), min(csv_line) FROM reject_errors GROUP BY line ORDER BY line"
    )
    return [
        RejectedLine(number, str(reason).lower().replace(" ", "_"), (text or "").strip())
        for number, reason, text in found.fetchall()
    ]


def _head(path: Path, compression: str) -> tuple[list[str], str]:
    """(the first lines, their encoding)."""
    for encoding in ("utf-8", "latin-1"):
        layout = Layout("csv", compression, encoding, _LINE_FORMAT, "", False, ("line",), False)
        source, parameters = _csv(_escaped(path), layout)
        with _reading(path) as connection:
            query = f"SELECT left(c0, {_LINE_CHARS_MAX}) FROM {source} LIMIT {HEAD_LINES}"
            lines = [one or "" for (one,) in connection.execute(query, parameters).fetchall()]
            reasons = {one.reason for one in _rejected(connection)}
        if "invalid_encoding" not in reasons:
            break
    return lines, encoding


def _layout(
    lines: list[str], compression: str, encoding: str, delimiter: str, header: bool | None
) -> Layout:
    if lines:
        lines[0] = lines[0].removeprefix("\ufeff")
    start = next((line.lstrip() for line in lines if line.strip()), "")
    if not delimiter and start.startswith(("{", "[")) and encoding == "utf-8":
        if start.startswith("{"):
            return Layout("json", compression)
        if start.rstrip() == "[" or start[1:].lstrip().startswith("{"):
            return Layout("array", compression)
    delimiter, quote, rows = _dialect(lines, delimiter)
    width = Counter(len(row) for row in rows).most_common(1)[0][0] if rows else 0
    if width > COLUMNS_MAX:
        raise UnreadableFile(f"the file has {width:,} columns, more than {COLUMNS_MAX:,}")
    first = rows[0] if rows else []
    has_header = _is_header(rows, width) if header is None else header
    names = first if has_header else []
    names = [one.strip() for one in names[:width]] + [""] * (width - len(names))
    unique: list[str] = []
    for number, name in enumerate(names):
        unique.append(name if name and name not in unique else f"column{number}")
    return Layout("csv", compression, encoding, delimiter, quote, has_header, unique)


def _dialect(lines: Sequence[str], delimiter: str) -> tuple[str, str, list[list[str]]]:
    """(delimiter, quote, rows): those by which most of the first lines have equal widths."""
    best: tuple[tuple[float, ...], str, str, list[list[str]]] | None = None
    for candidate in [delimiter] if delimiter else DELIMITERS:
        for quote in ('"', "") if len(candidate) == 1 else ("",):
            rows = _split(lines, candidate, quote)
            widths = Counter(len(row) for row in rows)
            width, count = widths.most_common(1)[0] if widths else (0, 0)
            equal = count / len(rows) if rows else 0.0
            # A separator of several characters is no accident; a quote that changes nothing stays.
            score = (width > 1, round(equal, 1), len(candidate), -len(widths), width)
            if best is None or score > best[0]:
                best = (score, candidate, quote, rows)
    assert best is not None
    return best[1:]


def _split(lines: Sequence[str], delimiter: str, quote: str) -> list[list[str]]:
    lines = [line for line in lines if line]
    if not quote or len(delimiter) > 1:
        return [line.split(delimiter) for line in lines]
    rows = csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter, quotechar=quote)
    found: list[list[str]] = []
    try:
        found.extend(rows)
    except csv.Error:  # a cell that is too long: the rows before it will do
        pass
    return found


def _is_header(rows: Sequence[Sequence[str]], width: int) -> bool:
    """Whether the first row has names: distinct texts that are no numbers, as no data row is."""
    first = [cell.strip() for cell in rows[0]] if rows else []
    names = [cell for cell in first if cell]
    if not names or len(first) != width or len(set(names)) < len(names):
        return False
    if any(_is_number(cell) or len(cell) > 100 for cell in names):
        return False
    rest = rows[1:50]
    has_numbers = any(_is_number(cell) for row in rest for cell in row)
    plain = all(cell.replace("_", "").replace(" ", "").replace("-", "").isalnum() for cell in names)
    return has_numbers or plain or not rest


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _counted(file: DataFile) -> DataFile:
    """The file with its number of rows; not `strict` if DuckDB cannot read it so."""
    if file.layout.format != "csv":
        with _reading(file.path) as connection:
            query, parameters = _query(file)
            query = f"SELECT count(*) FROM ({query})"
            file.total = connection.execute(query, parameters).fetchone()[0]
        return file
    for layout in (file.layout, replace(file.layout, strict=False)):
        file.layout = layout
        try:
            with _reading(file.path) as connection:
                query, parameters = _query(file)
                query = f"SELECT count(r) FROM ({query}) AS q(r)"
                file.total = connection.execute(query, parameters).fetchone()[0]
            return file
        except UnreadableFile:
            if not layout.strict:
                raise
    return file
