"""Editorial rules: pin, boost or deny items, by id or by a value, in a time window and a scene.

They are a TOML file with a version:

    version = "2026-12-01"

    [[pin]]
    name = "advent calendar"
    items = ["calendar-24"]
    position = 1
    scene = "home"
    from = 2026-12-01T00:00:00Z
    until = 2026-12-25T00:00:00Z

    [[boost]]
    name = "own brand"
    attribute = "brand"
    values = ["Acme"]
    factor = 2.0

    [[deny]]
    name = "recall of November"
    items = ["toaster-7"]
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from eddyline.errors import EddylineError
from eddyline.schema.answers import LABEL_BYTES_MAX
from eddyline.schema.events import ID_BYTES_MAX, LISTS, quote
from eddyline.schema.id_form import IdForm, in_form, normal
from eddyline.settings.loader import Settings
from index.filters import TEXT_VALUES_MAX, Filter
from index.port import Term
from serving.rules.arms import Arm, Arms, why_not

FILE_BYTES_MAX = 1_048_576
RULES_MAX = 500
ITEMS_MAX = 1_000
# In all rules together: they are left out of every look-up.
DENIED_ITEMS_MAX = 2_000
DENIED_VALUES_MAX = 64
# Each costs an answer one more recall.
PINS_BY_VALUE_MAX = 4
POSITION_MAX = 1_000
FACTOR_MIN, FACTOR_MAX = 0.01, 100.0
# An item names so many of the rules that boost it.
BOOSTS_NAMED_MAX = 4
_EVER = 2**63 - 1
NO_ARMS = Arms()


class RulesRejected(EddylineError):
    """A rules file that cannot be used; the message names the rule and the field."""


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all rules have. Either items, or an attribute and some of its values.

    begins, until: with a time zone; None: always, for ever. `until` itself is past
    scene: "" for all
    """

    name: str
    items: list[str] = []
    attribute: str = ""
    values: list[str] = []
    scene: str = ""
    begins: datetime | None = msgspec.field(default=None, name="from")
    until: datetime | None = None

    @property
    def terms(self) -> list[Term]:
        """The values as terms, see `IndexReader.terms_of`."""
        return [(self.attribute, value) for value in self.values]

    @property
    def filter(self) -> Filter:
        """Passes the items with one of the values."""
        return filter_of(self.attribute, self.values)

    def window_ms(self) -> tuple[int, int]:
        """(first millisecond since 1970 in which it holds, first one in which it no longer does)"""
        begins = -_EVER if self.begins is None else round(self.begins.timestamp() * 1000)
        return begins, _EVER if self.until is None else round(self.until.timestamp() * 1000)


class Pin(Rule, frozen=True, kw_only=True):
    """Puts items at a position, further ones at the next.

    most: with values: how many items of them, the first ones by the fusion
    """

    position: Annotated[int, Meta(ge=1, le=POSITION_MAX)] = 1
    most: Annotated[int, Meta(ge=1, le=10)] = 1


class Boost(Rule, frozen=True, kw_only=True):
    """Divides an item's rank in the fused list by the factor; below 1 moves it down."""

    factor: Annotated[float, Meta(ge=FACTOR_MIN, le=FACTOR_MAX)]


class Deny(Rule, frozen=True, kw_only=True):
    """Keeps items out of all answers."""


R = TypeVar("R", bound=Rule)


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: str
    experiment: Annotated[str, Meta(max_length=LABEL_BYTES_MAX)] = ""
    arm: list[Arm] = []
    pin: list[Pin] = []
    boost: list[Boost] = []
    deny: list[Deny] = []


@dataclass(frozen=True, slots=True)
class ActiveRules:
    """The rules that hold at a time in a scene.

    pins: by position, then by place in the file
    denied_items, denied_terms: to the name of the first rule
    boosted_items, boosted_terms: to (factor, name) of every rule
    """

    version: str = ""
    pins: Sequence[Pin] = ()
    denied_items: Mapping[str, str] = field(default_factory=dict)
    denied_terms: Mapping[Term, str] = field(default_factory=dict)
    boosted_items: Mapping[str, Sequence[tuple[float, str]]] = field(default_factory=dict)
    boosted_terms: Mapping[Term, Sequence[tuple[float, str]]] = field(default_factory=dict)

    @property
    def boosts(self) -> bool:
        """Whether any item is boosted."""
        return bool(self.boosted_items or self.boosted_terms)

    def boost_of(self, item_id: str, terms: Collection[Term]) -> tuple[float, list[str]]:
        """(product of the factors of an item with these terms, names of the first rules)."""
        found = [*self.boosted_items.get(item_id, ())]
        for term in sorted(terms):
            found += self.boosted_terms.get(term, ())
        factors = {name: factor for factor, name in found}
        return math.prod(factors.values()), [*factors][:BOOSTS_NAMED_MAX]


NO_RULES = ActiveRules()


class _Held(NamedTuple):
    """Active rules and the times, milliseconds since 1970, in which they are the same."""

    active: ActiveRules
    from_ms: int
    until_ms: int


class Known(NamedTuple):
    """What a file may refer to, of the settings.

    text_names: attributes whose values rules may name, besides categories and tags
    id_form:    of item ids, categories, tags and names of attributes
    fusion, paths: for arms
    """

    text_names: Collection[str] = ()
    id_form: IdForm = "nfc"
    fusion: str = "cascade"
    paths: Collection[str] = ()

    @classmethod
    def of(cls, settings: Settings) -> Known:
        """Of these settings."""
        return cls(
            settings.filter_text_names,
            settings.id_form,
            settings.fusion,
            settings.recall_path_names,
        )

    @property
    def attributes(self) -> tuple[str, ...]:
        """That rules and limits may name."""
        return (*LISTS, *sorted(self.text_names))


class EditorialRules:
    """The rules of one file. Thread rule: any thread.

    arms:  of the experiment
    rules: (pin, boost or deny, the rule), in the order of the file
    """

    def __init__(
        self,
        version: str = "",
        pins: Sequence[Pin] = (),
        boosts: Sequence[Boost] = (),
        denies: Sequence[Deny] = (),
        arms: Arms = NO_ARMS,
    ) -> None:
        """Rules that were checked; no rules by default."""
        self.arms = arms
        self.version = version
        self._pins, self._boosts, self._denies = pins, boosts, denies
        self.rules: list[tuple[str, Rule]] = [
            *(("pin", rule) for rule in pins),
            *(("boost", rule) for rule in boosts),
            *(("deny", rule) for rule in denies),
        ]
        every = [rule for _, rule in self.rules]
        self._scenes = frozenset(rule.scene for rule in every)
        self._ends = sorted({at for rule in every for at in rule.window_ms()})
        # By scene. A scene without rules of its own has those of "".
        self._held: dict[str, _Held] = {}

    def active(self, now_ms: int, scene: str) -> ActiveRules:
        """The rules that hold now."""
        if not self.rules:
            return NO_RULES if not self.version else ActiveRules(self.version)
        scene = scene if scene in self._scenes else ""
        held = self._held.get(scene)
        if held is None or not held.from_ms <= now_ms < held.until_ms:
            self._held[scene] = held = self._at(now_ms, scene)
        return held.active

    def _at(self, now_ms: int, scene: str) -> _Held:
        def holds(rule: Rule) -> bool:
            begins, until = rule.window_ms()
            return begins <= now_ms < until and rule.scene in ("", scene)

        denies = [rule for rule in self._denies if holds(rule)]
        boosted_items: dict[str, list[tuple[float, str]]] = {}
        boosted_terms: dict[Term, list[tuple[float, str]]] = {}
        for rule in filter(holds, self._boosts):
            for item_id in rule.items:
                boosted_items.setdefault(item_id, []).append((rule.factor, rule.name))
            for term in rule.terms:
                boosted_terms.setdefault(term, []).append((rule.factor, rule.name))
        active = ActiveRules(
            self.version,
            sorted(filter(holds, self._pins), key=lambda pin: pin.position),
            {one: rule.name for rule in reversed(denies) for one in rule.items},
            {term: rule.name for rule in reversed(denies) for term in rule.terms},
            boosted_items,
            boosted_terms,
        )
        before = max((at for at in self._ends if at <= now_ms), default=-_EVER)
        return _Held(active, before, min((at for at in self._ends if at > now_ms), default=_EVER))


def filter_of(attribute: str, values: Collection[str]) -> Filter:
    """Passes items that have one of these values of the attribute."""
    if attribute == "categories":
        return Filter(categories=frozenset(values))
    if attribute == "tags":
        return Filter(tags=frozenset(values))
    return Filter(texts={attribute: frozenset(values)})


def read(path: Path, known: Known) -> EditorialRules:
    """The rules of a file. Raises RulesRejected."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise RulesRejected(f"it cannot be read: {error.strerror}") from None
    return parse(data, known)


def parse(data: bytes, known: Known) -> EditorialRules:
    """As `read`, from the file's bytes."""
    if len(data) > FILE_BYTES_MAX:
        raise RulesRejected(f"it has more than {FILE_BYTES_MAX:,} bytes")
    try:
        table = tomllib.loads(data.decode())
        file = msgspec.convert(table, _File)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise RulesRejected(str(error)) from None
    _check_size("version", file.version, 1, LABEL_BYTES_MAX)
    if wrong := why_not(
        file.arm, attributes=known.attributes, fusion=known.fusion, paths=known.paths
    ):
        raise RulesRejected(wrong)
    made = EditorialRules(
        file.version,
        _in_form(file.pin, known.id_form),
        _in_form(file.boost, known.id_form),
        _in_form(file.deny, known.id_form),
        Arms(file.arm, file.experiment),
    )
    if len(made.rules) > RULES_MAX:
        raise RulesRejected(f"{len(made.rules)} rules, allowed are 0 … {RULES_MAX}")
    names: set[str] = set()
    for kind, rule in made.rules:
        where = f"{kind} {quote(rule.name)}"
        _check_size(f"name of a {kind}", rule.name, 1, LABEL_BYTES_MAX)
        if rule.name in names:
            raise RulesRejected(f"{where}: another rule has the same name")
        names.add(rule.name)
        _check(where, rule, known.attributes)
    by_value = sum(bool(pin.values) for pin in file.pin)
    if by_value > PINS_BY_VALUE_MAX:
        raise RulesRejected(f"{by_value} pins by values, allowed are 0 … {PINS_BY_VALUE_MAX}")
    _check_sum("items", [rule.items for rule in file.deny], DENIED_ITEMS_MAX)
    _check_sum("values", [rule.values for rule in file.deny], DENIED_VALUES_MAX)
    return made


def _check(where: str, rule: Rule, attributes: Sequence[str]) -> None:
    """Raise RulesRejected for a rule that cannot be used."""
    if bool(rule.items) == bool(rule.values) or bool(rule.values) != bool(rule.attribute):
        raise RulesRejected(f"{where}: name either items, or an attribute and values")
    for name, texts, most in (
        ("items", rule.items, ITEMS_MAX),
        ("values", rule.values, TEXT_VALUES_MAX),
    ):
        if len(texts) > most:
            raise RulesRejected(f"{where}: {name}: {len(texts)}, allowed are 1 … {most}")
        for text in texts:
            _check_size(f"{where}: {name}", text, 1, ID_BYTES_MAX)
    _check_size(f"{where}: scene", rule.scene, 0, LABEL_BYTES_MAX)
    if rule.attribute and rule.attribute not in attributes:
        raise RulesRejected(
            f"{where}: attribute: {quote(rule.attribute)}, allowed are {', '.join(attributes)}: "
            "the setting filter_texts names further ones"
        )
    for name, at in (("from", rule.begins), ("until", rule.until)):
        if at is not None and at.tzinfo is None:
            raise RulesRejected(f"{where}: {name}: {at} has no time zone, such as Z or +01:00")
    begins, until = rule.window_ms()
    if begins >= until:
        raise RulesRejected(f"{where}: until: {rule.until} is not after {rule.begins}")


def _check_size(where: str, text: str, least: int, most: int) -> None:
    size = len(text.encode())
    if not least <= size <= most:
        raise RulesRejected(f"{where}: {quote(text)} has {size} bytes, allowed: {least} … {most}")


def _check_sum(what: str, lists: Sequence[Sequence[str]], most: int) -> None:
    count = len({one for of_rule in lists for one in of_rule})
    if count > most:
        raise RulesRejected(f"{count} {what} in the deny rules, allowed are 0 … {most}")


def _in_form(rules: Sequence[R], id_form: IdForm) -> list[R]:
    """The rules with ids and values in the form that items have, each once."""
    made = []
    for rule in rules:
        attribute = in_form(rule.attribute, id_form)
        values = [
            in_form(value, id_form) if attribute in LISTS else normal(value)
            for value in rule.values
        ]
        items = [in_form(item_id, id_form) for item_id in rule.items]
        made.append(
            msgspec.structs.replace(
                rule,
                items=[*dict.fromkeys(items)],
                attribute=attribute,
                values=[*dict.fromkeys(values)],
            )
        )
    return made
