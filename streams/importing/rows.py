"""Rows of a file become events, by a map; the same row gives the same event ids each time."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from eddyline.errors import Rejected, SettingsError
from eddyline.kafka import topics
from eddyline.kafka.producers import now_ms
from eddyline.schema import item_changes, validation
from eddyline.schema.events import Click, Item, ItemPatch, Merge, UserProfile
from eddyline.schema.id_form import key_in_form
from eddyline.schema.mapping import mapper, spec
from eddyline.schema.mapping.guess import segment
from eddyline.schema.mapping.mapper import REPLAYED_FROM, Mapper
from eddyline.schema.records import BuiltRecord
from eddyline.settings.loader import Settings
from streams.importing import columns
from streams.importing.files import DataFile

Event = Click | Merge | Item | UserProfile
# An event and its key; None deletes the item or forgets the user of the key.
Keyed = tuple[str, Event | None]
# Ids of items of a table of events, to send each item once: about 100 bytes each.
LAST_ROWS_MAX = 5_000_000
_OWN = {topics.CLICKS: Click, topics.ITEMS: Item, topics.USERS: UserProfile}
# Fields of Eddyline's own format that are text; others are JSON, also in a cell.
TEXTS = frozenset(
    {"user_id", "item_id", "kind", "event_id", "impression_id", "title", "merge_into"}
)
_OWN_SAMPLE = 100


@dataclass(frozen=True, slots=True)
class FileMap:
    """The map of a file. text: of TOML, empty for Eddyline's own format; name: for messages"""

    text: str
    name: str

    def tables(self) -> list[str]:
        """The topics that the map is for. Raises SettingsError."""
        try:
            found = tomllib.loads(self.text)
        except tomllib.TOMLDecodeError as error:
            raise SettingsError(f"{self.name}: {error}") from None
        tables = [one for one in (topics.ITEMS, topics.USERS, topics.CLICKS) if one in found]
        for topic in tables:
            self.mapper(topic)
        return tables

    def mapper(self, topic: str) -> Mapper | None:
        """The compiled map of a topic; None for Eddyline's own format. Raises SettingsError."""
        if not self.text:
            return None
        found = spec.parse(self.text.encode(), topic, self.name)
        return None if found is None else mapper.compiled(found, topic, self.name)


class RowReader:
    """Rows of one file for one topic. Thread rule: one thread.

    topic: clicks, items or users
    last:  only the last accepted row of each id counts: a table of events that describes items
    """

    def __init__(
        self, settings: Settings, file: DataFile, digest: str, topic: str, file_map: FileMap
    ) -> None:
        """digest: of the file; with the row's number it is the event id. Raises SettingsError."""
        self.topic = topic
        self.file = file
        self.digest = digest
        self.last: Mapping[str, int] | None = None
        self._settings = settings
        self._mapper = file_map.mapper(topic)
        self._has_cells = file.layout.format in ("csv", "parquet")

    def events(self, number: int, row: bytes | None) -> list[Keyed]:
        """The events of a row, none where the map ignores it. Raises Rejected.

        number: of the row in the file, from 0
        """
        if row is None:
            raise Rejected("malformed_json", "", "the line is no JSON")
        own_id = f"import/{self.digest}/{number}"
        header = [(REPLAYED_FROM, own_id.encode())]
        record = BuiltRecord(self.topic, 0, number, now_ms(), None, row, header)
        if self._mapper is None:
            own_key, value = self._own(row, own_id)
            made: Sequence[Any] = (msgspec.structs.replace(record, key=own_key, value=value),)
        else:
            made = self._mapper.records(record)
        found: list[Keyed] = []
        for one in made:
            event, _ = validation.unsent(self._settings, self.topic, one.key, one.value)
            key = key_in_form(one.key, self._settings.id_form).decode()
            if self.last is not None and self.last.get(key) != number:
                continue
            if isinstance(event, ItemPatch):
                event = item_changes.patched(None, event)  # a row is a whole item
            if not (event is None or isinstance(event, Event)):
                raise Rejected("other_event", "", "a forget cannot be imported")
            found.append((key, event))
        return found

    def keep_last(self) -> None:
        """Read the whole file for the last accepted row of each id. Raises SettingsError."""
        last: dict[str, int] = {}
        for number, row in enumerate(self.file.rows()):
            try:
                for key, _ in self.events(number, row):
                    last[key] = number
            except Rejected:
                continue
            if len(last) > LAST_ROWS_MAX:
                raise SettingsError(
                    f"{self.file.path}: the events are of more than {LAST_ROWS_MAX:,} items: "
                    "import the items from a file of their own, and this one with --topic clicks"
                )
        self.last = last

    def _own(self, row: bytes, own_id: str) -> tuple[bytes, bytes]:
        """(key, value) of a row in Eddyline's own format. Raises Rejected."""
        record = _decoded(row)
        if not isinstance(record, dict):
            raise Rejected("malformed_json", "", "the row is no JSON object")
        fields = _cells(record) if self._has_cells else record
        if self.topic == topics.CLICKS:
            fields.setdefault("event_id", own_id)
        name = "item_id" if self.topic == topics.ITEMS else "user_id"
        if not isinstance(key := fields.get(name), str):
            raise Rejected("missing_field", name, "an id as text is needed")
        return key.encode(errors="replace"), msgspec.json.encode(fields)


def sample(file: DataFile) -> list[Any]:
    """The first rows of a file, decoded; without those that are no JSON."""
    rows = islice(file.rows(), columns.SAMPLE_ROWS)
    found = (None if row is None else _decoded(row) for row in rows)
    return [one for one in found if one is not None]


def guess_map(file: DataFile, records: Sequence[Any], topic: str = "") -> str:
    """The text of a map for a file. topic: empty to guess it too. Raises SettingsError."""
    if not records:
        raise SettingsError(f"{file.path}: no row can be read")
    if own := _own_topic(file, records, topic):
        return f'[{own}]\npreset = "eddyline"\n'
    stem = Path(file.path).name.partition(".")[0]
    return columns.guess_map(records, stem, topic)


def topics_of(file_map: FileMap, records: Sequence[Any]) -> list[str]:
    """The topics of a map whose fields the rows have. Raises SettingsError."""
    tables = file_map.tables()
    if len(tables) == 1:
        return tables
    names = {name for record in records if isinstance(record, dict) for name in record}
    found = []
    for topic in tables:
        one = spec.parse(file_map.text.encode(), topic, file_map.name)
        if one is None or _paths(one) <= {segment(name) for name in names}:
            found.append(topic)
    if not found:
        raise SettingsError(f"{file_map.name}: no table of the map fits the columns")
    return found


def taken_for(file_map: FileMap, topic: str, records: Sequence[Any]) -> list[tuple[str, str, str]]:
    """(column, a value, what it was taken for) of every column of the sample."""
    one = spec.parse(file_map.text.encode(), topic, file_map.name) if file_map.text else None
    found = []
    for record_name in dict.fromkeys(n for r in records if isinstance(r, dict) for n in r):
        values = (r.get(record_name) for r in records if isinstance(r, dict))
        value = next((str(v) for v in values if v not in (None, "", [])), "")
        what = record_name if one is None else _taken(one, segment(record_name))
        found.append((record_name, value[:40], what))
    return found


def _taken(topic_map: spec.TopicMap, path: str) -> str:
    found = []
    for rule in (topic_map.fields, *topic_map.rule):
        for name in rule.__struct_fields__:
            value = getattr(rule, name)
            if name in ("attributes", "context"):
                found += [f"{name[:-1]} {key}" for key, one in value.items() if _names(one, path)]
            elif name == "where":
                found += ["a condition"] * (path in value)
            elif isinstance(value, str | spec.Field) and _names(value, path):
                found.append(name)
        every = rule.attributes_from
        if not found and every is not None and path not in every.leave_out:
            found.append(f"attribute {path}")
    return ", ".join(dict.fromkeys(found))


def _names(value: str | spec.Field, path: str) -> bool:
    if isinstance(value, str):
        return value == path
    return path in (value.path, *(value.first or ()), *(value.join or ()))


def _paths(topic_map: spec.TopicMap) -> set[str]:
    """The plain columns that the fields of a map name."""
    fields = (getattr(topic_map.fields, name) for name in ("user_id", "item_id", "title", "at_ms"))
    paths = {one if isinstance(one, str) else one.path for one in fields if one is not None}
    return {one for one in paths if one and "$" not in one and "^" not in one}


def _own_topic(file: DataFile, records: Sequence[Any], topic: str) -> str:
    """The topic whose own format most rows have, empty for none."""
    first = [one for one in records[:_OWN_SAMPLE] if isinstance(one, dict)]
    for name, kind in _OWN.items():
        fields = set(kind.__struct_fields__)
        if topic not in ("", name) or not first or not all(one.keys() <= fields for one in first):
            continue
        if sum(_is_own(file, one, kind) for one in first) * 2 > len(first):
            return name
    return ""


def _is_own(file: DataFile, record: dict[str, Any], kind: Any) -> bool:
    try:
        msgspec.convert(
            _cells(record) if file.layout.format in ("csv", "parquet") else record, kind
        )
    except (msgspec.ValidationError, Rejected):
        return False
    return True


def _cells(record: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a row of CSV or Parquet as the values of an event. Raises Rejected."""
    found: dict[str, Any] = {}
    for name, cell in record.items():
        if cell is None:
            continue
        if name in TEXTS or not isinstance(cell, str):
            found[name] = cell
            continue
        try:
            found[name] = msgspec.json.decode(cell)
        except (msgspec.DecodeError, UnicodeError):
            raise Rejected("bad_field", name, "the cell is no JSON") from None
    return found


def _decoded(row: bytes) -> Any:
    try:
        return json.loads(row)
    except (ValueError, RecursionError):
        return None
