"""The cursor of pages: a token that names the items of all pages before, so that none comes again.

It holds everything itself: any worker or coordinator reads it, and none keeps anything. It names
items by key, not by place, because the order changes with every click. It has a checksum and no
signature: it only takes items away from the answer of the user it was made for, which a request
can do without it.
"""

from __future__ import annotations

import base64
import binascii
import struct
import time
from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from eddyline.errors import EddylineError
from eddyline.schema.item_key import KEY_BYTES, cached_keys_of
from index.arrays import Keys

# Items of all pages together; the token is 22 kB then.
ITEMS_MAX = 2_000
VERSION = 1
# Clocks of two machines may differ by this.
AHEAD_S_MAX = 60
# Version, seconds since 1970, generation and user as hashes.
_HEAD = struct.Struct("<BI4s8s")
_SUM_BYTES = 8
_BYTES_MAX = _HEAD.size + ITEMS_MAX * KEY_BYTES + _SUM_BYTES
CHARS_MAX = -(-_BYTES_MAX // 3) * 4


class CursorRejected(EddylineError):
    """A token that is damaged, too old, or of another user; the message says which."""


class Cursor(NamedTuple):
    """The pages before.

    keys: uint64 (n,), of their items; made_in: hash of the last one's generation, b"" for none
    """

    keys: Keys
    made_in: bytes = b""

    def of_other(self, generation: str) -> bool:
        """Whether the last page was of another generation."""
        return self.made_in not in (b"", _hash(generation, 4))


FIRST_PAGE = Cursor(np.empty(0, np.uint64))


def encode(
    before: Cursor, item_ids: Iterable[str], user_id: str, generation: str, now_s: float
) -> str:
    """The token for the page after these items; "" if it would name more than `ITEMS_MAX`."""
    keys = np.concatenate((before.keys, cached_keys_of(item_ids)))
    if len(keys) > ITEMS_MAX:
        return ""
    head = _HEAD.pack(VERSION, int(now_s), _hash(generation, 4), _hash(user_id, 8))
    body = head + keys.astype("<u8").tobytes()
    return base64.urlsafe_b64encode(body + _sum(body)).decode().rstrip("=")


def decode(token: str, user_id: str, s_max: int, now_s: float | None = None) -> Cursor:
    """The cursor of a token; the empty one is that of the first page. Raises CursorRejected.

    s_max: the greatest age in seconds; now_s: seconds since 1970
    """
    if not token:
        return FIRST_PAGE
    if len(token) > CHARS_MAX:
        raise CursorRejected(f"{len(token):,} characters, allowed are 0 … {CHARS_MAX:,}")
    try:
        padded = token.encode("ascii") + b"=" * (-len(token) % 4)
        data = base64.b64decode(padded, altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise CursorRejected("it is not the `next_cursor` of an answer") from None
    body, keys_bytes = data[:-_SUM_BYTES], len(data) - _SUM_BYTES - _HEAD.size
    if keys_bytes < 0 or keys_bytes % KEY_BYTES or _sum(body) != data[-_SUM_BYTES:]:
        raise CursorRejected("it is damaged, or not the `next_cursor` of an answer")
    version, made_s, generation, user = _HEAD.unpack_from(body)
    if version != VERSION:
        raise CursorRejected(f"it has version {version}, this worker reads {VERSION}")
    if user != _hash(user_id, 8):
        raise CursorRejected("it was made for another user")
    age_s = int(time.time() if now_s is None else now_s) - made_s
    if age_s > s_max:
        raise CursorRejected(f"it is {age_s:,} s old, allowed are {s_max:,}: begin anew")
    if age_s < -AHEAD_S_MAX:
        raise CursorRejected(f"it was made {-age_s:,} s ahead of this worker's clock")
    return Cursor(np.frombuffer(body[_HEAD.size :], "<u8").astype(np.uint64), generation)


def _hash(text: str, size: int) -> bytes:
    return blake2b(text.encode(), digest_size=size, person=b"cursor").digest()


def _sum(body: bytes) -> bytes:
    return blake2b(body, digest_size=_SUM_BYTES, person=b"cursor sum").digest()
