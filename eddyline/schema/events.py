"""The wire format of what producers send: clicks, items and user profiles, as JSON.

One codec for every reader. It rejects, it never repairs: a record that does not fit raises `Rejected`
with a reason, a field and the value, and goes to the dead-letters topic. Unknown fields are ignored, so a
newer producer can talk to an older reader.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta

from eddyline.errors import Rejected

Kind = Literal["click", "view", "like", "cart", "purchase", "dislike"]
KINDS: tuple[str, ...] = get_args(Kind)

# Keys live in Redis keys, gRPC answers and log lines; 256 bytes hold any id seen in practice.
ID_BYTES_MAX = 256
# A title is shown and hashed into trigrams; the longest of 9,742 film titles has 158 characters.
TITLE_CHARS_MAX = 1_000
LABELS_MAX = 64
ATTRIBUTES_MAX = 64
TEXT_CHARS_MAX = 256
# The text of an attribute: the address of an image, a subtitle, a long name.
VALUE_CHARS_MAX = 1_000
VECTOR_LENGTH_MAX = 4_096
# The last millisecond of the year 9999: later values are seconds or microseconds taken for milliseconds.
AT_MS_MAX = 253_402_300_799_999
# A value quoted in a reason is cut: dead-letter headers and log lines stay short.
QUOTE_CHARS_MAX = 80

Id = Annotated[str, Meta(min_length=1, max_length=ID_BYTES_MAX)]
Text = Annotated[str, Meta(max_length=TEXT_CHARS_MAX)]
Label = Annotated[str, Meta(min_length=1, max_length=TEXT_CHARS_MAX)]
AtMs = Annotated[int, Meta(ge=0, le=AT_MS_MAX)]
# MessagePack, in which profiles and item records are stored, ends at 64 bits; JSON does not.
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Scalar = str | int | float | bool
Value = Annotated[str, Meta(max_length=VALUE_CHARS_MAX)] | Integer | float | bool
Attributes = Annotated[dict[Label, Value], Meta(max_length=ATTRIBUTES_MAX)]
Labels = Annotated[list[Label], Meta(max_length=LABELS_MAX)]


class Click(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One behaviour of one user on one item.

    event_id: the producer's own id, the same when it re-sends; left out, the coordinates stand for it
    at_ms:    when it happened, milliseconds since 1970 UTC (event time)
    weight:   how much it counts, above 0 and at most 100; 1 where left out
    """

    user_id: Id
    item_id: Id
    at_ms: AtMs
    kind: Kind = "click"
    event_id: Id | None = None
    weight: Annotated[float, Meta(gt=0, le=100)] = 1.0
    context: Attributes | None = None
    impression_id: Id | None = None


class Merge(msgspec.Struct, frozen=True, kw_only=True):
    """In `clicks`, under the visitor's key: from here on all that he did is the other user's.

    user_id: the visitor; merge_into: who he turned out to be
    """

    user_id: Id
    merge_into: Id
    at_ms: AtMs

    @property
    def event_id(self) -> None:
        """Merging twice moves nothing twice, so that its coordinates are all the id it needs."""
        return None


class Forget(msgspec.Struct, frozen=True, kw_only=True):
    """In `clicks`, under the user's key: whatever he did until then is nothing that he did.

    Ingest writes it where a null record in `users` forgets him: between `users` and `clicks` there is no
    order, so that clicks which are read again (an emptied Redis) would bring him back. Applying it twice is
    applying it once.

    forget_until_ms: event time, the broker's time stamp of that null record
    """

    user_id: Id
    forget_until_ms: AtMs

    @property
    def event_id(self) -> None:
        """Its coordinates are all the id it needs."""
        return None


# The context of a click that was another user's: it is put into the list, and counts nowhere else again.
MOVED = {"eddyline.moved": True}


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """A whole item, as a change feed's after-image (no patches).

    vector: given dense features (an image or sentence embedding) for the item tower; its length is the
            setting `item_vector_dimension`, 0 by default: then no item may carry one
    """

    item_id: Id
    title: Annotated[str, Meta(max_length=TITLE_CHARS_MAX)] = ""
    categories: Labels = []
    tags: Labels = []
    attributes: Attributes = {}
    available: bool = True
    at_ms: AtMs = 0
    vector: Annotated[list[float], Meta(max_length=VECTOR_LENGTH_MAX)] | None = None


class UserProfile(msgspec.Struct, frozen=True, kw_only=True):
    """A user's whole profile; a null record forgets the user."""

    user_id: Id
    attributes: Attributes = {}
    at_ms: AtMs = 0


_T = TypeVar("_T")
_click = msgspec.json.Decoder(Click)
_merge = msgspec.json.Decoder(Merge)
_forget = msgspec.json.Decoder(Forget)
_item = msgspec.json.Decoder(Item)
_profile = msgspec.json.Decoder(UserProfile)
_encoder = msgspec.json.Encoder()
_WHERE = re.compile(r" - at `\$\.?([^`]*)`")
_MISSING = re.compile(r"missing required field `([^`]*)`")
# A cheap first look; only a string that has one of these is looked at by category.
_SUSPECT = re.compile(r"[^\x20-\x7e]")


def encode(record: Click | Merge | Forget | Item | UserProfile) -> bytes:
    """The record as JSON, as a producer sends it. Fields at their default are written too."""
    return _encoder.encode(record)


def decode_click(value: bytes | None, *, appended_ms: int, far_future_ms_max: int) -> Click:
    """A click from a record's value.

    appended_ms: the broker's own time stamp of the record; `at_ms` may lie at most `far_future_ms_max`
                 after it (never measured against this machine's clock, so that a replay decides alike)
    Raises Rejected.
    """
    click: Click = _decode(_click, value)
    # ASCII without an escape: JSON itself allows no control character then, and a character is a byte.
    if value is None or not value.isascii() or b"\\" in value or b"\x7f" in value:
        check_id("user_id", click.user_id)
        check_id("item_id", click.item_id)
        if click.event_id is not None:
            check_id("event_id", click.event_id)
    if click.at_ms > appended_ms + far_future_ms_max:
        check_time(click.at_ms, appended_ms, far_future_ms_max)
    return click


def decode_user_event(
    value: bytes | None, *, appended_ms: int, far_future_ms_max: int
) -> Click | Merge | Forget:
    """Whatever may lie in `clicks`. Raises Rejected, as `decode_click` does."""
    try:
        return decode_click(value, appended_ms=appended_ms, far_future_ms_max=far_future_ms_max)
    except Rejected:
        if value is None or not (b'"merge_into"' in value or b'"forget_until_ms"' in value):
            raise
    if b'"merge_into"' not in value:
        forget: Forget = _decode(_forget, value)
        check_id("user_id", forget.user_id)
        check_time(forget.forget_until_ms, appended_ms, far_future_ms_max, "forget_until_ms")
        return forget
    merge: Merge = _decode(_merge, value)
    check_id("user_id", merge.user_id)
    check_id("merge_into", merge.merge_into)
    check_time(merge.at_ms, appended_ms, far_future_ms_max)
    if merge.user_id == merge.merge_into:
        raise Rejected(
            "same_user", "merge_into", f"{quote(merge.user_id)} cannot be merged into himself"
        )
    return merge


def decode_item(
    value: bytes,
    *,
    key: str | None,
    appended_ms: int,
    far_future_ms_max: int,
    vector_dimension: int,
) -> Item:
    """An item from a record's value; its key must be its id, or compaction would mix items up.

    Raises Rejected. A null value is a delete and is the caller's business (`check_id` on its key).
    """
    item: Item = _decode(_item, value)
    check_id("item_id", item.item_id)
    if key != item.item_id:
        raise Rejected("wrong_key", "item_id", f"{quote(item.item_id)} under the key {quote(key)}")
    check_time(item.at_ms, appended_ms, far_future_ms_max)
    if item.vector is not None:
        if len(item.vector) != vector_dimension:
            detail = f"has {len(item.vector)} numbers, item_vector_dimension is {vector_dimension}"
            raise Rejected("wrong_vector_length", "vector", detail)
        # The square root of the largest float32: beyond it, products of the item tower are not finite.
        if not all(math.isfinite(x) and abs(x) <= 1e19 for x in item.vector):
            raise Rejected("not_finite", "vector", "holds NaN, infinity or a number above 1e19")
    return item


def decode_profile(
    value: bytes, *, key: str | None, appended_ms: int, far_future_ms_max: int
) -> UserProfile:
    """A user's profile from a record's value; its key must be the user's id. Raises Rejected."""
    profile: UserProfile = _decode(_profile, value)
    check_id("user_id", profile.user_id)
    if key != profile.user_id:
        raise Rejected(
            "wrong_key", "user_id", f"{quote(profile.user_id)} under the key {quote(key)}"
        )
    check_time(profile.at_ms, appended_ms, far_future_ms_max)
    return profile


def decode_key(key: bytes | None) -> str | None:
    """A record's key as text. Raises Rejected where it is not UTF-8."""
    if key is None:
        return None
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise Rejected("malformed_key", "key", f"{quote(key)} is not UTF-8") from None


def check_id(field: str, value: str) -> None:
    """Raise Rejected where an id is empty, longer than 256 bytes of UTF-8, or has control characters."""
    if not value:
        raise Rejected("empty_id", field, "is empty")
    # Half a surrogate pair cannot be encoded at all; it is refused below.
    if len(value) > ID_BYTES_MAX or len(value.encode(errors="replace")) > ID_BYTES_MAX:
        raise Rejected("id_too_long", field, f"{quote(value)} has more than {ID_BYTES_MAX} bytes")
    if _SUSPECT.search(value) and any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise Rejected("control_character", field, f"{quote(value)} has a control character")


def check_time(at_ms: int, appended_ms: int, far_future_ms_max: int, field: str = "at_ms") -> None:
    """Raise Rejected where an event claims to lie further in the future than the broker's clock allows."""
    if at_ms > appended_ms + far_future_ms_max:
        ahead = at_ms - appended_ms
        detail = f"{at_ms} lies {ahead} ms after the broker's time stamp, allowed are {far_future_ms_max}"
        raise Rejected("far_future", field, detail)


def quote(value: object) -> str:
    """A value for a sentence, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= QUOTE_CHARS_MAX else text[: QUOTE_CHARS_MAX - 1] + "…"


def _decode(decoder: msgspec.json.Decoder[_T], value: bytes | None) -> _T:
    if value is None:
        raise Rejected("no_value", "", "the record has no value")
    try:
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
    """The producer's stamp, 0 where it has none or one that is no number of a sensible size."""
    for name, value in headers:
        if name == "produced_us" and value is not None and value.isdigit() and len(value) <= 18:
            return int(value)
    return 0
