"""Envelopes: what surrounds the object of a record, and whether the record deletes.

`json` is the value itself. `debezium` is a change event: before, after and op, or the row alone
where the connector unwraps it, with or without a schema. `cloudevents` is CloudEvents' JSON format
or its binary mode for Kafka.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec

from eddyline.errors import Rejected
from eddyline.schema.events import quote
from eddyline.schema.mapping import values
from eddyline.schema.mapping.paths import Source

Op = Literal["put", "delete", "ignore"]
Name = Literal["json", "debezium", "cloudevents"]
Envelope = Callable[[Source, bytes | None], tuple[Op, Any]]

_decode = msgspec.json.Decoder().decode
_PLACEHOLDER = "__debezium_unavailable_value"
_IN_BASE64 = base64.b64encode(_PLACEHOLDER.encode()).decode()
_IN_CODES = [ord(sign) for sign in _PLACEHOLDER]
# A decimal with more digits has no meaning as a price, and costs time.
_DECIMAL_CHARS_MAX = 64
_DAY_MS = 86_400_000


class _Unavailable:
    """A column that the change event does not have, as the update left it alone."""

    def __repr__(self) -> str:
        return "UNAVAILABLE"


UNAVAILABLE: Final = _Unavailable()


def decoded(value: bytes) -> Any:
    """The JSON value; NaN and Infinity are read, as some producers write them. Raises Rejected."""
    try:
        if not value.isascii():
            value.decode()
        return _decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if isinstance(error, msgspec.DecodeError) and (b"NaN" in value or b"Infinity" in value):
            try:
                return json.loads(value)
            except (ValueError, RecursionError):
                pass
        raise Rejected("malformed_json", "", str(error)[:160]) from None


def plain_json(source: Source, value: bytes | None) -> tuple[Op, Any]:
    """The value itself; a record without a value deletes."""
    if value is None:
        return "delete", _as_row(source.decoded_key())
    source.root = _decoded(source, value)
    return "put", source.root


def debezium(source: Source, value: bytes | None) -> tuple[Op, Any]:
    """The row after the change; of a delete, the key's columns and the others of the row before.

    Raises Rejected for TRUNCATE, which names no row.
    """
    key = _as_row(source.decoded_key())
    if value is None:
        return "delete", key
    root, schema = _payload(_decoded(source, value))
    source.root = root
    if root is None:
        return "delete", key
    if not isinstance(root, dict):
        raise Rejected("bad_field", "", f"{quote(root)} is no change event")
    op = root.get("op")
    if isinstance(op, str) and ("after" in root or "before" in root or "source" in root):
        return _change(op, root, schema, key)
    row = _row(root, schema)
    gone = root.get("__deleted")
    if gone is True or gone == "true" or root.get("__op") == "d":
        return "delete", row | key
    return "put", row


def cloudevents(source: Source, value: bytes | None) -> tuple[Op, Any]:
    """The attributes and `data`, in structured and in binary mode. Raises Rejected."""
    if value is None:
        return "delete", _as_row(source.decoded_key())
    attributes: dict[str, Any] = {}
    for name, found in source.headers:
        if name.startswith("ce_") and found is not None:
            attributes[name[3:]] = bytes(found).decode("utf-8", "replace")
    content_type = source.header("content-type") or ""
    if attributes and not content_type.startswith("application/cloudevents"):
        attributes["data"] = _payload(_decoded(source, value))[0] if value else None
        source.root = attributes
        return "put", attributes
    root = _decoded(source, value)
    source.root = [_with_data(one) for one in root] if isinstance(root, list) else _with_data(root)
    if isinstance(root, dict) and isinstance(op := root.get("iodebeziumop"), str):
        # Of Debezium's converter: the change event lies in `data`.
        change, schema = _payload(root.get("data"))
        key = _as_row(source.decoded_key())
        made, row = _change(op, change if isinstance(change, dict) else {}, schema, key)
        return made, source.root | {"data": row}
    return "put", source.root


ENVELOPES: Final[dict[Name, Envelope]] = {
    "json": plain_json,
    "debezium": debezium,
    "cloudevents": cloudevents,
}


def _decoded(source: Source, value: bytes) -> Any:
    return decoded(value) if source.decode is None else source.decode(value)


def _as_row(key: Any) -> dict[str, Any]:
    return key if isinstance(key, dict) else {}


def _payload(root: Any) -> tuple[Any, Any]:
    """(payload, its schema); the schema is None where the converter writes none."""
    if isinstance(root, dict) and root.keys() == {"schema", "payload"}:
        return root["payload"], root["schema"]
    return root, None


def _change(op: str, root: dict[str, Any], schema: Any, key: dict[str, Any]) -> tuple[Op, Any]:
    if op == "t":
        detail = "TRUNCATE names no rows, so nothing can be deleted: DELETE names them"
        raise Rejected("truncate", "op", detail)
    side = {"c": "after", "r": "after", "u": "after", "d": "before"}.get(op)
    if side is None:
        return "ignore", None
    found = root.get(side)
    row = _row(found, _of_field(schema, side)) if isinstance(found, dict) else {}
    if op == "d":
        return "delete", row | key
    if not row:
        raise Rejected("bad_field", "after", f"{quote(found)} is no row")
    return "put", row


def _of_field(schema: Any, name: str) -> Any:
    fields = schema.get("fields") if isinstance(schema, dict) else None
    for one in fields if isinstance(fields, list) else ():
        if isinstance(one, dict) and one.get("field") == name:
            return one
    return None


def _row(row: dict[str, Any], schema: Any) -> dict[str, Any]:
    """The row with its decimals and times decoded and its unavailable values marked."""
    kinds: dict[Any, dict[str, Any]] = {}
    fields = schema.get("fields") if isinstance(schema, dict) else None
    for one in fields if isinstance(fields, list) else ():
        if isinstance(one, dict) and isinstance(one.get("field"), str):
            kinds[one["field"]] = one
    return {name: _column(value, kinds.get(name)) for name, value in row.items()}


def _column(value: Any, schema: dict[str, Any] | None) -> Any:
    if value is None or type(value) is bool:
        return value
    if isinstance(value, str):
        if value in (_PLACEHOLDER, _IN_BASE64):
            return UNAVAILABLE
    elif isinstance(value, list):
        if value in ([_PLACEHOLDER], _IN_CODES):
            return UNAVAILABLE
        items = schema.get("items") if schema is not None else None
        if isinstance(items, dict):
            return [_column(one, items) for one in value]
    elif isinstance(value, dict) and value.keys() == {"scale", "value"}:
        return _decimal(value["value"], value["scale"])
    return value if schema is None else _typed(value, schema)


def _typed(value: Any, schema: dict[str, Any]) -> Any:
    """Decode by the schema's logical type; times become milliseconds since 1970."""
    name = schema.get("name")
    if name == "org.apache.kafka.connect.data.Decimal":
        parameters = schema.get("parameters")
        return _decimal(value, parameters.get("scale") if isinstance(parameters, dict) else None)
    if type(value) is not int:
        return value
    if name in ("io.debezium.time.Date", "org.apache.kafka.connect.data.Date"):
        return value * _DAY_MS
    if name == "io.debezium.time.MicroTimestamp":
        return value // 1_000
    if name == "io.debezium.time.NanoTimestamp":
        return value // 1_000_000
    return value


def _decimal(value: Any, scale: Any) -> Any:
    """A big-endian two's-complement integer in base64, divided by 10 to the power of the scale."""
    try:
        places = int(scale)
        if not isinstance(value, str) or len(value) > _DECIMAL_CHARS_MAX or abs(places) > 300:
            return value
        return values.decimal(base64.b64decode(value, validate=True), places)
    except (ValueError, TypeError):
        return value


def _with_data(event: Any) -> Any:
    """A structured event; `data_base64` is decoded if it is JSON."""
    if not isinstance(event, dict):
        return event
    if "data" in event:
        return event | {"data": _payload(event["data"])[0]}
    try:
        data = base64.b64decode(event.get("data_base64", ""), validate=True)
        return event | {"data": _decode(data)} if data else event
    except (ValueError, TypeError, msgspec.DecodeError, RecursionError):
        return event
