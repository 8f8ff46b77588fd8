"""A compiled map: one record in, the records in Eddyline's own format out.

A record is mapped as a whole: if one of its events is refused, all are. So the replay of its dead
letter is exactly-once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from eddyline.errors import Rejected, SettingsError
from eddyline.schema.events import ID_BYTES_MAX, ORIGIN_MS, Click
from eddyline.schema.mapping import fields, flat, spec
from eddyline.schema.mapping.envelopes import ENVELOPES, decoded
from eddyline.schema.mapping.fields import IGNORE
from eddyline.schema.mapping.flat import MappedClick
from eddyline.schema.mapping.makers import Made, Maker, deleter, maker, required
from eddyline.schema.mapping.paths import Getter, Scope, Source, compile_path
from eddyline.schema.mapping.registry import Access, Registry
from eddyline.schema.mapping.spec import EVENTS_MAX, Rule, TopicMap
from eddyline.schema.records import MAPPED, ONLY_MAPPED, BuiltRecord, Headers, Record, mark_of

log = logging.getLogger(__name__)

# Headers of Eddyline's own that a mapped record keeps; what a replay of dead letters adds.
_KEPT_HEADERS = frozenset({"produced_us", ORIGIN_MS})
REPLAYED_FROM = "replayed_from"
_MADE = {"clicks": "event", "items": "item", "users": "profile"}
_MAY_MAKE = {
    "clicks": ("event", "merge", "ignore"),
    "items": ("item", "delete", "ignore"),
    "users": ("profile", "delete", "ignore"),
}
# What JSON cannot hold: half of a surrogate pair, a number of more than 64 bits.
_UNFIT = (UnicodeEncodeError, OverflowError, ValueError, TypeError, RecursionError)
_OF_EVERY_RULE = ("make", "where", "each")
# What a rule may name, by what it makes.
_FIELDS = {
    "event": set("user_id item_id at_ms kind weight event_id impression_id context".split()),
    "merge": {"user_id", "merge_into", "at_ms"},
    "item": set(
        "item_id title categories tags available at_ms vector attributes attributes_from".split()
    ),
    "profile": {"user_id", "at_ms", "attributes", "attributes_from"},
    "delete": {"item_id", "user_id"},
    "ignore": set[str](),
}
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class _CompiledRule:
    """A rule.

    holds: its conditions; each: the lists that it goes through
    has_own_ids: each element has an event id, not the record for all
    identify: the item's id alone, of rules for items
    """

    holds: Sequence[Callable[[Scope], bool]]
    each: Sequence[Getter]
    make: Maker
    has_own_ids: bool
    identify: Getter | None


class Mapper:
    """The map of one topic. Thread rule: any thread.

    by_key:  the item's partition is that of the record's key, see `spec.TopicMap.partition`
    patches: records of items are patches
    """

    def __init__(self, topic_map: TopicMap, topic: str, registry: Registry | None = None) -> None:
        """topic: clicks, items or users; registry: of a map with `encoding = "registry"`

        Raises ValueError for what the map must not say.
        """
        self._decode = None
        if topic_map.encoding == "registry":
            if registry is None:
                raise ValueError("encoding = 'registry' needs the setting registry_url")
            self._decode = registry.decoded
        self.by_key = topic_map.partition == "key"
        if self.by_key and topic != "items":
            raise ValueError("partition = 'key' is for items: others lie in their user's partition")
        self.patches = topic_map.patches
        if self.patches and topic != "items":
            raise ValueError("patches = true is for items")
        if topic_map.fields.where:
            raise ValueError("fields: a `where` belongs into a rule")
        _check_fields(
            "fields",
            topic_map.fields,
            {name for make in _MAY_MAKE[topic] for name in _FIELDS[make]},
        )
        self._topic = topic
        self._envelope = ENVELOPES[topic_map.envelope]
        self._ignored_deletes = topic == "clicks" and topic_map.envelope == "debezium"
        self._otherwise = topic_map.otherwise
        self._each = [compile_path(topic_map.each)] if topic_map.each is not None else []
        self._id_field = "item_id" if topic == "items" else "user_id"
        rules = topic_map.rule or [Rule()]
        self._rules = [_compile_rule(topic_map, rule, topic) for rule in rules]
        if self._each and any(rule.make == "merge" for rule in rules):
            raise ValueError("make = 'merge': a map with `each` has events only")
        only = self._rules[0]
        self._is_flat = not (len(rules) > 1 or only.holds or only.each or self._each)
        self._flat: Callable[[Any], Click | None] | None = None
        made = {rules[0].make, topic_map.fields.make} <= {None, "event"}
        if self._is_flat and topic == "clicks" and made:
            both = _with_defaults(rules[0], topic_map.fields)
            self._flat = flat.compile_click(topic_map, both)
        self._delete = None if topic == "clicks" else deleter(topic_map, self._id_field)

    def records(self, record: Record) -> list[BuiltRecord]:
        """The records that this one becomes, none where the map ignores it.

        Raises Rejected, RegistryUnavailable.
        """
        source = Source(record.key, record.headers, self._decode)
        op, here = self._envelope(source, record.value)
        if op == "put":
            scope = Scope(here, None, source)
            made = self._put_one(scope, record) if self._is_flat else self._put(scope, record)
        elif op == "delete":
            made = self._deleted(Scope(here, None, source))
        else:
            made = []
        if not made:
            return []
        headers = ONLY_MAPPED
        if record.headers:
            headers = [MAPPED, *(h for h in record.headers if h[0] in _KEPT_HEADERS)]
        topic, partition = record.topic, record.partition
        offset, ms, found = record.offset, record.timestamp, []
        for key, event in made:
            try:
                own_key, value = key.encode(), None if event is None else _encode(event)
            except _UNFIT as error:
                raise Rejected("bad_field", "", f"a value cannot be kept: {error}"[:160]) from None
            found.append(BuiltRecord(topic, partition, offset, ms, own_key, value, headers))
        return found

    def named(self, record: Record) -> list[str]:
        """The items that a record names, also one of which no events can be made.

        Raises Rejected where nothing can be read.
        """
        with suppress(Rejected):
            return [(one.key or b"").decode() for one in self.records(record)]
        source, found = Source(record.key, record.headers, self._decode), []
        _, here = self._envelope(source, record.value)
        whole = Scope(here, None, source)
        for scope in _elements(whole, self._each) if self._each else (whole,):
            rule = self._rule(scope)
            if rule is None or rule.identify is None:
                continue
            for inner in _elements(scope, rule.each):
                with suppress(Rejected):
                    if item_id := rule.identify(inner):
                        found.append(item_id)
        return found[:EVENTS_MAX]

    def click(self, record: Record) -> MappedClick | None:
        """The one event that a plain record of a flat map becomes; None: `records` has to map it.

        Raises as `records` does.
        """
        if self._flat is None or record.value is None:
            return None
        sent, headers = record.headers, ONLY_MAPPED
        if sent and mark_of(sent) is not None:
            return None
        event = self._flat((self._decode or decoded)(record.value))
        if event is None:
            return None
        if sent:
            if event.event_id is None:  # a header may have it
                return None
            headers = [MAPPED, *(h for h in sent if h[0] in _KEPT_HEADERS)]
        return MappedClick(
            record.topic,
            record.partition,
            record.offset,
            record.timestamp,
            headers,
            event,
            record,
            self.records,
        )

    def _put_one(self, scope: Scope, record: Record) -> list[Made]:
        """`_put` for a map with one rule that always holds and has no `each`."""
        one = self._rules[0].make(scope)
        if one is None:
            return []
        if self._topic == "clicks":
            _identify(one[1], record, None, has_own_ids=True)
        return [one]

    def _put(self, whole: Scope, record: Record) -> list[Made]:
        made: list[Made] = []
        for scope in _elements(whole, self._each) if self._each else (whole,):
            rule = self._rule(scope)
            if rule is None:
                if self._otherwise == IGNORE:
                    continue
                raise Rejected("no_rule", "", "no rule of the map holds for the record")
            several = bool(rule.each or self._each)
            for inner in _elements(scope, rule.each) if rule.each else (scope,):
                if (one := rule.make(inner)) is None:
                    continue
                if self._topic == "clicks":
                    _identify(one[1], record, len(made) if several else None, rule.has_own_ids)
                made.append(one)
                if len(made) > EVENTS_MAX:
                    detail = f"the record has more than {EVENTS_MAX} events"
                    raise Rejected("too_many_events", "", detail)
        return made

    def _rule(self, scope: Scope) -> _CompiledRule | None:
        for rule in self._rules:
            for holds in rule.holds:
                if not holds(scope):
                    break
            else:
                return rule
        return None

    def _deleted(self, scope: Scope) -> list[Made]:
        if self._delete is not None:
            return [self._delete(scope)]
        if self._ignored_deletes:  # an event happened, whatever becomes of its row
            return []
        raise Rejected("no_value", "", "the record has no value")


def of(source: str, topic: str, access: Access | None = None) -> Mapper | None:
    """The compiled map of a setting; None for Eddyline's own format.

    source: a preset's name or a file; it is read once by a process
    access: to the schema registry, if there is one
    Raises SettingsError.
    """
    return _of(source, topic, access) if source else None


@lru_cache(maxsize=32)
def _of(source: str, topic: str, access: Access | None) -> Mapper | None:
    found = spec.read(source, topic)
    if found is None:
        return None
    digest = hashlib.sha256(msgspec.json.encode(found)).hexdigest()
    log.info("map in force", extra={"topic": topic, "map": source, "sha256": digest[:16]})
    return compiled(found, topic, source, None if access is None else _registry(access))


@lru_cache(maxsize=8)
def _registry(access: Access) -> Registry:
    """The registry, whose schemas all topics share."""
    return Registry(access, decoded)


def compiled(
    topic_map: TopicMap, topic: str, name: str, registry: Registry | None = None
) -> Mapper:
    """The mapper of a map. name: of its file, for messages. Raises SettingsError."""
    try:
        return Mapper(topic_map, topic, registry)
    except ValueError as error:
        raise SettingsError(f"{name}: [{topic}]: {error}") from None


def _compile_rule(topic_map: TopicMap, rule: Rule, topic: str) -> _CompiledRule:
    made = rule.make or topic_map.fields.make or _MADE[topic]
    if made not in _MAY_MAKE[topic]:
        raise ValueError(f"make = {made!r}: {topic} has {', '.join(_MAY_MAKE[topic])}")
    _check_fields(f"a rule that makes {made}", rule, _FIELDS[made])
    both = _with_defaults(rule, topic_map.fields)
    each = [both.each] if isinstance(both.each, str) else both.each
    return _CompiledRule(
        [fields.condition(path, wanted) for path, wanted in rule.where.items()],
        [compile_path(path) for path in each],
        maker(topic_map, both, made),
        both.event_id is not None and fields.is_relative(both.event_id),
        None if both.item_id is None else required("item_id", both.item_id, topic_map),
    )


def _check_fields(where: str, rule: Rule, allowed: Set[str]) -> None:
    """Raise ValueError for a field that would be ignored."""
    for name in Rule.__struct_fields__:
        if name not in _OF_EVERY_RULE and name not in allowed and getattr(rule, name):
            raise ValueError(f"{where}: has no {name}, but {', '.join(sorted(allowed))}")


def _with_defaults(rule: Rule, defaults: Rule) -> Rule:
    """The rule; what it leaves open is taken from `defaults`."""
    return Rule(
        **{
            name: getattr(rule, name) or getattr(defaults, name)
            for name in Rule.__struct_fields__
            if name not in ("make", "where")
        }
    )


def _elements(scope: Scope, each: Sequence[Getter]) -> Iterator[Scope]:
    """The elements of the innermost list. An object counts as a list of one."""
    if not each:
        yield scope
        return
    found = each[0](scope)
    for one in found if isinstance(found, list) else () if found is None else (found,):
        yield from _elements(Scope(one, scope, scope.source), each[1:])


def _identify(
    event: dict[str, Any] | None, record: Record, number: int | None, has_own_ids: bool
) -> None:
    """Give an event its id: one of its own, the same wherever the record is read.

    number: of the event in its record; None where the record has one event
    """
    if event is None or "item_id" not in event:  # a merge
        return
    own = event.get("event_id")
    if number is None or (has_own_ids and own is not None):
        base = own or _replayed_from(record.headers)
    else:
        at = _replayed_from(record.headers) or f"{record.topic}/{record.partition}/{record.offset}"
        base = f"{own or at}#{number}"
    if base is not None:
        event["event_id"] = _short(base)


def _replayed_from(headers: Headers) -> str | None:
    """The coordinates of the record that a replayed one was; None for any other."""
    if not headers:
        return None
    found = next((value for name, value in headers if name == REPLAYED_FROM), None)
    return None if found is None else bytes(found).decode("utf-8", "replace")


def _short(event_id: str) -> str:
    """The id, or its digest where it is too long for one."""
    if len(event_id) <= ID_BYTES_MAX // 4 or len(event_id.encode(errors="replace")) <= ID_BYTES_MAX:
        return event_id
    return "sha256:" + hashlib.sha256(event_id.encode(errors="replace")).hexdigest()
