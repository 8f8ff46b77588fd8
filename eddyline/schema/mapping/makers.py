"""What a rule makes: from a place in a record to an event, an item, a profile or a delete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from eddyline.errors import Rejected
from eddyline.schema.events import KINDS, quote
from eddyline.schema.mapping import fields
from eddyline.schema.mapping.fields import IGNORE
from eddyline.schema.mapping.paths import Getter, Scope
from eddyline.schema.mapping.spec import Rule, TopicMap

# (key, value) of the records of one element.
Made = tuple[str, dict[str, Any] | None]
Maker = Callable[[Scope], Made | None]


def maker(topic_map: TopicMap, rule: Rule, made: str) -> Maker:
    """The function of a rule, which has its defaults. Raises ValueError.

    made: event, merge, item, profile, delete or ignore
    """
    if made == "event":
        return _event(topic_map, rule)
    if made == "merge":
        return _merge(topic_map, rule)
    if made == "item":
        return _item(topic_map, rule)
    if made == "profile":
        return _profile(topic_map, rule)
    if made == "delete":
        name = "item_id" if rule.item_id is not None else "user_id"
        get = required(name, getattr(rule, name), topic_map)
        return lambda scope: (get(scope), None)
    return lambda scope: None


def _event(topic_map: TopicMap, rule: Rule) -> Maker:
    nulls = topic_map.nulls
    user, item = (required(name, getattr(rule, name), topic_map) for name in ("user_id", "item_id"))
    at_ms = None if rule.at_ms is None else fields.time(rule.at_ms, nulls)
    optional: list[tuple[str, Getter]] = []
    optional += [
        (name, fields.identity(name, field, nulls))
        for name in ("event_id", "impression_id")
        if (field := getattr(rule, name)) is not None
    ]
    if rule.weight is not None:
        optional.append(("weight", fields.number(rule.weight, nulls)))
    kind = None
    if rule.kind is not None:
        kind = fields.kind(rule.kind, nulls, topic_map.kinds, topic_map.other_kinds)
        _check_kinds(topic_map)
    context = [(name, fields.attribute(one, nulls)) for name, one in rule.context.items()]

    def make(scope: Scope) -> Made | None:
        event: dict[str, Any] = {}
        if kind is not None and (found := kind(scope)) is not None:
            event["kind"], weight = found
            if event["kind"] == IGNORE:
                return None
            if weight is not None:
                event["weight"] = weight
        user_id = event["user_id"] = user(scope)
        event["item_id"] = item(scope)
        if at_ms is not None and (time_ms := at_ms(scope)) is not None:
            event["at_ms"] = time_ms
        for name, get in optional:
            if (value := get(scope)) is not None:
                event[name] = value
        if context:
            event["context"] = {
                name: value
                for name, get in context
                if (value := get(scope)) is not None and not isinstance(value, list)
            }
        return user_id, event

    return make


def _merge(topic_map: TopicMap, rule: Rule) -> Maker:
    user, into = (
        required(name, getattr(rule, name), topic_map) for name in ("user_id", "merge_into")
    )
    at_ms = None if rule.at_ms is None else fields.time(rule.at_ms, topic_map.nulls)

    def make(scope: Scope) -> Made:
        user_id = user(scope)
        event = {"user_id": user_id, "merge_into": into(scope)}
        if at_ms is not None and (found := at_ms(scope)) is not None:
            event["at_ms"] = found
        return user_id, event

    return make


def _item(topic_map: TopicMap, rule: Rule) -> Maker:
    nulls = topic_map.nulls
    item = required("item_id", rule.item_id, topic_map)
    parts: list[tuple[str, Getter]] = []
    if rule.title is not None:
        parts.append(("title", fields.title(rule.title, nulls)))
    parts += [
        (name, fields.labels(name, field, nulls))
        for name in ("categories", "tags")
        if (field := getattr(rule, name)) is not None
    ]
    if rule.available is not None:
        parts.append(("available", fields.truth("available", rule.available, nulls)))
    if rule.at_ms is not None:
        parts.append(("at_ms", fields.time(rule.at_ms, nulls)))
    if rule.vector is not None:
        parts.append(("vector", fields.raw(rule.vector, nulls)))
    attributes = _attributes(topic_map, rule)

    def make(scope: Scope) -> Made:
        item_id = item(scope)
        event: dict[str, Any] = {"item_id": item_id}
        for name, get in parts:
            if (value := get(scope)) is not None:
                event[name] = value
        event["attributes"] = attributes(scope)
        return item_id, event

    return _item_patch(rule, item, parts, attributes) if topic_map.patches else make


def _item_patch(
    rule: Rule,
    item: Getter,
    parts: Sequence[tuple[str, Getter]],
    attributes: Callable[[Scope], dict[str, Any]],
) -> Maker:
    """As `_item`; a field that is null where its path ends is removed."""
    removable = ("title", "categories", "tags", "vector")
    nulls = {name: fields.holds_null(getattr(rule, name)) for name, _ in parts if name in removable}
    named = [(name, fields.holds_null(one)) for name, one in rule.attributes.items()]

    def make(scope: Scope) -> Made:
        item_id = item(scope)
        event: dict[str, Any] = {"item_id": item_id}
        for name, get in parts:
            try:
                value = get(scope)
            except Rejected as rejected:
                if rejected.reason != "unavailable_value":
                    raise
                continue  # the update left this column alone
            if value is not None or (name in nulls and nulls[name](scope)):
                event[name] = value
        removed = {name: None for name, is_null in named if is_null(scope)}
        if found := removed | attributes(scope):
            event["attributes"] = found
        return item_id, event

    return make


def _profile(topic_map: TopicMap, rule: Rule) -> Maker:
    user = required("user_id", rule.user_id, topic_map)
    at_ms = None if rule.at_ms is None else fields.time(rule.at_ms, topic_map.nulls)
    attributes = _attributes(topic_map, rule)

    def make(scope: Scope) -> Made:
        user_id = user(scope)
        event: dict[str, Any] = {"user_id": user_id, "attributes": attributes(scope)}
        if at_ms is not None and (found := at_ms(scope)) is not None:
            event["at_ms"] = found
        return user_id, event

    return make


def _attributes(topic_map: TopicMap, rule: Rule) -> Callable[[Scope], dict[str, Any]]:
    nulls = topic_map.nulls
    named = [(name, fields.attribute(one, nulls)) for name, one in rule.attributes.items()]
    every = None
    if rule.attributes_from is not None:
        every = fields.attributes_from(rule.attributes_from, nulls, topic_map.patches)

    def read(scope: Scope) -> dict[str, Any]:
        found = {} if every is None else every(scope)
        for name, get in named:
            if (value := get(scope)) is not None:
                found[name] = value
        return found

    return read


def deleter(topic_map: TopicMap, name: str) -> Callable[[Scope], Made]:
    """The delete of a record without a value: its id by the map's field, else its whole key."""
    field = getattr(topic_map.fields, name)
    for rule in topic_map.rule:
        field = field or getattr(rule, name)
    get = None if field is None else fields.identity(name, field, topic_map.nulls)
    whole_key = fields.identity(name, "$key", topic_map.nulls)

    def make(scope: Scope) -> Made:
        found = None if get is None else get(scope)
        if found is None and not isinstance(scope.source.decoded_key(), dict | list):
            found = whole_key(scope)
        if found is None:
            raise Rejected("missing_field", name, f"the key {quote(scope.source.key)} has none")
        return found, None

    return make


def required(name: str, field: fields.Spec | None, topic_map: TopicMap) -> Getter:
    """An id that every record has. Raises ValueError without a field."""
    if field is None:
        raise ValueError(f"a rule needs {name}")
    return fields.identity(name, field, topic_map.nulls, required=True)


def _check_kinds(topic_map: TopicMap) -> None:
    allowed = (*KINDS, IGNORE)
    for name, entry in topic_map.kinds.items():
        kind = entry if isinstance(entry, str) else entry.kind
        if kind not in allowed:
            raise ValueError(f"kinds: {name!r} = {kind!r}: expected one of {', '.join(allowed)}")
    if topic_map.other_kinds not in (*allowed, "refuse"):
        raise ValueError(f"other_kinds = {topic_map.other_kinds!r}: expected refuse or a kind")
