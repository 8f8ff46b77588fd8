"""Rules of the second model about one record or one history, by the documents."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from tests.model import reading
from tests.model.reading import Raw

MINUTE_MS = 60_000
# Entries of what a visitor had beyond the list, in one text of a moved click.
_A_TEXT = 62


class Liked(Protocol):
    """A line of a history, as far as `liked_items` reads it."""

    @property
    def item_id(self) -> str:
        """The item."""

    @property
    def kind(self) -> str:
        """The kind of event."""


# What an event means; `impression_id` and unknown fields are of no matter here.
_FIELDS: dict[str, Any] = {
    "user_id": None,
    "item_id": None,
    "at_ms": None,
    "kind": "click",
    "event_id": None,
    "weight": 1.0,
    "context": None,
    "merge_into": None,
    "forget_until_ms": None,
    "users_offset": None,
}


def idle_after_ms(raw: Raw, s: Any) -> int:
    """When a user whose last record this is becomes idle; 0: never."""
    return (
        raw.timestamp + 1_000 * s.user_idle_s_max if s.user_idle_s_max and raw.timestamp >= 0 else 0
    )


def item_ends_ms(raw: Raw, s: Any) -> int:
    """When an item that this record deletes is unknown again; 0: never."""
    kept_ms = 1_000 * s.deleted_items_kept_s
    return raw.timestamp + kept_ms if kept_ms and raw.timestamp > 0 else 0


def appended_after(raw: Raw) -> int | None:
    """The offset in the record's own partition that its header `origin` names."""
    at, _, offset = (
        (reading.header(raw, "origin") or b"").decode("utf-8", "replace").rpartition("/")
    )
    if reading.header(raw, "respelled"):
        return None  # sent on within its partition, to another spelling of its key
    mine = at == f"{raw.topic}/{raw.partition}" and offset.isdecimal() and len(offset) <= 18
    return int(offset) if mine else None


def first_append_ms(raw: Raw) -> int:
    """The broker's time stamp of a record's first append; a forwarded record carries it."""
    origin_ms = reading.number_header(raw, "origin_ms")
    return raw.timestamp if origin_ms is None else min(origin_ms, raw.timestamp)


def strength(event: Mapping[str, Any], s: Any) -> float:
    """An event's own weight, less where the user left early."""
    dwell = (event["context"] or {}).get("dwell_ms")
    if not s.dwell_ms_full or type(dwell) not in (int, float):
        return float(event["weight"])
    return float(event["weight"]) * min(1.0, max(dwell / s.dwell_ms_full, 0.001))


def liked_items(entries: Sequence[Liked]) -> list[str]:
    """Items newest first, without dislikes and what a newer dislike excludes."""
    liked = []
    for number, entry in enumerate(entries):
        disliked = [other.item_id for other in entries[:number] if other.kind == "dislike"]
        if entry.kind != "dislike" and entry.item_id not in disliked:
            liked.append(entry.item_id)
    return liked


def known_fields(doc: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """An event's fields, comparable: a default and an absent field are equal."""
    found = {name: doc.get(name, default) for name, default in _FIELDS.items()}
    if isinstance(found["context"], dict):
        found["context"] = tuple(sorted(found["context"].items()))
    return tuple(sorted(found.items()))


def plausible(settings: Any) -> reading.Plausible:
    """The rule of these settings."""
    nobodies = frozenset(settings.user_ids_refused.lower().split(","))
    return reading.Plausible(settings.at_ms_min, nobodies, settings.id_form == "nfc")


def item_key(item_id: str) -> int:
    """The key of an item in co-visitation rows."""
    digest = hashlib.blake2b(item_id.encode(), digest_size=8).digest()
    return sum(byte << 8 * place for place, byte in enumerate(digest))


def newest_of(beyond: Mapping[tuple[int, int], int], limit: int) -> list[tuple[int, int, int]]:
    """(minute, kind, key) of the newest items and kinds that were had beyond the list."""
    order = sorted(((minute, kind, key) for (key, kind), minute in beyond.items()), reverse=True)
    return order[:limit]


def carried(newest: Sequence[tuple[int, int, int]]) -> dict[str, str]:
    """These in the context of the last click that a merge moves."""
    parts = [newest[first : first + _A_TEXT] for first in range(0, len(newest), _A_TEXT)]
    return {
        f"eddyline.seen.{number}": base64.b64encode(
            b"".join(struct.pack("<QI", key, 8 * minute + kind) for minute, kind, key in part)
        ).decode()
        for number, part in enumerate(parts)
    }


def brought(context: Mapping[str, Any]) -> Iterator[tuple[tuple[int, int], int]]:
    """((key, kind), minute) of what a moved click carries."""
    for name, text in context.items():
        if name.startswith("eddyline.seen."):
            for key, stamp in struct.iter_unpack("<QI", base64.b64decode(text)):
                yield (key, stamp % 8), stamp // 8


def pairs_of(entries: Sequence[Any], place: int, limit: int) -> Iterator[tuple[str, int]]:
    """(other item, distance) of the older items that the entry at `place` is counted with."""
    older = [entry.item_id for entry in entries[place + 1 :] if entry.kind != "dislike"]
    for distance, other in enumerate(older[:limit], 1):
        if other != entries[place].item_id:
            yield other, distance
