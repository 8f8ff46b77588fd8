"""Values of a map: from what a record holds to what an event needs.

Every function is pure. A value that cannot be read gives `BAD`; who calls decides what that means:
a refused record for an id or a time, a part that is left out for an attribute.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Final, Literal
from zoneinfo import ZoneInfo

from eddyline.schema.numbers import number_of

UNITS: Final = {"s": 1_000, "ms": 1, "us": -1_000, "ns": -1_000_000}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
# Many writers of JSON round whole numbers beyond, as they are float64 there.
_EXACT_MAX = 2**53
# Whole numbers of more digits are no ids. By name, as Python computes so large a power at each use.
ID_MAX: Final = 10**250
_TRUE = frozenset({"true", "t", "yes", "y", "1", "on"})
_FALSE = frozenset({"false", "f", "no", "n", "0", "off"})

Kind = Literal["text", "number", "integer", "bool"]
Converter = Callable[[Any], Any]


# Bytes of a decimal: Python writes no number of 4,300 digits as text, also not for a refusal.
DECIMAL_BYTES_MAX: Final = 750


class _Bad:
    """The value cannot be read."""

    def __repr__(self) -> str:
        return "BAD"


BAD: Final = _Bad()


def id_text(value: Any) -> Any:
    """An id as text without outer blanks; a whole number in plain digits. BAD for other types.

    >>> id_text(17), id_text(17.0), id_text(" a "), id_text(1.5), id_text(True), id_text(1e300)
    ('17', '17', 'a', BAD, BAD, BAD)
    """
    if type(value) is str:
        return value.strip()
    if type(value) is int:
        return str(value) if -ID_MAX < value < ID_MAX else BAD
    if type(value) is float and value.is_integer() and abs(value) <= _EXACT_MAX:
        return str(int(value))
    return BAD


def text(value: Any) -> Any:
    """Text without outer blanks; numbers as text. BAD for other types."""
    if type(value) is str:
        return value.strip()
    if type(value) is float:
        return (
            BAD
            if not math.isfinite(value)
            else id_text(value)
            if value == int(value)
            else repr(value)
        )
    return id_text(value)


def number(value: Any) -> Any:
    """A number, or a text that is one. BAD for others, for NaN and infinity.

    >>> number("249.90"), number(" 7 "), number("7,5"), number("NAN"), number(True)
    (249.9, 7, BAD, BAD, BAD)
    """
    if type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else BAD
    if type(value) is str and (found := number_of(value)) is not None:
        return found
    return BAD


def decimal(data: bytes, scale: int) -> int | float:
    """A big-endian two's-complement integer, divided by 10 to the power of the scale.

    Raises ValueError for one of more than `DECIMAL_BYTES_MAX` bytes.

    >>> decimal(b"\\xff\\x00", 2), decimal(b"\\x07", 0), decimal(b"\\x07", -2)
    (-2.56, 7, 700.0)
    """
    if len(data) > DECIMAL_BYTES_MAX:
        raise ValueError(f"a decimal of {len(data):,} bytes")
    digits = int.from_bytes(data, "big", signed=True)
    return digits if scale == 0 else float(f"{digits}e{-scale}")


def integer(value: Any) -> Any:
    """A whole number, or a text that is one. BAD for others."""
    found = number(value)
    if type(found) is float:
        return int(found) if found.is_integer() and abs(found) <= _EXACT_MAX else BAD
    return found


def boolean(value: Any) -> Any:
    """True or false, also as a word or as 0 and 1. BAD for others.

    >>> boolean(True), boolean("no"), boolean(1), boolean("T"), boolean(2), boolean("maybe")
    (True, False, True, True, BAD, BAD)
    """
    if type(value) is bool:
        return value
    word = str(value).strip().lower() if type(value) in (str, int) else ""
    return True if word in _TRUE else False if word in _FALSE else BAD


def scalar(value: Any) -> Any:
    """A text, number or truth value as it is. BAD for other types."""
    return value if type(value) in (str, int, float, bool) else BAD


CONVERTERS: Final[dict[Kind, Converter]] = {
    "text": text,
    "number": number,
    "integer": integer,
    "bool": boolean,
}


def compile_time(formats: list[str], zone: str) -> Converter:
    """The function from a value to milliseconds since 1970; the first format that fits is taken.

    formats: s, ms, us, ns (numbers, also as text), iso (ISO 8601), rfc2822, or a format of strptime
    zone:    of times that name none, an IANA name
    Raises ValueError for an unknown format or zone.
    """
    try:
        place: tzinfo = UTC if zone == "UTC" else ZoneInfo(zone)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"there is no time zone {zone!r}") from None
    parsers = [_parser(one, place) for one in formats]
    if not parsers:
        raise ValueError("a time needs a format")
    if len(parsers) == 1:
        return parsers[0]

    def convert(value: Any) -> Any:
        for parser in parsers:
            if (found := parser(value)) is not BAD:
                return found
        return BAD

    return convert


def _parser(name: str, zone: tzinfo) -> Converter:
    if name in UNITS:
        return partial(_of_unit, UNITS[name])
    if name == "iso":
        return partial(_parsed, _iso, zone)
    if name == "rfc2822":
        return partial(_parsed, parsedate_to_datetime, zone)
    if "%" not in name or len(name) > 100:
        raise ValueError(
            f"there is no time format {name!r}: expected {', '.join(UNITS)}, iso, rfc2822 or a "
            "format of strptime"
        )
    return partial(_parsed, lambda value: datetime.strptime(value, name), zone)


def _of_unit(unit: int, value: Any) -> Any:
    """unit: milliseconds in it; negative: how many of it are in a millisecond."""
    if type(value) is not int:
        value = number(value)
        if value is BAD:
            return BAD
    if type(value) is float:
        if unit < 0 or abs(value) > _EXACT_MAX:
            return int(value) // -unit if unit < 0 and abs(value) < 1e30 else BAD
        return round(value * unit)
    return value * unit if unit > 0 else value // -unit


def _parsed(parse: Callable[[str], datetime], zone: tzinfo, value: Any) -> Any:
    if type(value) is not str:
        return BAD
    try:
        moment = parse(value.strip())
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=zone)
        return (moment - _EPOCH) // _MILLISECOND
    except (ValueError, OverflowError, TypeError, IndexError):
        return BAD


def _iso(value: str) -> datetime:
    if len(value) == 11 and value[-1] == "Z":  # a date with a zone, as some writers have it
        value = value[:-1] + "T00:00:00Z"
    return datetime.fromisoformat(value)
