"""The model's reading of records: JSON, fields and ids, and Kafka's partitioner, by the documents.

Nothing of the product's codec is used. `Refused` holds the reason of a dead letter.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

KINDS = ("click", "view", "like", "cart", "purchase", "dislike")
LAST_MS = 253_402_300_799_999
# Any escape in JSON; the group has something for half of a surrogate pair only.
HALF_PAIR = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)")


class Refused(Exception):
    """The record is no event. args[0]: the reason of its dead letter."""


class Raw(NamedTuple):
    """A record as Kafka has it. timestamp: the broker's clock at the append, milliseconds."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()

    @property
    def at(self) -> str:
        """`topic/partition/offset`."""
        return f"{self.topic}/{self.partition}/{self.offset}"


def header(raw: Raw, name: str) -> bytes | None:
    """The last value under a name; None for none."""
    return dict(raw.headers).get(name)


def number_header(raw: Raw, name: str) -> int | None:
    """The first readable decimal number under a name; None for none."""
    for found, value in raw.headers:
        if found == name and value is not None and value.isdigit() and len(value) <= 18:
            return int(value)
    return None


def partition(key: str, partitions: int) -> int:
    """murmur2 as Kafka's Java client computes it, made positive, modulo."""
    data, m = key.encode(), 0x5BD1E995
    h = 0x9747B28C ^ len(data)
    whole = len(data) // 4 * 4
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * m % 2**32
        k = (k ^ k >> 24) * m % 2**32
        h = h * m % 2**32 ^ k
    tail = data[whole:]
    if tail:
        for n in range(len(tail)):
            h ^= tail[n] << 8 * n
        h = h * m % 2**32
    h = (h ^ h >> 13) * m % 2**32
    h ^= h >> 15
    return (h & 0x7FFFFFFF) % partitions


def document(value: bytes | None, lenient: bool = False) -> dict[str, Any]:
    """A record's JSON object. Raises Refused.

    lenient: NaN and Infinity are numbers, and a text may have half a surrogate pair
    """
    if value is None:
        raise Refused("no_value")
    try:
        found = json.loads(value.decode(), parse_constant=float if lenient else _no_constant)
    except RecursionError:
        raise Refused("bad_field" if value.startswith(b"[") else "malformed_json") from None
    except ValueError:
        raise Refused("malformed_json") from None
    if not lenient and any(HALF_PAIR.findall(value.decode())):
        raise Refused("malformed_json")
    if not isinstance(found, dict):
        raise Refused("bad_field")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(name)


def text(doc: Mapping[str, Any], name: str, shortest: int, longest: int) -> str:
    """A required text of so many characters."""
    found = doc.get(name)
    if not isinstance(found, str) or not shortest <= len(found) <= longest:
        raise Refused("bad_field")
    return found


def time_ms(doc: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A time in milliseconds; required without a default."""
    found = doc.get(name, default)
    if type(found) is not int or not 0 <= found <= LAST_MS:
        raise Refused("bad_field")
    return found


def integer(doc: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number, or the default where it is absent."""
    found = doc.get(name, default)
    if type(found) is not int:
        raise Refused("bad_field")
    return found


def attributes(doc: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Names and plain values, or none at all."""
    found = doc.get(name, {})
    if not isinstance(found, dict) or len(found) > 64:
        raise Refused("bad_field")
    for label, value in found.items():
        if not 1 <= len(label) <= 256:
            raise Refused("bad_field")
        plain = isinstance(value, str) and len(value) <= 1_000
        number = isinstance(value, int) and -(2**63) <= value < 2**63
        real = isinstance(value, float) and abs(value) != float("inf")
        if not (plain or number or real):
            raise Refused("bad_field")
    return found


def check_id(value: str) -> None:
    """An id has 1 to 256 bytes and no control characters."""
    if not value:
        raise Refused("empty_id")
    if len(value.encode(errors="replace")) > 256:
        raise Refused("id_too_long")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in value):
        raise Refused("control_character")


def in_nfc(text: str) -> str:
    """Composed characters, no blanks around: two spellings of one text are one."""
    composed = unicodedata.normalize("NFC", text)
    while composed and composed[0].isspace():
        composed = composed[1:]
    while composed and composed[-1].isspace():
        composed = composed[:-1]
    return composed


def check_time(at_ms: int, raw: Raw, ahead_ms: int) -> None:
    """An event may lie at most so far after its append."""
    if at_ms > raw.timestamp + ahead_ms:
        raise Refused("far_future")


def check_stamp(raw: Raw) -> None:
    """A record without a time stamp has -1."""
    if raw.timestamp < 0:
        raise Refused("no_timestamp")


class Plausible(NamedTuple):
    """What is no time, who is no user, and which ids are one.

    at_ms_min: the earliest time; nobodies: lower case; one_form: spellings of a text are one
    """

    at_ms_min: int
    nobodies: frozenset[str]
    one_form: bool = True

    def own(self, text: str) -> str:
        """The form of an id or a label."""
        return in_nfc(text) if self.one_form else text

    def id(self, text: str) -> str:
        """A checked id in its form. Raises Refused."""
        check_id(text)
        check_id(self.own(text))
        return self.own(text)

    def check(self, at_ms: int, *users: str) -> None:
        """Raises Refused; 0 is a time that was left out."""
        if 0 < at_ms < self.at_ms_min:
            raise Refused("too_early")
        if any(user.lower() in self.nobodies for user in users):
            raise Refused("placeholder_id")


def click(doc: Mapping[str, Any], raw: Raw, ahead_ms: int, plausible: Plausible) -> dict[str, Any]:
    """A click's fields. Raises Refused."""
    found: dict[str, Any] = {
        "type": "click",
        "user_id": text(doc, "user_id", 1, 256),
        "item_id": text(doc, "item_id", 1, 256),
        "at_ms": time_ms(doc, "at_ms", 0),
        "kind": doc.get("kind", "click"),
        "event_id": doc.get("event_id"),
        "weight": doc.get("weight", 1.0),
        "context": None if doc.get("context") is None else attributes(doc, "context"),
    }
    if found["event_id"] is not None:
        text(doc, "event_id", 1, 256)
    if doc.get("impression_id") is not None:
        text(doc, "impression_id", 1, 256)
    if found["kind"] not in KINDS or type(found["weight"]) not in (int, float):
        raise Refused("bad_field")
    if not 0 < found["weight"] <= 100:
        raise Refused("bad_field")
    for name in ("user_id", "item_id"):
        found[name] = plausible.id(found[name])
    if found["event_id"] is not None:
        check_id(found["event_id"])
    if (found["context"] or {}).get("eddyline.moved") is not True:
        check_time(found["at_ms"], raw, ahead_ms)
    return found


def merge(doc: Mapping[str, Any], raw: Raw, ahead_ms: int, plausible: Plausible) -> dict[str, Any]:
    """A merge's fields. Raises Refused."""
    found = {
        "type": "merge",
        "user_id": text(doc, "user_id", 1, 256),
        "merge_into": text(doc, "merge_into", 1, 256),
        "at_ms": time_ms(doc, "at_ms", 0),
        "event_id": None,
    }
    found |= {name: plausible.id(found[name]) for name in ("user_id", "merge_into")}
    check_time(found["at_ms"], raw, ahead_ms)
    if found["user_id"] == found["merge_into"]:
        raise Refused("same_user")
    return found


def forget(doc: Mapping[str, Any], raw: Raw, ahead_ms: int, plausible: Plausible) -> dict[str, Any]:
    """A tombstone's fields; records of before have a time only. Raises Refused."""
    until_ms = time_ms(doc, "forget_until_ms")
    found = {
        "type": "forget",
        "user_id": text(doc, "user_id", 1, 256),
        "until_ms": until_ms,
        "keep_after_ms": integer(doc, "keep_after_ms", until_ms),
        "users_offset": integer(doc, "users_offset", -1),
        "ends_ms": integer(doc, "ends_ms", until_ms + 400 * 86_400_000),
        "event_id": None,
    }
    found["user_id"] = plausible.id(found["user_id"])
    check_time(until_ms, raw, ahead_ms)
    return found


def user_event(raw: Raw, ahead_ms: int, plausible: Plausible) -> dict[str, Any]:
    """Any record of `clicks`; the time of the first append stands in for none. Raises Refused."""
    check_stamp(raw)
    doc = document(raw.value)
    try:
        found = click(doc, raw, ahead_ms, plausible)
    except Refused:
        if "merge_into" in doc:
            found = merge(doc, raw, ahead_ms, plausible)
        elif "forget_until_ms" in doc:
            return forget(doc, raw, ahead_ms, plausible)
        else:
            raise
    moved = (found.get("context") or {}).get("eddyline.moved") is True
    users = [found[name] for name in ("user_id", "merge_into") if name in found]
    plausible.check(0 if moved else found["at_ms"], *users)
    if not found["at_ms"]:
        origin_ms = number_header(raw, "origin_ms")
        found["at_ms"] = raw.timestamp if origin_ms is None else origin_ms
    return found


def _id_of_key(raw: Raw) -> str:
    if raw.key is None:
        raise Refused("no_key")
    try:
        found = raw.key.decode()
    except UnicodeDecodeError:
        raise Refused("malformed_key") from None
    return found


def item_of_key(raw: Raw, plausible: Plausible) -> str | None:
    """The item that the key of a refused record names; None for none."""
    try:
        return plausible.id(_id_of_key(raw))
    except Refused:
        return None


def has_place(raw: Raw, own: str, partitions: int) -> bool:
    """Whether a record of `items` or `users` lies in the partition of its id, under that id."""
    return raw.key == own.encode() and partition(own, partitions) == raw.partition


def profile(raw: Raw, ahead_ms: int, plausible: Plausible) -> tuple[str, dict[str, Any] | None]:
    """(user id, attributes; None forgets the user). Raises Refused."""
    user = _id_of_key(raw)
    check_stamp(raw)
    if raw.value is None:
        return plausible.id(user), None
    doc = document(raw.value, lenient=True)
    found, at_ms = good_attributes(doc, plausible), time_ms(doc, "at_ms", 0)
    if plausible.id(text(doc, "user_id", 1, 256)) != plausible.own(user):
        raise Refused("wrong_key")
    check_time(at_ms, raw, ahead_ms)
    plausible.check(at_ms, plausible.own(user))
    return plausible.own(user), found


# A bad optional part of an item or a profile is left out.


def good_text(value: Any, shortest: int, longest: int) -> bool:
    """Whether this is a text of so many characters, without half a surrogate pair."""
    if not isinstance(value, str) or not shortest <= len(value) <= longest:
        return False
    return not any(unicodedata.category(char) == "Cs" for char in value)


def good_attributes(doc: Mapping[str, Any], plausible: Plausible) -> dict[str, Any]:
    """The first 64 attributes that are plain values."""
    found = doc.get("attributes")
    good: dict[str, Any] = {}
    for name, value in found.items() if isinstance(found, dict) else ():
        number = isinstance(value, int) and -(2**63) <= value < 2**63
        real = isinstance(value, float) and math.isfinite(value)
        plain = number or real or good_text(value, 0, 1_000)
        own = good_label(name, plausible)
        if own and plain and (len(good) < 64 or own in good):
            good[own] = value
    return good


def good_label(value: Any, plausible: Plausible) -> str:
    """A label in its form; empty for what is none."""
    if not good_text(value, 1, 256):
        return ""
    own = plausible.own(value)
    return own if len(own) <= 256 else ""


def good_labels(doc: Mapping[str, Any], name: str, plausible: Plausible) -> list[str]:
    """The first 64 labels that are texts."""
    found = doc.get(name)
    labels = [good_label(one, plausible) for one in (found if isinstance(found, list) else ())]
    return [label for label in labels if label][:64]


def good_vector(doc: Mapping[str, Any], dimension: int) -> list[float] | None:
    """The vector, if it is one of this length."""
    found = doc.get("vector")
    if not isinstance(found, list) or len(found) != dimension:
        return None
    good = all(type(x) in (int, float) and abs(x) <= 1e19 for x in found)
    return found if good else None


# A patch of an item: fields that are absent keep their value, null removes one.

BEGINS = ("title", "categories", "tags", "vector")
NOTHING: dict[str, Any] = {
    "title": "",
    "categories": [],
    "tags": [],
    "attributes": {},
    "available": True,
    "at_ms": 0,
    "vector": None,
}


def patch(
    raw: Raw, ahead_ms: int, dimension: int, plausible: Plausible
) -> tuple[str, dict[str, Any] | None]:
    """As `item`, but only the fields that the record has, null for those that it removes."""
    item_id, whole = item(raw, ahead_ms, dimension, plausible)
    if whole is None:
        return item_id, None
    doc = document(raw.value, lenient=True)
    found = {name: value for name, value in whole.items() if name in doc}
    for name in ("categories", "tags", "attributes"):
        if name in doc and not isinstance(doc[name], list if name != "attributes" else dict):
            del found[name]
    if "title" in doc and not good_text(doc["title"], 0, 1_000):
        del found["title"]
    if "vector" in doc and whole["vector"] is None:
        del found["vector"]
    if isinstance(doc.get("attributes"), dict):
        found["attributes"] = {}
        for label, value in doc["attributes"].items():
            if value is not None:
                found["attributes"] |= good_attributes({"attributes": {label: value}}, plausible)
            elif own := good_label(label, plausible):
                found["attributes"][own] = None
    removed = {n: None for n in NOTHING if n in doc and doc[n] is None}
    return item_id, found | removed


def patched(before: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The item after a patch."""
    after = {**NOTHING, **before}
    for name, value in fields.items():
        if name == "attributes" and value is not None:
            value = {**after["attributes"], **value}
            value = {label: one for label, one in value.items() if one is not None}
        after[name] = NOTHING[name] if value is None else value
    return after


def item(
    raw: Raw, ahead_ms: int, dimension: int, plausible: Plausible
) -> tuple[str, dict[str, Any] | None]:
    """(item id, fields with defaults; None deletes the item). Raises Refused."""
    item_id = plausible.own(_id_of_key(raw))
    if raw.value is None:
        return plausible.id(_id_of_key(raw)), None
    check_stamp(raw)
    doc = document(raw.value, lenient=True)
    title = doc.get("title")
    found: dict[str, Any] = {
        "item_id": text(doc, "item_id", 1, 256),
        "title": title if good_text(title, 0, 1_000) else "",
        "categories": good_labels(doc, "categories", plausible),
        "tags": good_labels(doc, "tags", plausible),
        "attributes": good_attributes(doc, plausible),
        "available": doc.get("available", True),
        "at_ms": time_ms(doc, "at_ms", 0),
        "vector": good_vector(doc, dimension),
    }
    if type(found["available"]) is not bool:
        raise Refused("bad_field")
    found["item_id"] = plausible.id(found["item_id"])
    if found["item_id"] != item_id:
        raise Refused("wrong_key")
    check_time(found["at_ms"], raw, ahead_ms)
    plausible.check(found["at_ms"])
    return item_id, found
