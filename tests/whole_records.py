"""Whole records for fuzzing, by a seed: key, headers, value, time stamp, partition, size.

Many are valid, many are valid but for one thing, and some are bytes of any kind. All are records
that a Kafka broker takes.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

from eddyline.schema.partitioning import partition_of

# A broker takes a batch of up to 1 MiB and 12 bytes.
BATCH_BYTES_MAX = 1024 * 1024
_TEXTS: tuple[Any, ...] = (
    "",
    "i1",
    "ä" * 128,
    "ä" * 129,
    "x" * 256,
    "x" * 257,
    "a\u0000b",
    "a\u007fb",
    "\ud800",
    "𝔘" * 64,
    "a/b/c",
    "{i0}",
)
_SCALARS: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    2**53,
    2**63,
    -(2**64),
    10**400,
    float("nan"),
    float("inf"),
    [],
    {},
    [1, "a", None],
    {"a": {"b": []}},
)
_FIELDS = {
    "clicks": ("user_id", "item_id", "at_ms", "kind", "event_id", "weight", "context"),
    "items": (
        "item_id",
        "title",
        "categories",
        "tags",
        "attributes",
        "available",
        "at_ms",
        "vector",
    ),
    "users": ("user_id", "attributes", "at_ms"),
}
_MORE = {
    "clicks": ("merge_into", "forget_until_ms", "keep_after_ms", "users_offset", "ends_ms"),
    "items": ("unknown",),
    "users": ("unknown",),
}


class RawName(str):
    """A header name that goes out as these bytes, which need not be UTF-8."""

    raw: bytes

    def __new__(cls, raw: bytes) -> RawName:
        made = super().__new__(cls, repr(raw))
        made.raw = raw
        return made

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        """The bytes."""
        return self.raw


@dataclass
class Whole:
    """One record as a producer sends it. partition: None leaves it to the producer."""

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]] = field(default_factory=list)
    partition: int | None = None
    timestamp_ms: int | None = None


class Maker:
    """Draws records. users, items: ids of the valid ones; partitions: by topic."""

    def __init__(
        self, seed: int, users: list[str], items: list[str], partitions: dict[str, int]
    ) -> None:
        self._rng = random.Random(f"whole-{seed}")
        self._users = users
        self._items = items
        self._partitions = partitions
        self._number = 0

    def record(self, topic: str, now_ms: int) -> Whole:
        """A record for `clicks`, `items` or `users`."""
        rng, dice = self._rng, self._rng.random()
        self._number += 1
        doc = self._document(topic, now_ms)
        name = doc["item_id"] if topic == "items" else doc["user_id"]
        key: bytes | None = name.encode()
        if dice < 0.35:
            self._damage(topic, doc)
        value: bytes | None = json.dumps(doc).encode()
        if 0.35 <= dice < 0.5:
            value = self._bytes(value or b"")
        if rng.random() < 0.08:
            value = None
        if rng.random() < 0.15:
            key = self._key()
        if topic != "clicks":
            key = key or b""  # a broker refuses a record without a key in a compacted topic
        made = Whole(key, value, self._headers(), timestamp_ms=self._timestamp(now_ms))
        if rng.random() < 0.85 and key == name.encode():
            made.partition = partition_of(name, self._partitions[topic])
        elif rng.random() < 0.7:
            made.partition = rng.randrange(self._partitions[topic])
        return made

    def large(self, topic: str, now_ms: int, spare: int) -> Whole:
        """A valid record that fills a batch but for `spare` bytes, by a field nobody reads."""
        doc = self._document(topic, now_ms)
        name = doc["item_id"] if topic == "items" else doc["user_id"]
        self._number += 1
        # 61 bytes are the head of a batch, 20 the lengths of a record's parts.
        bare = len(json.dumps(doc | {"unknown": ""})) + len(name) + 61 + 20
        doc["unknown"] = "x" * (BATCH_BYTES_MAX - bare - spare)
        place = partition_of(name, self._partitions[topic])
        return Whole(name.encode(), json.dumps(doc).encode(), partition=place)

    def any_bytes(self) -> Whole:
        """A record with no sense in it, for a topic that Eddyline writes."""
        rng = self._rng
        key = self._key()
        value = rng.choice(
            (None, b"", rng.randbytes(rng.randrange(200)), b"EV" + rng.randbytes(50))
        )
        # kafka-python refuses a record with neither.
        return Whole(key, b"" if key is None and value is None else value, self._headers())

    def _document(self, topic: str, now_ms: int) -> dict[str, Any]:
        rng = self._rng
        if topic == "items":
            return {
                "item_id": rng.choice(self._items),
                "title": rng.choice(("", "A title", "t" * 1_000)),
                "categories": ["c"] * rng.randrange(3),
                "attributes": {"price": 3.5, "new": True},
                "available": rng.random() < 0.8,
                "at_ms": now_ms,
            }
        user = rng.choice(self._users)
        if topic == "users":
            return {"user_id": user, "attributes": {"age": rng.randrange(99)}, "at_ms": now_ms}
        doc = {"user_id": user, "item_id": rng.choice(self._items), "at_ms": now_ms}
        if rng.random() < 0.9:
            doc["event_id"] = f"w{self._number}" if rng.random() < 0.9 else "again"
        if rng.random() < 0.05:
            return {"user_id": user, "merge_into": rng.choice(self._users), "at_ms": now_ms}
        return doc

    def _damage(self, topic: str, doc: dict[str, Any]) -> None:
        rng = self._rng
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            names = _FIELDS[topic] if rng.random() < 0.8 else _MORE[topic]
            name, way = rng.choice(names), rng.random()
            if way < 0.2:
                doc.pop(name, None)
            elif way < 0.5:
                doc[name] = rng.choice(_TEXTS)
            elif way < 0.8:
                doc[name] = rng.choice(_SCALARS)
            elif way < 0.9:
                doc[name] = {f"k{n}": rng.choice(_SCALARS) for n in range(rng.choice((1, 3, 70)))}
            else:
                doc[name] = [rng.choice(_TEXTS) for _ in range(rng.choice((1, 3, 70)))]

    def _bytes(self, value: bytes) -> bytes:
        rng, dice = self._rng, self._rng.random()
        if dice < 0.3:
            at = rng.randrange(len(value) + 1)
            return value[:at] + rng.randbytes(rng.randrange(4)) + value[at + rng.randrange(4) :]
        return rng.choice(
            (
                b"",
                b"null",
                b"[]",
                b"{",
                b'"',
                b"\xff\xfe",
                b"\xef\xbb\xbf" + value,
                value + b" ",
                value + value,
                b"[" * 100_000,
                b'{"a":' * 2_000,
                rng.randbytes(rng.randrange(300)),
            )
        )

    def _key(self) -> bytes | None:
        rng = self._rng
        return rng.choice(
            (
                None,
                b"",
                b"\xff\xff",
                b"a\x00b",
                b"x" * 257,
                b"k" * 40_000,
                b"a/b/c",
                b"clicks/0/zero",
                rng.choice(self._users).encode(),
                rng.choice(self._items).encode(),
                rng.randbytes(rng.randrange(1, 20)),
            )
        )

    def _headers(self) -> list[tuple[str, bytes | None]]:
        rng, dice = self._rng, self._rng.random()
        if dice < 0.6:
            return []
        if dice < 0.7:
            return [("produced_us", str(rng.randrange(10**17)).encode())]
        if dice < 0.8:
            names: tuple[str, ...] = ("produced_us", "origin", "origin_ms", "replayed", "reason")
            names += ("key", "no_value", "timestamp_ms", "field", "detail")
            values = (None, b"", b"\xff", b"12", b"-1", b"9" * 40, "²".encode(), b"a/b/c")
            return [(rng.choice(names), rng.choice(values)) for _ in range(rng.randrange(1, 4))]
        if dice < 0.9:
            return [(RawName(rng.choice((b"\xff\xfe", b"", b"\xc3", b"a\x00"))), b"1")]
        if dice < 0.95:
            return [(f"h{n}", b"v") for n in range(2_000)]
        return [("large", b"h" * 50_000)]

    def _timestamp(self, now_ms: int) -> int | None:
        # 0 would be taken for "none" by some clients; brokers refuse times that lie far ahead.
        return self._rng.choice((None, None, None, 1, now_ms - 10**9, now_ms + 60_000))
