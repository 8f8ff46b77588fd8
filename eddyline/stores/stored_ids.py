"""State of a version that knew no `id_form`: it holds every id as it was sent.

It is kept if all its ids are in the form of the settings; a scan of Redis finds out, once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice

import msgspec
import redis
from redis.exceptions import NoPermissionError

from eddyline.errors import StoreRefused
from eddyline.schema.events import quote
from eddyline.schema.id_form import normal
from eddyline.stores.layout import Layout

_KEYS_A_SCAN = 1_000
_SHOWN = 3


def settle(client: redis.Redis, ns: str, address: str, stored: Layout, layout: Layout) -> None:
    """Note the form of the ids in a stored layout that does not say it.

    ns: prefix of all keys; layout: by the settings
    A user who may only read notes nothing. Raises StoreRefused, also for layouts that differ
    otherwise; redis-py's errors.
    """
    if not stored.agrees(layout):
        raise StoreRefused(f"Redis at {address} {stored.refusal(layout)}")
    try:
        if layout.id_form == "nfc":
            # Histories, profiles and item metadata. Matched exactly: an id may look like a key.
            named = re.compile(rf"{re.escape(ns)}\{{[ui]\d+\}}:[hpc]:(.*)".encode(), re.DOTALL)
            keys = client.scan_iter(match=f"{ns}{{*}}:[hpc]:*", count=_KEYS_A_SCAN)
            ids = (at[1].decode() for key in keys if (at := named.fullmatch(key)))
            check(f"Redis at {address}", ids)
        client.set(f"{ns}layout", msgspec.json.encode(layout))
    except NoPermissionError:  # a query worker; ingest will note it
        return


def check(where: str, ids: Iterable[str]) -> None:
    """Raise StoreRefused if one of these ids is not in NFC, or has outer blanks."""
    other = list(islice((one for one in ids if normal(one) != one), _SHOWN))
    if other:
        raise StoreRefused(
            f"{where} was written by a version that kept ids as they were sent, and has "
            f"{', '.join(map(quote, other))}: with id_form = 'nfc' it would not be found. Set "
            "id_form = 'as_is', or copy the topics with `eddyline repartition` into a namespace "
            "that begins with id_form = 'nfc'"
        )
