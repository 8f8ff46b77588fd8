"""`eddyline map`: check a map on records of a file or a topic, and guess one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Column, Table

from cli.console import console, event_text, shortened
from eddyline.errors import EddylineError, Rejected, SettingsError
from eddyline.kafka import reading, topics
from eddyline.kafka.producers import now_ms
from eddyline.schema import validation
from eddyline.schema.mapping import check as checking
from eddyline.schema.mapping import envelopes
from eddyline.schema.mapping import guess as guessing
from eddyline.schema.mapping.check import Refusal, Report
from eddyline.schema.records import BuiltRecord, Record
from eddyline.settings.loader import Settings

# A line that is longer is no record that Kafka takes.
LINE_BYTES_MAX = 1024 * 1024
_CELL_CHARS_MAX = 700
_WHOLE = {"key", "value"}


def check(settings: Settings, source: str, *, topic: str, map_name: str, limit: int) -> None:
    """Print ten records with their events, and every refusal with its cure.

    source:   a file of JSON lines, or clicks, items or users
    map_name: a file or a preset; empty: that of the settings
    Raises EddylineError (exit code 1) if a record was refused, SettingsError.
    """
    of_topic = source in topics.SOURCES and not Path(source).exists()
    if of_topic:
        topic = source
    elif not topic:
        topic = guessing.topic_of([checking.decoded(one) for one in _of_file(source, "", limit)])
    _check_topic(topic)
    if map_name:
        settings = msgspec.structs.replace(settings, **{f"{topic}_map": map_name})
    if not getattr(settings, f"{topic}_map"):
        raise SettingsError(f"{topic}_map is not set: name a map with --map")
    validation.map_of(settings, topic)
    records = _of_topic(settings, topic, limit) if of_topic else _of_file(source, topic, limit)
    report = checking.check(records, lambda one: _read(settings, topic, one, of_topic))
    _show(report, topic)
    if report.refusals:
        refused = sum(one.count for one in report.refusals.values())
        raise EddylineError(f"{refused:,} of {report.records:,} records are refused")


def guess(source: str, *, topic: str, out: str) -> None:
    """Print a map for the records of a file, or write it to a new file. Raises SettingsError."""
    records = list(_of_file(source, topic, guessing.SAMPLE_MAX))
    found = [one for one in map(_decoded, records) if isinstance(one, dict | list)]
    if not found:
        raise SettingsError(f"{source}: no line is a JSON object")
    topic = topic or guessing.topic_of([checking.decoded(one) for one in records])
    _check_topic(topic)
    text = guessing.guess(found, topic)
    if not out:
        console.print(text, end="")
        return
    try:
        with Path(out).open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise SettingsError(f"{out}: {error.strerror}") from None
    console.print(f"written: {out}")
    console.print(f"then: eddyline map check {source} --topic {topic} --map {out}")


def _decoded(record: Record) -> Any:
    """The value, with its envelope; None if it is no JSON."""
    with suppress(Rejected):
        return None if record.value is None else envelopes.decoded(record.value)
    return None


def _check_topic(topic: str) -> None:
    if topic not in topics.SOURCES:
        raise SettingsError(f"--topic {topic!r}: expected one of {', '.join(topics.SOURCES)}")


def _of_file(source: str, topic: str, limit: int) -> Iterator[Record]:
    """The lines of a file as records; a JSON array is taken apart.

    A line with `key`, `value` and `headers` alone is a whole record, both as text.
    """
    try:
        with Path(source).open("rb") as file:
            first = file.readline(LINE_BYTES_MAX)
            lines: Iterator[bytes] = chain([first], file)
            if first.strip() in (b"[", b"{"):  # one value over several lines
                file.seek(0)
                lines = iter([file.read(64 * LINE_BYTES_MAX)])
            values = (value for line in lines if line.strip() for value in _values(line))
            for number, value in enumerate(islice(values, limit)):
                yield _as_record(value, topic, number)
    except OSError as error:
        raise SettingsError(f"{source}: {error.strerror}") from None


def _values(line: bytes) -> Iterator[bytes]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        yield line.strip()
        return
    if isinstance(found, list):
        yield from (json.dumps(one).encode() for one in found)
    else:
        yield json.dumps(found).encode() if b"\n" in line.strip() else line.strip()


def _as_record(value: bytes, topic: str, number: int) -> BuiltRecord:
    key, headers = None, []
    try:
        found = json.loads(value)
        if isinstance(found, dict) and found.keys() >= _WHOLE and _is_text(found["value"]):
            headers = [(str(n), str(v).encode()) for n, v in found.get("headers") or ()]
            key = None if found["key"] is None else str(found["key"]).encode()
            whole = found["value"]
            return BuiltRecord(
                topic, 0, number, now_ms(), key, None if whole is None else whole.encode(), headers
            )
    except (ValueError, TypeError, RecursionError):
        pass
    return BuiltRecord(topic, 0, number, now_ms(), key, value, headers)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _of_topic(settings: Settings, topic: str, limit: int) -> Iterator[Record]:
    """The newest records of a topic, some of each partition."""
    ends = topics.end_offsets(settings, topic)
    each = max(1, limit // max(1, len(ends)))
    starts = {partition: max(0, end - each) for partition, end in ends.items()}
    yield from islice(reading.read(settings, topic, starts, ends), limit)


def _read(settings: Settings, topic: str, record: Record, of_topic: bool) -> list[Any]:
    """The events of a record, as ingest reads them. Raises Rejected."""
    if of_topic:
        if topic == topics.CLICKS:
            return [event for _, event, _ in validation.user_events(settings, record)]
        if topic == topics.ITEMS:
            return [item or key for key, item, _ in validation.item_changes(settings, record)]
        return [user or key for key, user, _ in validation.profiles(settings, record)]
    own = validation.own_records(settings, topic, record)
    made = validation.unsent_record(settings, topic, record)
    return [
        (one.key or b"").decode() if event is None else event
        for one, (event, _) in zip(own, made, strict=True)
    ]


def _show(report: Report, topic: str) -> None:
    columns = (Column(name, overflow="fold") for name in ("record", "what ingest makes of it"))
    table = Table(*columns, show_lines=True)
    for record, made in report.shown:
        table.add_row(_record(record), _made(made))
    console.print(table)
    refused = sum(one.count for one in report.refusals.values())
    console.print(
        f"{topic}: {report.records:,} records, {report.events:,} events; "
        f"{report.ignored:,} ignored, {refused:,} refused"
    )
    for (reason, name), refusal in sorted(report.refusals.items(), key=lambda p: -p[1].count):
        _show_refusal(reason, name, refusal)


def _show_refusal(reason: str, name: str, refusal: Refusal) -> None:
    where = f"{reason}: {name}" if name else reason
    console.print(f"{refusal.count:,} × {where}: {refusal.detail}")
    console.print(f"    cure: {checking.cure(reason, name, refusal)}")


def _record(record: Record) -> str:
    value = record.value
    text = "(no value)" if value is None else value.decode("utf-8", "backslashreplace")
    if record.key is not None:
        text = f"{record.key.decode('utf-8', 'backslashreplace')} → {text}"
    return shortened(text, _CELL_CHARS_MAX)


def _made(made: list[Any] | Rejected) -> str:
    if isinstance(made, Rejected):
        return shortened(f"refused: {made}", _CELL_CHARS_MAX)
    if not made:
        return "(ignored)"
    return shortened("\n".join(map(_event, made)), _CELL_CHARS_MAX)


def _event(made: Any) -> str:
    return f"delete {made}" if isinstance(made, str) else event_text(made)
