"""The form of ids and labels: Unicode NFC without outer blanks (ADR 31).

"é" is one code point or two, and a cell of a table often ends with a blank. A shop's systems send
both, and mean one user or item.
"""

from __future__ import annotations

import unicodedata
from typing import Literal

# nfc: see `normal`; as_is: an id is the text as it was sent.
IdForm = Literal["nfc", "as_is"]


def normal(text: str) -> str:
    r"""The text in NFC without outer blanks. A second call changes nothing.

    >>> normal(" cafe\u0301 ") == "caf\u00e9", normal("a b"), normal("\u3000")
    (True, 'a b', '')
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return text.strip()


def in_form(text: str, form: IdForm) -> str:
    """The text in this form."""
    return normal(text) if form == "nfc" else text


def key_in_form(key: bytes | None, form: IdForm) -> bytes:
    """The key of a record, its id in this form; b"" for none. Bytes that are no UTF-8 stay."""
    try:
        return in_form((key or b"").decode(), form).encode()
    except UnicodeDecodeError:
        return key or b""
