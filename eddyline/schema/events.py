"""Wire format of clicks, items and user profiles, as JSON.

One codec for every reader. It rejects and never repairs: an invalid record raises `Rejected` with
reason, field and value, and goes to the dead-letters topic. Unknown fields are ignored: an older
reader accepts records of a newer producer. Ids and labels are decoded in one form (`id_form`).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType

from eddyline.errors import Rejected
from eddyline.schema.id_form import IdForm, in_form, normal
from eddyline.schema.records import Record

Kind = Literal["click", "view", "like", "cart", "purchase", "dislike"]
KINDS: tuple[str, ...] = get_args(Kind)

# Keys live in Redis keys, gRPC answers and log lines; 256 bytes hold any id seen in practice.
ID_BYTES_MAX = 256
# A title is shown and hashed into trigrams; the longest of 9,742 film titles has 158 characters.
TITLE_CHARS_MAX = 1_000
LABELS_MAX = 64
ATTRIBUTES_MAX = 64
TEXT_CHARS_MAX = 256
# The text of an attribute: an image URL, a subtitle, a long name.
VALUE_CHARS_MAX = 1_000
VECTOR_LENGTH_MAX = 4_096
# The square root of the largest float32: larger values overflow in the item tower.
VECTOR_NUMBER_MAX = 1e19
# The last millisecond of the year 9999; larger values are microseconds.
AT_MS_MAX = 253_402_300_799_999
# The largest weight of one event.
WEIGHT_MAX = 100
# Quoted values are cut: dead-letter headers and log lines stay short.
QUOTE_CHARS_MAX = 80

Id = Annotated[str, Meta(min_length=1, max_length=ID_BYTES_MAX)]
Label = Annotated[str, Meta(min_length=1, max_length=TEXT_CHARS_MAX)]
AtMs = Annotated[int, Meta(ge=0, le=AT_MS_MAX)]
# Profiles and item records are stored as MessagePack, which ends at 64 bits.
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Scalar = str | int | float | bool
Value = Annotated[str, Meta(max_length=VALUE_CHARS_MAX)] | Integer | float | bool
Attributes = Annotated[dict[Label, Value], Meta(max_length=ATTRIBUTES_MAX)]
Labels = Annotated[list[Label], Meta(max_length=LABELS_MAX)]


class Click(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One event of one user on one item.

    event_id: the producer's id, equal in re-sends; if absent, the coordinates are the id
    at_ms:    event time, milliseconds since 1970 UTC; 0: as the record was appended
    weight:   above 0 and at most `WEIGHT_MAX`
    """

    user_id: Id
    item_id: Id
    at_ms: AtMs = 0
    kind: Kind = "click"
    event_id: Id | None = None
    weight: Annotated[float, Meta(gt=0, le=WEIGHT_MAX)] = 1.0
    context: Attributes | None = None
    impression_id: Id | None = None


class Merge(msgspec.Struct, frozen=True, kw_only=True):
    """In `clicks`, under the visitor's key: the visitor's history moves to another user.

    user_id: the visitor; merge_into: the user that the visitor turned out to be
    at_ms:   see `Click`
    """

    user_id: Id
    merge_into: Id
    at_ms: AtMs = 0

    @property
    def event_id(self) -> None:
        """None: a merge is idempotent, its coordinates are its id."""
        return None


class Forget(msgspec.Struct, frozen=True, kw_only=True):
    """Tombstone in `clicks`: the boundary of an erasure, see `schema.erasure`.

    Ingest writes it for a null record in `users`. The two topics have no common order, so reading
    `clicks` again (after Redis was emptied) would restore the user. Idempotent.

    forget_until_ms: the broker's time stamp of the null record
    keep_after_ms:   events before this record stay if they are dated later; None, in records of
                     older versions: `forget_until_ms`
    users_offset:    offset of the null record in `users`; -1: unknown
    ends_ms:         records appended later are not checked against this one any more
    """

    user_id: Id
    forget_until_ms: AtMs
    keep_after_ms: AtMs | None = None
    users_offset: Annotated[int, Meta(ge=-1, le=2**63 - 1)] = -1
    ends_ms: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None

    @property
    def bound_ms(self) -> int:
        """`keep_after_ms`, never before `forget_until_ms`."""
        return max(self.forget_until_ms, self.keep_after_ms or 0)

    @property
    def event_id(self) -> None:
        """None: a tombstone is idempotent, its coordinates are its id."""
        return None


# Header of a record that was forwarded or replayed: the time of its first append, ms as text.
ORIGIN_MS = "origin_ms"
# Context of a click moved by a merge: it enters the history and has no other effect.
_MOVED_KEY = "eddyline.moved"
MOVED = {_MOVED_KEY: True}
# In the same context: how many equal entries of the same merge come before. Absent: none.
_EQUAL_KEY = "eddyline.equal"
# With a number, in the context of the last click of a merge: what the visitor had beyond the list,
# see `seen_items.to_texts`.
SEEN_KEY = "eddyline.seen."

# The fields of an item that are lists of texts.
LISTS = ("categories", "tags")


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """A whole item: the after-image of a change feed, no patches.

    vector: optional dense features (an image or sentence embedding) for the item tower. Its length
            is the setting `item_vector_dimension`; at 0, the default, no item may have one
    """

    item_id: Id
    title: Annotated[str, Meta(max_length=TITLE_CHARS_MAX)] = ""
    categories: Labels = []
    tags: Labels = []
    attributes: Attributes = {}
    available: bool = True
    at_ms: AtMs = 0
    vector: Annotated[list[float], Meta(max_length=VECTOR_LENGTH_MAX)] | None = None


class ItemPatch(msgspec.Struct, frozen=True, kw_only=True):
    """Some fields of an item: absent ones keep their last accepted value, null removes one.

    Attributes are merged one by one. See `item_changes.patched`.
    """

    item_id: Id
    title: Annotated[str, Meta(max_length=TITLE_CHARS_MAX)] | UnsetType | None = UNSET
    categories: Labels | UnsetType | None = UNSET
    tags: Labels | UnsetType | None = UNSET
    attributes: (
        Annotated[dict[Label, Value | None], Meta(max_length=ATTRIBUTES_MAX)] | UnsetType | None
    ) = UNSET
    available: bool | UnsetType = UNSET
    at_ms: AtMs | UnsetType = UNSET
    vector: Annotated[list[float], Meta(max_length=VECTOR_LENGTH_MAX)] | UnsetType | None = UNSET


class UserProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The whole profile of a user; a null record forgets the user."""

    user_id: Id
    attributes: Attributes = {}
    at_ms: AtMs = 0


_T = TypeVar("_T")
_R = TypeVar("_R", bound=Click | Merge | Forget | Item | ItemPatch | UserProfile)
_L = TypeVar("_L", Item, ItemPatch, UserProfile)
_click = msgspec.json.Decoder(Click)
_merge = msgspec.json.Decoder(Merge)
_forget = msgspec.json.Decoder(Forget)
_item = msgspec.json.Decoder(Item)
_patch = msgspec.json.Decoder(ItemPatch)
_profile = msgspec.json.Decoder(UserProfile)
_encoder = msgspec.json.Encoder()
_WHERE = re.compile(r" - at `\$\.?([^`]*)`")
_MISSING = re.compile(r"missing required field `([^`]*)`")


def encode(record: Click | Merge | Forget | Item | ItemPatch | UserProfile) -> bytes:
    """The record as JSON, defaults included."""
    return _encoder.encode(record)


def decode_click(
    value: bytes | None, *, appended_ms: int, far_future_ms_max: int, id_form: IdForm
) -> Click:
    """Decode the value of a record.

    appended_ms: the broker's time stamp of the record. `at_ms` may be at most `far_future_ms_max`
                 later, unless a merge moved the event. The local clock is not used, so a replay
                 decides alike
    id_form:     of user_id and item_id; `event_id` and `impression_id` stay as they are
    Raises Rejected.
    """
    click: Click = decode_json(_click, value)
    # In ASCII without escapes JSON allows no control character, and a character is one byte.
    if value is None or not value.isascii() or b"\\" in value or b"\x7f" in value:
        click = _with_ids(click, id_form, "user_id", "item_id")
        if click.event_id is not None:
            check_id("event_id", click.event_id)
    elif click.user_id.strip() != click.user_id or click.item_id.strip() != click.item_id:
        click = _with_ids(click, id_form, "user_id", "item_id")
    # A moved event was checked before the merge: a lower limit since then must not lose it.
    if click.at_ms > appended_ms + far_future_ms_max and not is_moved(click):
        check_time(click.at_ms, appended_ms, far_future_ms_max)
    return click


def is_moved(click: Click) -> bool:
    """Whether a merge moved the event here from another user, for whom it was counted."""
    return click.context is not None and click.context.get(_MOVED_KEY) is True


def moved_context(equal: int, seen: Sequence[str] = ()) -> Attributes:
    """The context of a moved click.

    equal: how many equal ones of the same merge come before
    seen:  what the visitor had beyond the list, `seen_items.to_texts`
    """
    context: Attributes = {**MOVED, _EQUAL_KEY: equal} if equal else dict(MOVED)
    return context | {f"{SEEN_KEY}{number}": text for number, text in enumerate(seen)}


def equal_before(moved: Click) -> int:
    """How many equal clicks of the same merge come before a moved one."""
    found = (moved.context or {}).get(_EQUAL_KEY)
    return found if isinstance(found, int) and not isinstance(found, bool) else 0


def decode_user_event(
    value: bytes | None, *, appended_ms: int, far_future_ms_max: int, id_form: IdForm
) -> Click | Merge | Forget:
    """Decode any record of `clicks`; arguments and errors as for `decode_click`."""
    try:
        return decode_click(
            value, appended_ms=appended_ms, far_future_ms_max=far_future_ms_max, id_form=id_form
        )
    except Rejected:
        if value is None or not (b'"merge_into"' in value or b'"forget_until_ms"' in value):
            raise
    if b'"merge_into"' not in value:
        forget: Forget = _with_ids(decode_json(_forget, value), id_form, "user_id")
        check_time(forget.forget_until_ms, appended_ms, far_future_ms_max, "forget_until_ms")
        return forget
    merge: Merge = _with_ids(decode_json(_merge, value), id_form, "user_id", "merge_into")
    check_time(merge.at_ms, appended_ms, far_future_ms_max)
    if merge.user_id == merge.merge_into:
        raise Rejected(
            "same_user", "merge_into", f"{quote(merge.user_id)} cannot be merged into itself"
        )
    return merge


def decode_item(
    value: bytes,
    *,
    key: str | None,
    appended_ms: int,
    far_future_ms_max: int,
    vector_dimension: int,
    id_form: IdForm,
) -> Item:
    """Decode an item. The key must be its id, or compaction mixes items up. Raises Rejected.

    id_form: of the id, the key, categories, tags and names of attributes
    The caller handles a null value, which is a delete (`id_in_form` on the key).
    """
    item: Item = _in_form(decode_json(_item, value), id_form, "item_id")
    _check_item(item.item_id, key, item.vector, vector_dimension, id_form)
    check_time(item.at_ms, appended_ms, far_future_ms_max)
    return item


def decode_patch(
    value: bytes,
    *,
    key: str | None,
    appended_ms: int,
    far_future_ms_max: int,
    vector_dimension: int,
    id_form: IdForm,
) -> ItemPatch:
    """Decode a patch; arguments and errors as for `decode_item`."""
    patch: ItemPatch = _in_form(decode_json(_patch, value), id_form, "item_id")
    _check_item(patch.item_id, key, patch.vector or None, vector_dimension, id_form)
    check_time(patch.at_ms or 0, appended_ms, far_future_ms_max)
    return patch


def _check_item(
    item_id: str,
    key: str | None,
    vector: list[float] | None,
    vector_dimension: int,
    id_form: IdForm,
) -> None:
    _check_key("item_id", item_id, key, id_form)
    if vector is not None:
        if len(vector) != vector_dimension:
            detail = f"has {len(vector)} numbers, item_vector_dimension is {vector_dimension}"
            raise Rejected("wrong_vector_length", "vector", detail)
        if not all(math.isfinite(x) and abs(x) <= VECTOR_NUMBER_MAX for x in vector):
            raise Rejected("not_finite", "vector", "holds NaN, infinity or a number above 1e19")


def decode_profile(
    value: bytes, *, key: str | None, appended_ms: int, far_future_ms_max: int, id_form: IdForm
) -> UserProfile:
    """Decode a user profile. The key must be the user id. Raises Rejected.

    id_form: of the id, the key and the names of attributes
    """
    profile: UserProfile = _in_form(decode_json(_profile, value), id_form, "user_id")
    _check_key("user_id", profile.user_id, key, id_form)
    check_time(profile.at_ms, appended_ms, far_future_ms_max)
    return profile


def _check_key(field: str, value: str, key: str | None, id_form: IdForm) -> None:
    if key is None or (key != value and in_form(key, id_form) != value):
        raise Rejected("wrong_key", field, f"{quote(value)} under the key {quote(key)}")


def decode_key(key: bytes | None) -> str | None:
    """The key as text. Raises Rejected if it is not UTF-8."""
    if key is None:
        return None
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise Rejected("malformed_key", "key", f"{quote(key)} is not UTF-8") from None


def check_id(field: str, value: str) -> None:
    """Raise Rejected if an id is empty, over 256 bytes of UTF-8, or has control characters."""
    if not value:
        raise Rejected("empty_id", field, "is empty")
    plain = value.isascii() and value.isprintable()
    # A lone surrogate cannot be encoded; the category check below refuses it.
    size = len(value) if plain else len(value.encode(errors="replace"))
    if size > ID_BYTES_MAX:
        raise Rejected("id_too_long", field, f"{quote(value)} has more than {ID_BYTES_MAX} bytes")
    if not plain and any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise Rejected("control_character", field, f"{quote(value)} has a control character")


def id_in_form(field: str, value: str, id_form: IdForm) -> str:
    """The id in this form. Raises Rejected as `check_id`, of the id as it came and in its form."""
    check_id(field, value)
    found = in_form(value, id_form)
    if found != value:
        check_id(field, found)
    return found


def in_id_form(click: Click, id_form: IdForm) -> Click:
    """The checked click with its ids in this form. Raises Rejected where one is blank."""
    user_id, item_id = click.user_id, click.item_id
    if user_id.isascii() and item_id.isascii():
        if user_id.strip() == user_id and item_id.strip() == item_id:
            return click
    return _with_ids(click, id_form, "user_id", "item_id")


def _with_ids(record: _R, id_form: IdForm, *fields: str) -> _R:
    """The record with these ids in this form. Raises Rejected."""
    for field in fields:
        value: str = getattr(record, field)
        if (found := id_in_form(field, value, id_form)) != value:
            record = msgspec.structs.replace(record, **{field: found})
    return record


def _in_form(record: _L, id_form: IdForm, id_field: str) -> _L:
    """The record with id and labels in this form. Raises Rejected."""
    return _with_ids(_with_labels(record) if id_form == "nfc" else record, id_form, id_field)


def _with_labels(record: _L) -> _L:
    """The record with categories, tags and names of attributes in NFC. Raises Rejected."""
    attributes: dict[str, Any] = record.attributes or {}
    labels: list[str] = [*attributes]
    if not isinstance(record, UserProfile):
        labels += [*(record.categories or ()), *(record.tags or ())]
    # Most are ASCII, and `str.strip` costs less than `normal`.
    if [*map(str.strip if "".join(labels).isascii() else normal, labels)] == labels:
        return record
    changed: dict[str, Any] = {}
    for field in ("categories", "tags"):
        if found := getattr(record, field, None):
            changed[field] = [_label(field, one) for one in found]
    if attributes:
        changed["attributes"] = {_label("attributes", n): v for n, v in attributes.items()}
    return msgspec.structs.replace(record, **changed)


def _label(field: str, label: str) -> str:
    """The label in NFC. Raises Rejected where it is none; `partial` leaves it out then."""
    found = normal(label)
    if not 1 <= len(found) <= TEXT_CHARS_MAX:
        detail = f"{quote(label)} has {len(found)} characters, allowed are 1 … {TEXT_CHARS_MAX}"
        raise Rejected("bad_field", field, detail)
    return found


def check_time(at_ms: int, appended_ms: int, far_future_ms_max: int, field: str = "at_ms") -> None:
    """Raise Rejected if an event time is too far after the broker's time stamp."""
    if at_ms > appended_ms + far_future_ms_max:
        ahead = at_ms - appended_ms
        detail = f"{at_ms} lies {ahead} ms after the broker's time stamp, over {far_future_ms_max}"
        raise Rejected("far_future", field, detail)


def quote(value: object) -> str:
    """The repr of a value, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= QUOTE_CHARS_MAX else text[: QUOTE_CHARS_MAX - 1] + "…"


def decode_json(decoder: msgspec.json.Decoder[_T], value: bytes | None) -> _T:
    """The record of this JSON. Raises Rejected for none, bad JSON and a bad field, by name."""
    if value is None:
        raise Rejected("no_value", "", "the record has no value")
    try:
        if not value.isascii():
            value.decode()  # the decoder skips unknown fields without a look at their bytes
        return decoder.decode(value)
    except msgspec.ValidationError as error:
        message = str(error)
        where = _MISSING.search(message) or _WHERE.search(message)
        field = where.group(1) if where else ""
        sentence = _WHERE.sub("", message)
        raise Rejected("bad_field", field, sentence[: 2 * QUOTE_CHARS_MAX]) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected("malformed_json", "", str(error)[: 2 * QUOTE_CHARS_MAX]) from None


def produced_us(headers: Sequence[tuple[str, bytes | None]]) -> int:
    """The producer's time stamp, microseconds; 0 if missing or malformed."""
    return _number(headers, "produced_us") or 0


def origin_ms(headers: Sequence[tuple[str, bytes | None]]) -> int | None:
    """Broker's time stamp of the first append of a record that was forwarded or replayed, ms.

    None for any other record, and for a malformed header.
    """
    return _number(headers, ORIGIN_MS)


def first_append_ms(record: Record) -> int:
    """Broker's time stamp of the record's first append, ms; its own if it was not forwarded."""
    first_ms = origin_ms(record.headers)
    return record.timestamp if first_ms is None else min(first_ms, record.timestamp)


def _number(headers: Sequence[tuple[str, bytes | None]], wanted: str) -> int | None:
    for name, value in headers:
        if name == wanted and value is not None and value.isdigit() and len(value) <= 18:
            return int(value)
    return None


_Timed = TypeVar("_Timed", bound=Click | Item | UserProfile)


def shifted_to_now(events: Sequence[_Timed], now_ms: int) -> list[_Timed]:
    """The same events, moved in time so that the last one happens at `now_ms`; every gap is kept.

    >>> clicks = [Click(user_id="u", item_id=i, at_ms=t) for i, t in (("a", 10), ("b", 25))]
    >>> [c.at_ms for c in shifted_to_now(clicks, 1_000)]
    [985, 1000]
    """
    if not events:
        return []
    shift_ms = now_ms - max(event.at_ms for event in events)
    return [msgspec.structs.replace(event, at_ms=event.at_ms + shift_ms) for event in events]
