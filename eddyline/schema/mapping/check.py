"""Check a map on a sample of records: what they become, what is refused, and what would cure it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from eddyline.errors import Rejected
from eddyline.schema.events import quote
from eddyline.schema.mapping import envelopes, guess
from eddyline.schema.mapping.paths import Source
from eddyline.schema.records import Record

# Records that are shown with their events.
SHOWN = 10
_PATHS_SHOWN = 8
_KINDS_SHOWN = 12

# What ingest makes of a record: its events. Raises Rejected.
Read = Callable[[Record], list[Any]]

ADVICE = {
    "malformed_json": "the records are no JSON: a map reads JSON only",
    "no_rule": 'add a [[rule]] whose `where` holds for these records, or otherwise = "ignore"',
    "no_value": "records without a value delete; in clicks there is nothing to delete",
    "too_early": 'set the unit of the time: format = "s"',
    "far_future": 'set the unit of the time: format = "us" or "ns"; or the zone',
    "wrong_partition": (
        'partition = "key", if the key alone decides on the partition; else let the producer use '
        "murmur2 and the id as key"
    ),
    "no_key": "the producer has to send a key: the item's or the user's id, or the primary key",
    "truncate": "delete rows with DELETE; let the connector skip truncates (skipped.operations=t)",
    "unavailable_value": "ALTER TABLE … REPLICA IDENTITY FULL, or take the field out of the map",
    "too_many_events": "let the producer send smaller records",
    "same_user": "where = { … = { unless = … } }: merge a visitor into another user only",
    "placeholder_id": 'leave such records out: where = { PATH = { unless = ["null", …] } }',
    "wrong_vector_length": "set item_vector_dimension, or take `vector` out of the map",
}


@dataclass(slots=True)
class Refusal:
    """Records refused for one reason. detail: of the first; records: some of them, decoded"""

    count: int = 0
    detail: str = ""
    records: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """The result. shown: (record, its events or the refusal); refusals: by (reason, field)"""

    records: int = 0
    events: int = 0
    ignored: int = 0
    shown: list[tuple[Record, list[Any] | Rejected]] = field(default_factory=list)
    refusals: dict[tuple[str, str], Refusal] = field(default_factory=dict)


def check(records: Iterable[Record], read: Read) -> Report:
    """Read every record. read: see `Read`"""
    report = Report()
    for record in records:
        report.records += 1
        made: list[Any] | Rejected
        try:
            made = read(record)
            report.events += len(made)
            report.ignored += not made
        except Rejected as rejected:
            made = rejected
            refusal = report.refusals.setdefault((made.reason, made.field), Refusal())
            refusal.detail = refusal.detail or made.detail
            refusal.count += 1
            if len(refusal.records) < guess.SAMPLE_MAX:
                refusal.records.append(decoded(record))
        if len(report.shown) < SHOWN:
            report.shown.append((record, made))
    return report


def cure(reason: str, name: str, refusal: Refusal) -> str:
    """What in the map would cure a refusal, by the refused records themselves."""
    if reason == "missing_field":
        found = guess.candidates(refusal.records, name) if name in guess.NAMES else []
        if found:
            first = found[0] if len(found) == 1 else f"first = {_texts(found[:3])}"
            return f"{name} = {{ {first} }}" if len(found) > 1 else f'{name} = "{found[0]}"'
        paths = list(guess.paths_of(refusal.records))[:_PATHS_SHOWN]
        return f"name another path for {name}; the records have {', '.join(paths) or 'no fields'}"
    if reason == "unknown_kind" or (reason, name) == ("bad_field", "kind"):
        return _kinds(refusal)
    if reason == "bad_field" and name == "at_ms":
        found = guess.candidates(refusal.records, name)
        for path in found:
            seen = guess.paths_of(refusal.records)[path]
            if format_ := guess.time_format(seen.values):
                return f'at_ms = {{ path = "{path}", format = "{format_}" }}'
        return f"{name}: set the format of the time, or another path"
    if reason == "bad_field":
        return f"{name or 'the record'}: name another path, or `type`, `map` or `default` for it"
    return ADVICE.get(reason, f"{name or 'the record'}: name another path")


def decoded(record: Record) -> Any:
    """The decoded value, in its envelope's data if it has one; None if it is no JSON."""
    if record.value is None:
        return None
    try:
        source = Source(record.key, record.headers)
        root = envelopes.decoded(record.value)
        of_debezium = isinstance(root, dict) and guess.preset_of([root]) == "debezium"
        if of_debezium:
            return envelopes.debezium(source, record.value)[1]
        return root
    except Rejected:
        return None


def _kinds(refusal: Refusal) -> str:
    """The kinds of the refused records that the map lacks."""
    seen = guess.paths_of(refusal.records)
    counts: Counter[str] = Counter()
    for path in guess.candidates(refusal.records, "kind"):
        counts = seen[path].texts
        if any(quote(kind) in refusal.detail for kind in counts):
            break
    pairs = ", ".join(
        f'{msgspec.json.encode(kind).decode()} = "{guess.kind_of(kind)}"'
        for kind, _ in counts.most_common(_KINDS_SHOWN)
    )
    listed = f"kinds = {{ {pairs} }}" if pairs else "list the kind in `kinds`"
    return f'{listed}, or other_kinds = "ignore"'


def _texts(found: list[str]) -> str:
    return msgspec.json.encode(found).decode()
