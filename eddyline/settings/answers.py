"""Settings of what an answer is made of after its fusion: docs/answers.md."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from eddyline.errors import SettingsError
from eddyline.schema.events import LISTS
from eddyline.settings.field import within
from eddyline.settings.worker import names_of

LIMITS_MAX = 8
MOST_MAX = 1_000


class AnswerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Answers: limits, diversity, editorial rules, pages."""

    answer_limits: Annotated[str, Meta(max_length=1_000)] = ""
    """The most items of an answer with the same value of an attribute, `name=most,…`, such as
    `categories=3,brand=2`; for `categories`, `tags` and the attributes of `filter_texts`. A request
    may have its own. Where other items run out, items beyond a limit fill the answer."""
    diversity: Annotated[float, within(0, 1)] = 0.0
    """How much the items of an answer shall differ from each other (maximal marginal relevance), of
    a request that does not say; 0 keeps the order of the fusion."""
    rules_file: Annotated[str, Meta(max_length=4_096)] = ""
    """A TOML file of editorial rules: pin, boost, deny. It is read again within seconds of a
    change; `eddyline rules check` checks one. Empty: no rules."""
    quota_young: Annotated[float, within(0, 0.5)] = 0.0
    """The share of an answer's positions for items with few clicks, which a learned fusion never
    shows: 0.1 is one in ten, the last of each ten. An item of the answer that is young anyway
    counts."""
    quota_young_clicks: Annotated[int, within(0, 1_000_000)] = 20
    """The most clicks of a young item, decayed as in the list of `popular`. Items beyond that list
    may have as many as its last one: raise `popular_limit` if that is more."""
    quota_fresh: Annotated[float, within(0, 0.5)] = 0.0
    """The share of an answer's positions for items whose `at_ms` is not long ago."""
    quota_fresh_h: Annotated[int, within(1, 87_600)] = 24
    """How many hours an item is fresh after its `at_ms`."""
    quota_every: Annotated[int, within(1, 1_000)] = 3
    """One in so many answers has the quotas: their cost falls with it, and what they show."""
    quota_items: Annotated[float, within(0, 1)] = 1.0
    """The share of the items that quotas may show, by a hash of their ids. Below 1, what became of
    the others says what the quotas are good for."""
    cursor_s_max: Annotated[int, within(1, 604_800)] = 3_600
    """How long after a page its cursor gives the next one."""


def limits_of(listed: str) -> dict[str, int]:
    """Attribute -> most of `answer_limits`. Raises SettingsError for what is not `name=most`.

    >>> limits_of("categories=3, brand=2"), limits_of("")
    ({'categories': 3, 'brand': 2}, {})
    """
    found: dict[str, int] = {}
    for part in names_of(listed) if listed.strip() else ():
        name, equals, number = part.partition("=")
        name, number = name.strip(), number.strip()
        most = int(number) if equals and number.isascii() and number.isdigit() else 0
        if not name or not 1 <= most <= MOST_MAX:
            raise SettingsError(
                f"answer_limits = {listed!r}: {part!r} is not name=most with a most of "
                f"1 … {MOST_MAX:,}"
            )
        if name in found:
            raise SettingsError(f"answer_limits = {listed!r}: {name!r} is named twice")
        found[name] = most
    if len(found) > LIMITS_MAX:
        raise SettingsError(
            f"answer_limits = {listed!r}: {len(found)} attributes, allowed are 0 … {LIMITS_MAX}"
        )
    return found


def check(settings: Any) -> None:
    """Raise SettingsError for limits of attributes whose texts the index does not have."""
    for name in settings.answer_limit_of:
        if name not in LISTS and name not in settings.filter_text_names:
            raise SettingsError(
                f"answer_limits = {settings.answer_limits!r}: {name!r} is neither "
                f"{' nor '.join(LISTS)}, nor in filter_texts = {settings.filter_texts!r}"
            )
