"""`eddyline import`: files into Kafka, after a look at what their columns were taken for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from cli.console import console, event_text, progress_bar, shortened
from eddyline.errors import EddylineError, Rejected, SettingsError
from eddyline.kafka import topics
from eddyline.schema.mapping import check as checking
from eddyline.schema.mapping import guess, spec
from eddyline.schema.mapping.check import Refusal
from eddyline.settings.loader import Settings
from streams.importing import files, rows, sending
from streams.importing.files import DataFile
from streams.importing.rows import FileMap, RowReader

# Rows that are looked at before anything is sent; `--dry-run` looks at all.
PREVIEW_ROWS = 20_000
_SHOWN = 10
_CELL_CHARS_MAX = 300
_EXAMPLES = 3
# Items first: clicks on items that are not known yet would wait.
_ORDER = (topics.ITEMS, topics.USERS, topics.CLICKS)


@dataclass(frozen=True)
class Options:
    """Options of the command. map_name, topic, delimiter: empty to find them out."""

    map_name: str = ""
    topic: str = ""
    delimiter: str = ""
    header: bool | None = None
    dry_run: bool = False
    refused: Path | None = None


@dataclass
class Plan:
    """A file and what it is imported as. sample: its first rows, decoded."""

    file: DataFile
    file_map: FileMap
    topics: list[str]
    sample: list[Any]


@dataclass
class Seen:
    """What a look at the rows found. shown: (row number, its events)"""

    rows: int = 0
    events: int = 0
    ignored: int = 0
    shown: list[tuple[int, Any]] = field(default_factory=list)
    refusals: dict[tuple[str, str], Refusal] = field(default_factory=dict)
    where: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def refuse(self, at: str, row: bytes | None, why: Rejected) -> None:
        """Count a refusal. at: where it is, for a person; row: None for a line that is no row"""
        key = (why.reason, why.field)
        refusal = self.refusals.setdefault(key, Refusal())
        refusal.count += 1
        refusal.detail = refusal.detail or why.detail
        places = self.where.setdefault(key, [])
        if len(places) < _EXAMPLES:
            places.append(at)
        if row is not None and len(refusal.records) < 100:
            try:
                refusal.records.append(json.loads(row))
            except (ValueError, RecursionError):
                pass


def import_files(
    settings: Callable[[], Settings],
    offline: Settings,
    paths: list[Path],
    options: Options,
    confirm: Callable[[str], object] | None,
) -> None:
    """Show what the files are taken for, ask, and send them: items first, clicks last.

    settings: with Kafka's address, called only if something is sent; offline: as loaded
    confirm:  asks a question, and does not return if the answer is no; None: do not ask
    Raises EddylineError (exit code 1) if nothing can be imported, SettingsError.
    """
    plans = [plan(path, options) for path in paths]
    with_digests = [(one, one.file.digest()) for one in plans]
    imports = [
        (one, RowReader(offline, one.file, digest, topic, one.file_map))
        for topic in _ORDER
        for one, digest in with_digests
        if topic in one.topics
    ]
    refused = _refused_files(options.refused, [reader for _, reader in imports])
    events = 0
    if options.dry_run or confirm is not None:
        for plan_, reader in imports:
            seen = look(reader, all_rows=options.dry_run)
            show(plan_, reader, seen)
            events += seen.events
        if not events:
            raise EddylineError("no row becomes an event: correct the map, and look again")
    if options.dry_run:
        return
    if confirm is not None:
        confirm("Import this?")
    found = settings()
    topics.ensure_topics(found, [topics.CLICKS, topics.ITEMS, topics.USERS])
    for (plan_, reader), refused_file in zip(imports, refused, strict=True):
        reader = RowReader(found, reader.file, reader.digest, reader.topic, plan_.file_map)
        send(found, reader, plan_, refused_file)


def plan(path: Path, options: Options) -> Plan:
    """Open a file, and find or guess its map. Raises UnreadableFile, SettingsError."""
    if options.topic not in ("", *topics.SOURCES):
        raise SettingsError(
            f"--topic {options.topic!r}: expected one of {', '.join(topics.SOURCES)}"
        )
    file = files.open_file(path, delimiter=options.delimiter, header=options.header)
    sample = rows.sample(file)
    file_map = _map(file, sample, options)
    if not options.topic:
        return Plan(file, file_map, rows.topics_of(file_map, sample), sample)
    if options.topic not in file_map.tables():
        raise SettingsError(f"{file_map.name}: has no table [{options.topic}]")
    return Plan(file, file_map, [options.topic], sample)


def look(reader: RowReader, *, all_rows: bool) -> Seen:
    """Map the first rows, or all, without sending anything."""
    seen = Seen()
    with closing(reader.file.rows()) as found:
        some = found if all_rows else islice(found, PREVIEW_ROWS)
        for number, row in enumerate(some):
            seen.rows += 1
            try:
                made = reader.events(number, row)
            except Rejected as why:
                seen.refuse(f"row {number + 1}", row, why)
                continue
            seen.events += len(made)
            seen.ignored += not made
            if made and len(seen.shown) < _SHOWN:
                seen.shown.append((number, made))
    for line in reader.file.rejected if all_rows or seen.rows < PREVIEW_ROWS else ():
        seen.refuse(f"line {line.number}", None, Rejected(line.reason, "", line.text[:80]))
    return seen


def show(plan_: Plan, reader: RowReader, seen: Seen) -> None:
    """Print what each column was taken for, the first events, and the refusals."""
    layout = reader.file.layout
    how = f"{layout.format}, {reader.file.total:,} rows"
    if layout.format == "csv":
        header = "header" if layout.has_header else "no header"
        how += f", separated by {layout.delimiter!r}, {header}, {layout.encoding}"
    path = str(reader.file.path)
    console.print(Text.assemble("\n", (path, "bold"), f" → {reader.topic} ({how})"))
    table = Table("column", "for example", "taken for", box=None, pad_edge=False)
    taken = rows.taken_for(plan_.file_map, reader.topic, plan_.sample)
    for column, example, what in taken:
        table.add_row(column, example, what or Text("nothing", "dim"))
    console.print(table)
    columns = (Column("row"), Column("becomes", overflow="fold"))
    table = Table(*columns, box=None, pad_edge=False)
    for number, made in seen.shown:
        table.add_row(str(number + 1), "\n".join(_event(*one) for one in made))
    console.print(table)
    scope = "" if seen.rows >= reader.file.total else f"first {seen.rows:,} "
    console.print(
        f"{scope}rows: {seen.rows:,}; {seen.events:,} events, {seen.ignored:,} ignored, "
        f"{sum(one.count for one in seen.refusals.values()):,} refused"
    )
    show_refusals(seen)
    if reader.topic == topics.CLICKS and not any("at_ms" in what for *_, what in taken):
        console.print("no column is a time: all events happen now")
    if _is_described(plan_, reader.topic):
        console.print(f"of the {reader.topic}, the last row of each is sent")
    console.print(f"map: {plan_.file_map.name}")


def show_refusals(seen: Seen) -> None:
    """Print the refusals by reason, the first rows of each, and the cure."""
    for key, refusal in sorted(seen.refusals.items(), key=lambda pair: -pair[1].count):
        reason, name = key
        where = ", ".join(seen.where[key])
        of = f"{reason}: {name}" if name else reason
        console.print(f"{refusal.count:,} × {of} ({where}, …): {refusal.detail}")
        if refusal.records:
            console.print(f"    cure: {checking.cure(reason, name, refusal)}")


def send(settings: Settings, reader: RowReader, plan_: Plan, refused_file: Path | None) -> None:
    """Send one file into one topic. Raises as `sending.send_file`; the same command resumes."""
    file, seen = reader.file, Seen()
    if _is_described(plan_, reader.topic):
        console.print(f"{file.path}: looking for the last row of each of the {reader.topic}")
        reader.keep_last()
    started = time.monotonic()
    with progress_bar(console) as progress:
        task = progress.add_task(f"{file.path.name} → {reader.topic}", total=file.total)
        base: list[int] = []

        def report(done: int, sent: int, refused: int) -> None:
            base[:] = base or [sent]
            rate = (sent - base[0]) / max(0.001, time.monotonic() - started)
            text = f"{file.path.name} → {reader.topic}, {rate:,.0f} events/s"
            progress.update(task, completed=done, description=text)

        result = sending.send_file(
            settings,
            reader,
            refused_file=refused_file,
            on_progress=report,
            on_refused=lambda number, row, why: seen.refuse(
                f"row {number + 1}" if number >= 0 else why.field,
                row,
                why if number >= 0 else Rejected(why.reason, "", why.detail),
            ),
        )
    name = settings.prefixed(reader.topic)
    if result.was_done:
        console.print(f"{file.path}: was imported into {name} before; nothing was sent")
        return
    resumed = f", resumed at row {result.resumed_at + 1:,}" if result.resumed_at else ""
    console.print(
        f"{file.path}: {result.rows:,} rows, {result.sent:,} events into {name}, "
        f"{result.refused:,} refused, in {result.took_s:.1f} s{resumed}"
    )
    show_refusals(seen)


def _refused_files(path: Path | None, readers: Sequence[RowReader]) -> list[Path | None]:
    """The file of refused rows of each reader; with several, it has the data file and the topic.

    Raises SettingsError if two have one name.
    """
    if path is None or len(readers) == 1:
        return [path] * len(readers)
    found = [
        path.with_name(f"{path.stem}.{one.file.path.name}.{one.topic}{path.suffix}")
        for one in readers
    ]
    if len(set(found)) < len(found):
        raise SettingsError(f"--refused {path}: two files have one name: import them one by one")
    return [*found]


def _map(file: DataFile, sample: list[Any], options: Options) -> FileMap:
    """The named map; that beside the file; else a guessed one, which is written there."""
    beside = file.path.with_name(f"{file.path.name}.map.toml")
    named = Path(options.map_name) if options.map_name else beside
    if options.map_name in spec.PRESETS:
        topic = options.topic or guess.topic_of(sample)
        return FileMap(f'[{topic}]\npreset = "{options.map_name}"\n', f"preset {named}")
    if options.map_name or beside.exists():
        try:
            raw = named.read_bytes()
            return FileMap(raw.decode(), str(named))
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{named}: {getattr(error, 'strerror', error)}") from None
    text = rows.guess_map(file, sample, options.topic)
    try:
        with beside.open("x", encoding="utf-8") as out:
            out.write(text)
    except OSError as error:
        console.print(f"the guessed map cannot be kept as {beside}: {error.strerror}. It is:")
        console.print(text)
    return FileMap(text, str(beside))


def _is_described(plan_: Plan, topic: str) -> bool:
    """Whether the rows are events, which describe an item or a user each time."""
    return topics.CLICKS in plan_.topics and topic != topics.CLICKS


def _event(key: str, event: Any) -> str:
    return shortened(f"delete {key}" if event is None else event_text(event), _CELL_CHARS_MAX)
