"""Texts that are numbers: one rule for maps, features and filters."""

from __future__ import annotations

import math
import re

# Digits of a number as text; longer texts are not numbers that an event can have.
_CHARS_MAX = 64
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?\Z", re.ASCII)


def number_of(text: str) -> int | float | None:
    """The finite number that a text is, outer blanks aside; None for other texts.

    >>> number_of("249.90"), number_of(" 7 "), number_of("7,5"), number_of("NAN")
    (249.9, 7, None, None)
    """
    if len(text) > _CHARS_MAX:
        return None
    digits = text.strip()
    if not _NUMBER.match(digits):
        return None
    if digits.lstrip("+-").isdigit():
        return int(digits)
    found = float(digits)
    return found if math.isfinite(found) else None
