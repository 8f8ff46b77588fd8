"""The format of a map: a TOML file with a table for each topic that it is for.

    [clicks]
    preset = "segment"          # what is not said here comes from the preset
    [clicks.fields]             # for every rule
    user_id = { first = ["userId", "anonymousId"] }
    [[clicks.rule]]             # the first rule whose `where` holds makes the events
    where = { event = "Order Completed" }
    each = "properties.products"
    item_id = "product_id"

docs/feeds/maps.md describes every key. Nothing of a map is executed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from eddyline.errors import SettingsError
from eddyline.schema.events import WEIGHT_MAX
from eddyline.schema.mapping import envelopes
from eddyline.schema.mapping.values import Kind

TOPICS = ("clicks", "items", "users")
PRESETS = ("cloudevents", "debezium", "eddyline", "ga4", "gorse", "metarank", "segment", "snowplow")
# A larger file is no map.
MAP_BYTES_MAX = 64 * 1024
RULES_MAX = 32
NAMES_MAX = 64
EACH_MAX = 4
# Events of one record: 48 records of a partition are one write to Redis.
EVENTS_MAX = 256

Scalar = str | int | float | bool
Text = Annotated[str, Meta(min_length=1, max_length=500)]
Texts = Annotated[list[Text], Meta(min_length=1, max_length=NAMES_MAX)]


class Field(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a value comes from (exactly one of path, first, join, const), and what is done to it.

    first:  the first of these paths that has a value; join: all of them, with `sep` between
    last:   the part after the last of this separator; split: a text becomes a list
    map:    text → value; above: whether the number is above this
    negate: the opposite truth value
    format: of a time: s, ms, us, ns, iso, rfc2822 or a format of strptime
    """

    path: Text | None = None
    first: Texts | None = None
    join: Texts | None = None
    sep: str = "/"
    const: Scalar | None = None
    type: Kind | None = None
    last: Text | None = None
    split: Text | None = None
    map: dict[str, Scalar] | None = None
    above: float | None = None
    negate: bool = False
    default: Scalar | None = None
    format: Text | Texts | None = None
    zone: Text = "UTC"


class Condition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a value must be: all that is said here holds."""

    exists: bool | None = None
    unless: Scalar | list[Scalar] | None = None
    above: float | None = None


class AttributesFrom(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Attributes under the names that the record has for them.

    path:        an object; or a list of objects, each with `name` and `value`; or a list of texts,
                 `split` between name and value
    leave_out:   names that are not taken
    nested:      objects in it are left out, or their fields are taken as `outer.inner`
    """

    path: Text = "."
    name: Text | None = None
    value: Text | None = None
    split: Text | None = None
    leave_out: list[str] = []
    nested: Literal["omit", "flatten"] = "omit"


class KindWeight(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of events, and the weight of an event of it."""

    kind: Text
    weight: Annotated[float, Meta(gt=0, le=WEIGHT_MAX)] = 1.0


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What becomes of the records for which `where` holds.

    make: event, merge (clicks), item (items), profile (users), delete (items, users) or ignore
    each: paths of lists, one in the other: one event for each element
    The others are the fields of Eddyline's events.
    """

    make: Literal["event", "merge", "item", "profile", "delete", "ignore"] | None = None
    where: dict[str, Scalar | list[Scalar] | Condition] = {}
    each: Text | Annotated[list[Text], Meta(max_length=EACH_MAX)] = []
    user_id: Text | Field | None = None
    item_id: Text | Field | None = None
    merge_into: Text | Field | None = None
    at_ms: Text | Field | None = None
    kind: Text | Field | None = None
    weight: Text | Field | None = None
    event_id: Text | Field | None = None
    impression_id: Text | Field | None = None
    context: dict[str, Text | Field] = {}
    title: Text | Field | None = None
    categories: Text | Field | None = None
    tags: Text | Field | None = None
    available: Text | Field | None = None
    vector: Text | Field | None = None
    attributes: dict[str, Text | Field] = {}
    attributes_from: AttributesFrom | None = None


class TopicMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The map of one topic.

    encoding:    of keys and values: JSON, or a schema id and then what the registry says
    nulls:       texts that mean null
    each:        the value is a list of records, or the list at this path is
    otherwise:   what becomes of a record for which no rule holds
    partition:   of an item: by its id as everywhere, or by the record's key as its producer sends
                 it
    patches:     items alone: absent fields keep their last accepted value, null removes one
    kinds:       own kind → Eddyline's, "ignore" for none; other_kinds: for those that are not
                 listed
    """

    preset: str = ""
    encoding: Literal["json", "registry"] = "json"
    envelope: envelopes.Name = "json"
    nulls: list[str] = []
    each: Text | None = None
    otherwise: Literal["refuse", "ignore"] = "refuse"
    partition: Literal["id", "key"] = "id"
    patches: bool = False
    kinds: dict[str, str | KindWeight] = {}
    other_kinds: str = "refuse"
    fields: Rule = Rule()
    rule: Annotated[list[Rule], Meta(max_length=RULES_MAX)] = []


def read(source: str, topic: str) -> TopicMap | None:
    """The map of a topic from a file, or from the preset of this name; None for Eddyline's own.

    Raises SettingsError, which names file and key.
    """
    if source == "eddyline":
        return None
    if source in PRESETS:
        return _converted(_preset(source, topic), f"preset {source}", topic)
    try:
        raw = Path(source).read_bytes()
    except OSError as error:
        raise SettingsError(
            f"{topic}_map = {source!r}: neither a preset ({', '.join(PRESETS)}) nor a file that "
            f"can be read: {error.strerror}"
        ) from None
    return parse(raw, topic, source)


def parse(raw: bytes, topic: str, name: str) -> TopicMap | None:
    """As `read`, from the bytes of a file. name: of the file, for messages"""
    if len(raw) > MAP_BYTES_MAX:
        raise SettingsError(f"{name}: a map has at most {MAP_BYTES_MAX:,} bytes, not {len(raw):,}")
    try:
        tables = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{name}: {error}") from None
    for key in tables.keys() - set(TOPICS):
        raise SettingsError(f"{name}: there is no table {key!r}: expected {', '.join(TOPICS)}")
    table = tables.get(topic)
    if not isinstance(table, dict):
        raise SettingsError(f"{name}: has no table [{topic}]")
    preset = table.get("preset", "")
    if preset == "eddyline":
        return None
    if preset:
        if preset not in PRESETS:
            raise SettingsError(
                f"{name}: preset = {preset!r}: expected one of {', '.join(PRESETS)}"
            )
        table = _merged(_preset(preset, topic), table)
    return _converted(table, name, topic)


def _merged(preset: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """The preset with what the table says: fields and kinds one by one, else whole keys."""
    found = dict(preset) | dict(table)
    for key in ("fields", "kinds"):
        of_table = table.get(key)
        if isinstance(of_table, dict):
            found[key] = dict(preset.get(key, {})) | of_table
    return found


def _preset(name: str, topic: str) -> dict[str, Any]:
    tables = preset_tables(name)
    if topic not in tables:
        raise SettingsError(f"preset {name}: is for {', '.join(tables)}, not for {topic}")
    table: dict[str, Any] = tables[topic]
    return table


@lru_cache(maxsize=len(PRESETS))
def preset_tables(name: str) -> dict[str, Any]:
    """The tables of a preset, by topic."""
    file = resources.files("eddyline.schema.mapping") / "presets" / f"{name}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _converted(table: Mapping[str, Any], name: str, topic: str) -> TopicMap:
    try:
        return msgspec.convert(table, TopicMap)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{name}: [{topic}]: {error}") from None
