"""Guess the map of a table: which column is what, by its name first and by its values then.

Records with objects in them go to `eddyline.schema.mapping.guess`. What is guessed is shown before
anything is sent, and is a file that can be edited.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from eddyline.schema.mapping import guess, values
from eddyline.schema.mapping.guess import Seen, bare, segment, toml_key, toml_table, toml_text

SAMPLE_ROWS = 5_000
# Distinct values that a rating has at most.
_RATINGS_MAX = 64
# A rating of at least this part of the highest one is a like, up to the other a dislike.
_LIKED, _DISLIKED = 0.8, 0.4
_ATTRIBUTES_MAX = 48
# Part of the values that must have a separator, and mean length of the labels between.
_SEPARATED, _LABEL_CHARS = 0.2, 30
_SEPARATORS = ("|", ";", ",")

# Names without case and signs, after those of `guess.NAMES`.
_MORE = {
    "user_id": "uid reviewerid reviewer shopper buyer buyerid client guest guestid customerno "
    "customernumber usernumber userno",
    "item_id": "movie film filmid book bookid isbn song songid imdbid parentasin artistid artist "
    "itemno productno productcode itemcode articleno gameid game recipeid placeid businessid",
    "at_ms": "unixreviewtime reviewtime ratedat ratingtime orderdate purchasedate transactiondate "
    "eventtimestamp unixtime epoch visitedat when",
    "rating": "rating ratings stars star score overall userrating reviewscore",
    "categories": "maincategory categoryname categorycode subcategory producttype section",
    "quantity": "quantity qty count units",
    "title": "productname movietitle booktitle film moviename",
}
_NAMES = {
    name: f"{guess.NAMES.get(name, '')} {_MORE.get(name, '')}".split()
    for name in (*guess.NAMES, "rating", "quantity")
}
# What the name of a file says of it, if the columns do not.
_STEMS = {
    "users": ("user", "customer", "member", "visitor"),
    "items": ("movie", "item", "product", "article", "catalog", "book", "song", "film"),
}
# Part of the items that may have no price in the sample, in a table where all items have one.
_FREE_PART_MAX = 0.02
# Columns that make an event a purchase, and times that an item's record has of its own.
_ORDERS = re.compile(r"invoice|order|purchase|transaction|receipt|basket")
_CHANGES = re.compile(r"updated|modified|changed|created|^ts$|^timestamp$|^atms$")


@dataclass(slots=True)
class Table:
    """A sample of a table: its columns, in order, and what is known of them."""

    rows: Sequence[dict[str, Any]]
    stem: str
    seen: dict[str, Seen] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name in dict.fromkeys(name for row in self.rows for name in row):
            self.seen.setdefault(segment(name), Seen())
        self.seen |= guess.paths_of(self.rows)

    def take(self, name: str) -> str:
        """The column that is this field, once; empty for none."""
        ranks = {known: rank for rank, known in reversed([*enumerate(_NAMES[name])])}
        best: tuple[int, int, str] | None = None
        for number, (column, one) in enumerate(self.seen.items()):
            rank = min(ranks.get(part, 999) for part in _words(column, name))
            if column in self.taken or rank == 999 or not _fits(one, name):
                continue
            if best is None or (rank, number, column) < best:
                best = (rank, number, column)
        if best is None:
            return ""
        self.taken.add(best[2])
        return best[2]

    def column(self, name: str) -> str:
        """The column of exactly this name, without case; empty for none."""
        return next((one for one in self.seen if bare(one) == name), "")


def is_table(records: Sequence[Any]) -> bool:
    """Whether all records are objects with scalars and lists of scalars only."""
    return all(
        isinstance(record, dict)
        and not any(
            isinstance(value, dict)
            or (isinstance(value, list) and any(isinstance(one, dict | list) for one in value))
            for value in record.values()
        )
        for record in records
    )


def guess_map(records: Sequence[Any], stem: str, topic: str = "") -> str:
    """The text of a map for these rows.

    records: decoded from JSON; stem: the file's name without endings; topic: empty to guess it too
    A table of events that also describes items gets a table for `items`.
    """
    objects = [one for one in records if isinstance(one, dict)]
    if preset := guess.preset_of(objects):
        of_events = preset in ("segment", "snowplow", "ga4")
        topic = topic or ("clicks" if of_events else guess.topic_of(objects))
        return f'[{topic}]\npreset = "{preset}"\n'
    if not is_table(objects):
        return guess.guess(records, topic or guess.topic_of(objects))
    table = Table(objects, stem.lower())
    if all(re.fullmatch(r"column\d+", name) for name in table.seen):
        return _unnamed(table, topic)
    topic = topic or _topic(table)
    if topic == "items":
        return _items(table)
    return _users(table) if topic == "users" else _clicks(table)


def _topic(table: Table) -> str:
    probe = Table(table.rows, table.stem)
    user, item = probe.take("user_id"), probe.take("item_id")
    if user and item:
        return "clicks"
    hint = next((t for t, stems in _STEMS.items() if any(s in table.stem for s in stems)), "")
    if user or item:
        return "users" if user else "items"
    return hint or "items"


def _clicks(table: Table) -> str:
    found: dict[str, str] = {}
    where, kinds, other = "", "", ""
    found["user_id"] = _identity(table, table.take("user_id"))
    found["item_id"] = _identity(table, table.take("item_id"))
    if at := table.take("at_ms"):
        found["at_ms"] = _time(table, at)
    if kind := table.take("kind"):
        found["kind"] = toml_text(kind)
        names = sorted(table.seen[kind].texts)
        kinds = ", ".join(f"{toml_key(one)} = {toml_text(guess.kind_of(one))}" for one in names)
    elif rating := table.take("rating"):
        found["kind"] = toml_table(path=rating, type="text")
        kinds, other = _rated(table.seen[rating]), "click"
    elif order := next((one for one in table.seen if _ORDERS.search(bare(one))), ""):
        found["kind"] = toml_table(const="purchase")
        table.taken.add(order)
    if event_id := _unique(table, table.take("event_id") or table.column("id")):
        found["event_id"] = toml_text(event_id)
    quantity = table.take("quantity")
    if quantity and any(str(one).startswith("-") for one in table.seen[quantity].values):
        where = f"{{ {toml_key(quantity)} = {{ above = 0 }} }}"  # less is a cancellation
    lines = ["[clicks]"]
    lines += ['otherwise = "ignore"'] if where else []
    lines += [f"kinds = {{ {kinds} }}"] if kinds else []
    lines += [f"other_kinds = {toml_text(other)}"] if other else []
    lines += ["[clicks.fields]", *(f"{name} = {one}" for name, one in found.items() if one)]
    lines += ["[[clicks.rule]]", f"where = {where}"] if where else []
    text = "\n".join(lines) + "\n"
    item = next(
        (one for one in table.seen if found["item_id"] and toml_text(one) in found["item_id"]), ""
    )
    return text + _described_items(table, item)


def _described_items(table: Table, item: str) -> str:
    """The map of items for a table of events whose rows have the item's title."""
    title = table.take("title") if item else ""
    if not title:
        return ""
    constant = [column for column in table.seen if _follows(table.rows, item, column)]
    table.taken |= table.seen.keys() - {*constant, title}
    text = _items(table, item, title)
    wanted = [f"{toml_key(title)} = {{ exists = true }}"]
    wanted += [
        f"{toml_key(column)} = {{ above = 0 }}"
        for column in constant
        if "price" in bare(column) and _is_paid(table.rows, item, column)
    ]
    rule = f"where = {{ {', '.join(wanted)} }}"
    return (
        text.replace("[items]\n", '[items]\notherwise = "ignore"\n') + f"[[items.rule]]\n{rule}\n"
    )


def _items(table: Table, item: str = "", title: str = "") -> str:
    item = item or table.take("item_id") or table.column("id") or next(iter(table.seen), "")
    table.taken.add(item)
    title = title or table.take("title")
    found = {"item_id": _identity(table, item), "title": toml_text(title) if title else ""}
    for name in ("categories", "tags"):
        if column := table.take(name):
            found[name] = _labels(table, column)
    if available := table.take("available"):
        found["available"] = toml_text(available)
    elif stock := table.take("stock"):
        found["available"] = toml_table(path=stock, above=0)
    at = next((one for one in table.seen if _CHANGES.search(bare(one))), "")
    if at and at not in table.taken and guess.time_format(table.seen[at].values):
        table.taken.add(at)
        found["at_ms"] = _time(table, at)
    return _with_attributes(table, "items", found)


def _users(table: Table) -> str:
    user = table.take("user_id") or table.column("id") or next(iter(table.seen), "")
    table.taken.add(user)
    return _with_attributes(table, "users", {"user_id": _identity(table, user)})


def _with_attributes(table: Table, topic: str, found: dict[str, str]) -> str:
    lines = [f"[{topic}]", f"[{topic}.fields]"]
    lines += [f"{name} = {one}" for name, one in found.items() if one]
    rest = [one for one in table.seen if one not in table.taken][:_ATTRIBUTES_MAX]
    if rest:
        lines.append(f"[{topic}.fields.attributes]")
    for column in rest:
        numeric = _is_numeric(table.seen[column])
        value = toml_table(path=column, type="number") if numeric else toml_text(column)
        lines.append(f"{toml_key(_name(column))} = {value}")
    return "\n".join(lines) + "\n"


def _unnamed(table: Table, topic: str) -> str:
    """A file without header: a time makes it a table of events, user, item, rating in this order.

    Else it is one of items: id, title, and what has separators is categories.
    """
    columns = list(table.seen)
    times = [one for one in columns[2:] if guess.time_format(table.seen[one].values)]
    if topic == "clicks" or (not topic and times and len(columns) >= 3):
        names = ["user_id", "item_id"]
        ratings = [
            one for one in columns[2:] if one not in times and _fits(table.seen[one], "rating")
        ]
        lines = ["[clicks]"]
        if ratings:
            lines += [f"kinds = {{ {_rated(table.seen[ratings[0]])} }}", 'other_kinds = "click"']
        lines.append("[clicks.fields]")
        lines += [f"{n} = {_identity(table, c)}" for n, c in zip(names, columns, strict=False)]
        lines += [f"at_ms = {_time(table, times[0])}"] if times else []
        lines += [f"kind = {toml_table(path=ratings[0], type='text')}"] if ratings else []
        return "\n".join(lines) + "\n"
    if topic == "users":
        return _users(table)
    table.taken = {columns[0], *columns[1:2]}
    found = {"item_id": _identity(table, columns[0])}
    if len(columns) > 1:
        found["title"] = toml_text(columns[1])
    labels = next((one for one in columns[2:] if _separator(table.seen[one])), "")
    if labels:
        table.taken.add(labels)
        found["categories"] = _labels(table, labels)
    return _with_attributes(table, "items", found)


def _fits(seen: Seen, name: str) -> bool:
    if name == "rating":
        return len(seen.texts) <= _RATINGS_MAX and _is_numeric(seen)
    return _is_numeric(seen) if name in ("stock", "weight", "quantity") else guess.fits(seen, name)


def _is_paid(rows: Sequence[dict[str, Any]], item: str, column: str) -> bool:
    """Whether nearly every item has a price somewhere: a line without one is no sale then.

    Its title is often a remark ("damaged"). Where many items are free, it is their price.
    """
    paid: set[str] = set()
    free: set[str] = set()
    for row in rows:
        number = values.number(row.get(column))
        if number is not values.BAD:
            (paid if number > 0 else free).add(str(row.get(item)))
    return len(free - paid) <= _FREE_PART_MAX * len(paid | free)


def _follows(rows: Sequence[dict[str, Any]], item: str, column: str) -> bool:
    """Whether a column says something of the item: it is more alike within an item than without."""
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.get(item) is not None and row.get(column) is not None:
            groups[str(row[item])].append(str(row[column]))
    pairs = [pair for group in groups.values() for pair in pairwise(group)]
    counts = Counter(value for group in groups.values() for value in group)
    total = sum(counts.values())
    if not pairs:
        return column != item and bool(total)
    within = sum(one == other for one, other in pairs) / len(pairs)
    by_chance = sum(n * n for n in counts.values()) / total**2
    return within >= 0.5 and 1 - within <= 0.5 * (1 - by_chance)


def _rated(seen: Seen) -> str:
    """Kinds by rating: the highest are likes, the lowest dislikes."""
    ratings = {str(values.text(one)): float(values.number(one)) for one in seen.texts}
    top = max(ratings.values(), default=0.0)
    pairs = sorted((number, text) for text, number in ratings.items())
    return ", ".join(
        f"{toml_key(text)} = "
        + ('"like"' if n >= _LIKED * top else '"dislike"' if n <= _DISLIKED * top else '"click"')
        for n, text in pairs
    )


def _identity(table: Table, column: str) -> str:
    """An id; `17850.0`, as some writers have it, is `17850`."""
    if not column:
        return ""
    texts = [one for one in table.seen[column].values if isinstance(one, str)]
    if texts and all(re.fullmatch(r"\d{1,15}\.0", one.strip()) for one in texts):
        return toml_table(path=column, type="integer")
    return toml_text(column)


def _time(table: Table, column: str) -> str:
    return toml_table(path=column, format=guess.time_format(table.seen[column].values))


def _labels(table: Table, column: str) -> str:
    separator = _separator(table.seen[column])
    return toml_table(path=column, split=separator) if separator else toml_text(column)


def _separator(seen: Seen) -> str:
    texts = [one for one in seen.values if isinstance(one, str)]
    for separator in _SEPARATORS:
        count = sum(separator in one for one in texts)
        labels = [label for one in texts for label in one.split(separator)]
        if texts and count >= _SEPARATED * len(texts):
            if sum(map(len, labels)) <= _LABEL_CHARS * len(labels):
                return separator
    return ""


def _unique(table: Table, column: str) -> str:
    """The column, if no value of it occurs twice; an order's number is no event's id."""
    if not column:
        return ""
    found = [row.get(column) for row in table.rows]
    present = [str(one) for one in found if one is not None]
    return column if len(present) == len(found) == len(set(present)) else ""


def _is_numeric(seen: Seen) -> bool:
    return guess.is_numeric([*seen.values, *seen.texts])


def _words(column: str, name: str) -> set[str]:
    """The column's name as it stands in the lists: whole, and with `id` for an identity."""
    whole = bare(column)
    return {whole, f"{whole}id"} if name in ("user_id", "item_id") else {whole}


def _name(column: str) -> str:
    """The column's own name, of its path."""
    return str(json.loads(column)) if column.startswith('"') else column
