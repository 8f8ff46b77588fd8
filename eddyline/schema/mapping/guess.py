"""Guess a map from a sample of records, for a person to look at.

Names decide first, then values: a time has the format that most values have, a kind few distinct
values. What is guessed is only ever printed; a map that is used is a file that someone has read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eddyline.schema.mapping import values
from eddyline.schema.mapping.values import BAD

# Records of a sample; a path deeper than this is no field of an event.
SAMPLE_MAX = 1_000
_DEPTH_MAX = 5
_KINDS_MAX = 32
_VALUES_MAX = 200

# Names without case and signs, the most telling first.
NAMES = {
    "user_id": "userid user uid customerid customer visitorid visitor accountid account clientid "
    "memberid member personid profileid anonymousid deviceid sessionid session",
    "item_id": "itemid item productid product sku articleid article movieid movie contentid "
    "content asin stockcode mediaid trackid offerid listingid",
    "at_ms": "atms timestamp time ts eventtime occurredat happenedat createdat clickedat datetime "
    "invoicedate date updatedat receivedat",
    "kind": "kind eventtype event action type behavior eventname activity interaction",
    "event_id": "eventid messageid uuid requestid transactionid",
    "title": "title name productname itemname label description",
    "categories": "categories category genres genre categoryid department group groups",
    "tags": "tags tag labels keywords",
    "available": "available instock isavailable isactive active enabled",
    "stock": "stock quantity qty inventory units",
    "weight": "weight score strength",
}
_OF_TOPIC = {
    "clicks": ("user_id", "item_id", "at_ms", "kind", "event_id", "weight"),
    "items": ("item_id", "title", "categories", "tags", "available", "stock", "at_ms"),
    "users": ("user_id", "at_ms"),
}
# Parts of kinds' names; the first that is found decides.
_KINDS = (
    ("dislike", "dislike"),
    ("hide", "dislike"),
    ("remove", "ignore"),
    ("wish", "like"),
    ("like", "like"),
    ("fav", "like"),
    ("star", "like"),
    ("cart", "cart"),
    ("basket", "cart"),
    ("purchase", "purchase"),
    ("transaction", "purchase"),
    ("order", "purchase"),
    ("buy", "purchase"),
    ("bought", "purchase"),
    ("view", "view"),
    ("seen", "view"),
    ("impression", "view"),
    ("click", "click"),
    ("select", "click"),
)
_FORMATS = ("iso", "rfc2822", "%d.%m.%Y %H:%M", "%m/%d/%Y %H:%M", "%Y/%m/%d %H:%M:%S")
# A day as text, which could be read as a number.
_DAY = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])")
# (digits of a time as a number, unit)
_UNITS = ((10, "s"), (13, "ms"), (16, "us"), (19, "ns"))
_BARE = re.compile(r"[A-Za-z0-9_-]+\Z")


@dataclass(slots=True)
class Seen:
    """What a path has in the sample.

    count, lists:  in how many records it is, and is a list
    texts, values: some of its values, distinct ones as text
    """

    count: int = 0
    texts: Counter[str] = field(default_factory=Counter)
    values: list[Any] = field(default_factory=list)
    lists: int = 0

    @property
    def is_list(self) -> bool:
        """Whether it is a list in most records."""
        return self.lists * 2 > self.count


def preset_of(records: Sequence[Any]) -> str:
    """The preset whose format most records have; empty for none."""
    found = Counter(_preset(one) for one in records)
    name, count = found.most_common(1)[0] if found else ("", 0)
    return name if count * 2 > len(records) else ""


def topic_of(records: Sequence[Any]) -> str:
    """The topic that the records are most likely of."""
    seen = paths_of(records)
    has = {name for name in ("user_id", "item_id", "title") if _path(seen, name)}
    if {"user_id", "item_id"} <= has or _lists(records):
        return "clicks"
    return "users" if "user_id" in has and "item_id" not in has else "items"


def guess(records: Sequence[Any], topic: str) -> str:
    """The text of a map for these records, decoded from JSON. topic: clicks, items or users"""
    if preset := preset_of(records):
        return f'[{topic}]\npreset = "{preset}"\n'
    if topic == "clicks":
        return _clicks(records)
    seen = paths_of(records)
    fields = _fields(seen, topic)
    if "stock" in fields:
        stock = fields.pop("stock")
        fields.setdefault("available", toml_table(path=stock, above=0))
    lines = [f"[{topic}]", f"[{topic}.fields]"]
    lines += [f"{name} = {_quoted_or_inline(found)}" for name, found in fields.items()]
    taken = sorted({_path_in(found) for found in fields.values() if "." not in _path_in(found)})
    numeric = sorted(
        name
        for name, one in seen.items()
        if "." not in name and name not in taken and _is_numeric_text(one)
    )
    lines.append(f"attributes_from = {{ leave_out = {_list(taken)} }}")
    if numeric:
        lines.append(f"[{topic}.fields.attributes]")
        lines += [f"{toml_key(n)} = {toml_table(path=n, type='number')}" for n in numeric]
    return "\n".join(lines) + "\n"


def paths_of(records: Iterable[Any], prefix: str = "") -> dict[str, Seen]:
    """Every path to a scalar or to a list of scalars in the sample."""
    found: dict[str, Seen] = {}
    for record in records:
        for path, value in _leaves(record, prefix, _DEPTH_MAX):
            one = found.setdefault(path, Seen())
            one.count += 1
            one.lists += isinstance(value, list)
            if len(one.values) < _VALUES_MAX:
                one.values.append(value)
            if not isinstance(value, list) and len(one.texts) < _VALUES_MAX:
                one.texts[str(value)] += 1
    return found


def time_format(found: Sequence[Any]) -> str:
    """The format that most of these values have; empty if they are no times."""
    formats = Counter(_format(value) for value in found)
    formats.pop("", None)
    name, count = formats.most_common(1)[0] if formats else ("", 0)
    return name if count * 2 > len(found) else ""


def kind_of(name: str) -> str:
    """Eddyline's kind for a kind of this name, "ignore" if the name says nothing."""
    low = name.lower()
    return next((kind for part, kind in _KINDS if part in low), "ignore")


def candidates(records: Sequence[Any], name: str) -> list[str]:
    """Paths of the sample that could be this field, the likeliest first."""
    return _ranked(paths_of(records), name)


def _clicks(records: Sequence[Any]) -> str:
    seen = paths_of(records)
    fields = _fields(seen, "clicks")
    lines = ["[clicks]"]
    kinds = seen[fields["kind"]].texts if "kind" in fields else Counter()
    if kinds:
        pairs = ", ".join(
            f"{toml_key(name)} = {toml_text(kind_of(name))}" for name in sorted(kinds)
        )
        lines += [f"kinds = {{ {pairs} }}"]
    each = ""
    if "item_id" not in fields:
        for path in _lists(records):
            inner = [one for record in records for one in _at(record, path) if one is not None]
            of_lines = _fields(paths_of(inner), "clicks")
            if "item_id" in of_lines:
                each = path
                fields = {name: f"^.{found}" for name, found in fields.items()}
                fields["item_id"] = of_lines["item_id"]
                break
    lines.append("[clicks.fields]")
    for name, found in fields.items():
        if name == "at_ms":
            format_ = time_format(seen[found.removeprefix("^.")].values)
            lines.append(f"at_ms = {toml_table(path=found, format=format_)}")
        else:
            lines.append(f"{name} = {toml_text(found)}")
    if each:
        lines += ["[[clicks.rule]]", f"each = {toml_text(each)}"]
    return "\n".join(lines) + "\n"


def _fields(seen: Mapping[str, Seen], topic: str) -> dict[str, str]:
    """Field → path, each path once."""
    found: dict[str, str] = {}
    for name in _OF_TOPIC[topic]:
        for path in _ranked(seen, name):
            if path not in found.values() and fits(seen[path], name):
                found[name] = path
                break
    if topic == "items" and "item_id" not in found and "id" in seen:
        found = {"item_id": "id"} | found
    if topic == "users" and "user_id" not in found and "id" in seen:
        found = {"user_id": "id"} | found
    if topic == "clicks" and "event_id" not in found and "id" in seen:
        found["event_id"] = "id"
    if topic != "clicks" and "at_ms" in found:
        path = found["at_ms"]
        found["at_ms"] = toml_table(path=path, format=time_format(seen[path].values))
    return found


def fits(seen: Seen, name: str) -> bool:
    """Whether the values can be those of the field."""
    if name == "at_ms":
        return bool(time_format(seen.values))
    if name == "kind":
        return not seen.is_list and 0 < len(seen.texts) <= _KINDS_MAX
    if name in ("stock", "weight"):
        return is_numeric(seen.values)
    if name == "available":
        return bool(seen.values) and all(values.boolean(one) is not BAD for one in seen.values)
    return name in ("categories", "tags") or not seen.is_list


def is_numeric(found: Sequence[Any]) -> bool:
    """Whether there are values and all are numbers; a code with leading zeros is none."""
    return bool(found) and not any(
        values.number(one) is BAD or re.match(r"-?0\d", str(one)) for one in found
    )


def _path(seen: Mapping[str, Seen], name: str) -> str:
    return next(iter(_ranked(seen, name)), "")


def bare(name: str) -> str:
    """A name without case and signs, as in `NAMES`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _ranked(seen: Mapping[str, Seen], name: str) -> list[str]:
    """Paths whose last part has one of the field's names; shallow ones first among equal names."""
    names = {one: rank for rank, one in enumerate(NAMES[name].split())}
    ranks = {}
    for path in seen:
        parts = [bare(part) for part in path.split(".")]
        whole = "".join(parts[-2:])
        rank = min(names.get(parts[-1], 99), names.get(whole, 99))
        if rank < 99:
            ranks[path] = (rank, len(parts), path)
    return sorted(ranks, key=lambda path: ranks[path])


def _lists(records: Sequence[Any]) -> list[str]:
    """Paths to lists of objects."""
    found: Counter[str] = Counter()
    for record in records:
        found.update(_object_lists(record, "", _DEPTH_MAX))
    return [path for path, _ in found.most_common()]


def _object_lists(value: Any, prefix: str, depth: int) -> Iterator[str]:
    for name, one in value.items() if isinstance(value, dict) and depth else ():
        path = f"{prefix}{segment(name)}"
        if isinstance(one, list) and one and isinstance(one[0], dict):
            yield path
        elif isinstance(one, dict):
            yield from _object_lists(one, f"{path}.", depth - 1)


def _at(record: Any, path: str) -> list[Any]:
    """The elements of a list that `_lists` found."""
    for part in path.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record if isinstance(record, list) else []


def _leaves(value: Any, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    for name, one in value.items() if isinstance(value, dict) and depth else ():
        path = f"{prefix}{segment(name)}"
        if isinstance(one, dict):
            yield from _leaves(one, f"{path}.", depth - 1)
        elif isinstance(one, list):
            if all(values.scalar(part) is not BAD for part in one):
                yield path, one
        elif one is not None:
            yield path, one


def segment(name: str) -> str:
    """A name as a part of a path in a map."""
    return name if re.fullmatch(r"[^.\[\]\"$^=\\]+", name) else json.dumps(name)


def _format(value: Any) -> str:
    if isinstance(value, str) and _DAY.fullmatch(value):
        return "%Y%m%d"
    found = values.number(value)
    if found is not BAD:
        digits = len(str(abs(int(found))))
        return next((unit for most, unit in _UNITS if most - 1 <= digits <= most), "")
    for name in _FORMATS:
        if values.compile_time([name], "UTC")(value) is not BAD:
            return name
    return ""


def _is_numeric_text(seen: Seen) -> bool:
    return is_numeric([one for one in seen.values if isinstance(one, str)])


def _preset(record: Any) -> str:
    """The preset whose format a record has."""
    if isinstance(record, list):
        record = record[0] if record else None
    if not isinstance(record, dict):
        return ""
    if record.keys() == {"schema", "payload"} or ("op" in record and "source" in record):
        return "debezium"
    if "specversion" in record:
        return "cloudevents"
    if "messageId" in record and ("anonymousId" in record or "userId" in record):
        return "segment"
    if "collector_tstamp" in record and "event_id" in record:
        return "snowplow"
    if ("events" in record and "client_id" in record) or "event_params" in record:
        return "ga4"
    if record.keys() & {"FeedbackType", "IsHidden"} or {"UserId", "Labels"} <= record.keys():
        return "gorse"
    if record.get("event") in ("interaction", "ranking", "item", "user") and "timestamp" in record:
        return "metarank"
    return ""


def _path_in(found: str) -> str:
    """The path of what `_fields` has for a field."""
    named = re.match(r'\{ path = "((?:[^"\\]|\\.)*)"', found)
    return named.group(1) if named is not None else found


def toml_table(**keys: Any) -> str:
    """An inline table of TOML, without the keys whose value is the empty text."""
    return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in keys.items() if v != "") + " }"


def _quoted_or_inline(found: str) -> str:
    return found if found.startswith("{ ") else toml_text(found)


def _toml(value: Any) -> str:
    return toml_text(value) if isinstance(value, str) else str(value)


def toml_text(value: str) -> str:
    """A text as TOML."""
    # A basic string of TOML has the escapes of JSON; what JSON leaves as it is, DEL, has to go.
    return json.dumps(value).replace("\x7f", "\\u007f")


def toml_key(name: str) -> str:
    """A name as a key of TOML."""
    return name if _BARE.match(name) else toml_text(name)


def _list(texts: Sequence[str]) -> str:
    return "[" + ", ".join(toml_text(one) for one in texts) + "]"
