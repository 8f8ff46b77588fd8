"""Clicks of flat records: from the decoded object to the event, without JSON in between.

It reads plain records only: ids of printable ASCII or whole numbers, times as whole numbers, listed
kinds. For every other record it gives None, and the mapper reads it: both make the same event of
the same record, and every reason for a refusal is the mapper's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import msgspec

from eddyline.schema.events import AT_MS_MAX, ID_BYTES_MAX, KINDS, WEIGHT_MAX, Click, Kind
from eddyline.schema.mapping import fields, values
from eddyline.schema.mapping.spec import Rule, TopicMap
from eddyline.schema.mapping.values import ID_MAX
from eddyline.schema.records import Headers, Record

_FIELDS = ("user_id", "item_id", "at_ms", "kind", "event_id", "impression_id", "weight")
# What a kind becomes, and the weight of that kind.
_Kinds = dict[str, tuple[Kind, float]]
# Where no kind or no weight was sent.
_DEFAULT: Final[tuple[Kind, float]] = ("click", 1.0)


class MappedClick(msgspec.Struct, gc=False):
    """The record of one event of a flat map, as the mapper makes it; see `records.BuiltRecord`.

    original: the record that was mapped; records: what the mapper makes of it
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    headers: Headers
    event: Click
    original: Record
    records: Callable[[Record], Sequence[Record]]

    @property
    def key(self) -> bytes:
        """The key: the user's id."""
        return self.event.user_id.encode()

    @property
    def value(self) -> bytes | None:
        """The value, made when it is needed: that of an event that stays is not."""
        return self.records(self.original)[0].value


def compile_click(topic_map: TopicMap, rule: Rule) -> Callable[[Any], Click | None] | None:
    """The function from a record's value to its event; None for a map that is not flat.

    rule: the only one of the map, with its defaults; it makes an event
    """
    names = {
        name: fields.own_name(field, topic_map.nulls)
        for name in _FIELDS
        if (field := getattr(rule, name)) is not None
    }
    unit = 1 if rule.at_ms is None else _unit(rule.at_ms)
    if topic_map.envelope != "json" or rule.context or None in names.values() or not unit:
        return None
    return _reader(names, unit, _kinds(topic_map))


def _reader(
    names: dict[str, str | None], unit: int, kinds: _Kinds
) -> Callable[[Any], Click | None]:
    user_of, item_of = names["user_id"], names["item_id"]
    event_of, impression_of = names.get("event_id"), names.get("impression_id")
    at_of, kind_of, weight_of = names.get("at_ms"), names.get("kind"), names.get("weight")

    def click(here: Any) -> Click | None:
        if type(here) is not dict:
            return None
        get = here.get
        user_id, item_id = _plain_id(get(user_of)), _plain_id(get(item_of))
        if not (user_id and item_id):
            return None
        at_ms, event_id, impression_id, (kind, weight) = 0, None, None, _DEFAULT
        if kind_of is not None and (sent := get(kind_of)) is not None:
            if type(sent) is not str or (found := kinds.get(sent)) is None:
                return None
            kind, weight = found
        if at_of is not None and (sent := get(at_of)) is not None:
            if type(sent) is not int or not 0 <= (at_ms := sent * unit) <= AT_MS_MAX:
                return None
        if event_of is not None and (sent := get(event_of)) is not None:
            if not (event_id := _plain_id(sent)):
                return None
        if impression_of is not None and (sent := get(impression_of)) is not None:
            if not (impression_id := _plain_id(sent)):
                return None
        if weight_of is not None and (sent := get(weight_of)) is not None:
            if type(sent) is not float and type(sent) is not int:
                return None
            weight = sent
        if not 0 < weight <= WEIGHT_MAX:  # a larger whole number may be no float
            return None
        return Click(
            user_id=user_id,
            item_id=item_id,
            at_ms=at_ms,
            kind=kind,
            event_id=event_id,
            weight=float(weight),
            impression_id=impression_id,
        )

    return click


def _plain_id(sent: Any) -> str:
    """The id; "" where the mapper has to read it."""
    if type(sent) is str:
        if not (sent.isascii() and sent.isprintable()):
            return ""
        sent = sent.strip()
        return sent if len(sent) <= ID_BYTES_MAX else ""
    return str(sent) if type(sent) is int and -ID_MAX < sent < ID_MAX else ""


def _unit(field: fields.Spec) -> int:
    """Milliseconds in a whole number of the field; 0 where the first format is another one."""
    return max(values.UNITS.get(fields.time_formats(field)[0], 0), 0)


def _kinds(topic_map: TopicMap) -> _Kinds:
    """What each kind of a record becomes, without those that make no event."""
    known = fields.known_kinds(topic_map.kinds or {kind: kind for kind in KINDS})
    return {
        name: (cast(Kind, kind), 1.0 if weight is None else float(weight))
        for name, (kind, weight) in known.items()
        if kind in KINDS
    }
