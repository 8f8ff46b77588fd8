"""One record after another through the real ingest functions: each is applied, dropped or
dead-lettered.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eddyline.errors import EddylineError, Rejected
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema import events, item_record
from eddyline.schema.events import KINDS, Click, Item, Merge, UserProfile
from eddyline.schema.item_record import ItemRecord
from eddyline.settings.loader import Settings
from eddyline.stores import user_codec
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import LogId, Source, UserEffects, UserQuery
from embeddings.bundle import bundle
from embeddings.bundle.bundle import Bundle
from embeddings.data.examples import TrainingData
from embeddings.models.base import Recipe
from embeddings.training.trainer import train
from sandbox.datasets import synthetic
from streams.generation import Generation
from streams.handlers import Handlers, Outputs
from tests.applying import ingest
from tests.model.reading import in_nfc
from tests.simulation.test_ingest_faults import Rec

NOW_MS = 1_700_000_000_000
LOG = LogId("cluster", "topic")


def towers(folder: Path) -> Bundle:
    """A small generation with real towers."""
    dataset = synthetic.generate(items=60, users=20, clicks=600, seed=3)
    profiles = {user: dict(profile.attributes) for user, profile in dataset.profiles.items()}
    data = TrainingData(items=dataset.items, profiles=profiles, clicks=dataset.clicks)
    train(data, folder / "1", "1", recipe=Recipe(epochs=1, seed=1, threads=1))
    return bundle.load(folder / "1")


@dataclass
class Outside:
    """Where refused, forwarded and published records end."""

    letters: list[tuple[Any, Rejected]] = field(default_factory=list)
    forwarded: list[Any] = field(default_factory=list)
    published: list[ItemRecord] = field(default_factory=list)

    def put(self, record: Any, rejected: Rejected) -> None:
        self.letters.append((record, rejected))

    def forward(self, record: Any, key: bytes, value: bytes | None, partition: int) -> None:
        events.decode_user_event(value, appended_ms=NOW_MS, far_future_ms_max=10**6, id_form="nfc")
        self.forwarded.append((key, value))

    def flush(self) -> None:
        pass

    def open(self, partition: int) -> None:
        pass

    def close(self) -> None:
        pass

    def publish(self, published: Mapping[int, Sequence[ItemRecord]]) -> dict[int, EddylineError]:
        for some in published.values():
            self.published += some
        return {}


class Harness:
    """Three topics of one partition each, on a store in memory."""

    def __init__(self, made: Bundle) -> None:
        self.settings = Settings(
            clicks_partitions=1, items_partitions=1, dedupe_window_events=512, history_length_max=20
        )
        self.store, self.outside = MemoryStore(), Outside()
        self._offsets = dict.fromkeys((CLICKS, ITEMS, USERS), -1)

        self.handlers = Handlers(
            self.settings,
            self.store,
            {CLICKS: LOG, USERS: LOG, ITEMS: LOG},
            [Generation(made, self.outside)],
            Outputs.to_sink(self.outside),
            ["1"],
            items_wait_s=0.0,
            clock_us=lambda: 5,
        )
        for name in (CLICKS, USERS, ITEMS):
            self.handlers.of(name).fences.open({0: (0, 2**62)})

    def feed(
        self, topic: str, key: bytes | None, value: bytes | None, stamp: bytes | None = None
    ) -> str:
        """Ingest one record; what became of it. AssertionError where that is nothing, or two
        things.
        """
        offset = self._offsets[topic] = self._offsets[topic] + 1
        record = Rec(topic, 0, offset, NOW_MS, key, value, (("produced_us", stamp),))
        letters, forwarded = len(self.outside.letters), len(self.outside.forwarded)
        outcome = ingest(self.handlers.of(topic), 0, [record], 7)
        ends = {
            "applied": outcome.applied,
            "duplicate": outcome.duplicates,
            "rejected": outcome.rejected,
        }
        if not sum(ends.values()) and _is_spelled_otherwise(topic, key):
            return "forwarded"  # to the id itself
        assert sum(ends.values()) == 1, ends
        refused = self.outside.letters[letters:]
        assert len(refused) == outcome.rejected
        assert len(self.outside.forwarded) - forwarded == outcome.forwarded
        assert all(one[0] is record and one[1].reason for one in refused)
        end = next(name for name, count in ends.items() if count)
        if end == "applied":
            self._applied(topic, record)
        return end

    def _applied(self, topic: str, record: Rec) -> None:
        """What was applied can be stored as bytes, and read again."""
        if topic == ITEMS:
            item_id = (record.key or b"").decode()
            card = self.store.read_item_metadata([item_id], 1)[item_id]
            assert card.offset == record.offset
            published = self.outside.published[-1]
            assert published.item_id == item_id
            again = item_record.decode_record(
                item_id.encode(), item_record.encode_record(published)
            )
            assert item_record.encode_record(again) == item_record.encode_record(published)
            assert published.vector is None or np.isfinite(published.vector).all()
            return
        if topic == USERS:
            user = (record.key or b"").decode()
        else:
            user = events.decode_user_event(
                record.value, appended_ms=NOW_MS, far_future_ms_max=10**6, id_form="nfc"
            ).user_id
        source = Source(CLICKS, 0)
        [read] = self.store.read_many([UserQuery("u0", source, [user], ["1"])])
        effects = UserEffects(
            histories=dict(read.histories), embeddings={"1": dict(read.embeddings["1"])}
        )
        names, args = user_codec.encode_users("t", effects)
        lists, written = args[4], args[5]
        values = args[len(args) - written :]  # last, as nothing is erased or seen here
        stored = dict(zip(names[2 : 2 + written], values, strict=True))
        for name in names[2 : 2 + lists]:
            stored[name] += bytes(8)
        if user in read.profiles:
            stored[f"t:p:{user}"] = user_codec.encode_profile(
                read.profiles[user], read.profile_places[user]
            )
        again = user_codec.decode_users(
            read.fence,
            [user],
            ["1"],
            [stored.get(n) for n in user_codec.user_keys("t", [user], ["1"])],
        )
        assert (again.histories, again.embeddings, again.profiles) == (
            read.histories,
            read.embeddings,
            read.profiles,
        )
        if record.value is not None:
            name = user.encode()
            assert len(name) <= events.ID_BYTES_MAX


def _is_spelled_otherwise(topic: str, key: bytes | None) -> bool:
    """Whether the key of an item or a profile is another spelling of its id."""
    text = (key or b"").decode("utf-8", "replace")
    return topic != CLICKS and in_nfc(text) != text


def seeds() -> list[tuple[str, bytes | None, bytes | None]]:
    """Good records of every kind, to begin from."""
    made: list[tuple[str, bytes | None, bytes | None]] = []
    for kind in KINDS:
        click = Click(
            user_id="ana", item_id="f1", at_ms=NOW_MS, kind=kind, event_id=kind, weight=0.5
        )  # type: ignore[arg-type]
        made.append((CLICKS, b"ana", events.encode(click)))
    made.append((CLICKS, b"bo", events.encode(Merge(user_id="bo", merge_into="ana", at_ms=NOW_MS))))
    context = {"dwell_ms": 1_500, "page": "home", "x": 1.5, "y": True}
    more = Click(user_id="é", item_id="f2", at_ms=NOW_MS, context=context, impression_id="i")
    made.append((CLICKS, "é".encode(), events.encode(more)))
    item = Item(
        item_id="f1", title="Heat", categories=["Crime"], tags=["x"], attributes={"year": 1995}
    )
    made.append((ITEMS, b"f1", events.encode(item)))
    made.append((ITEMS, b"f1", None))
    made.append((USERS, b"ana", events.encode(UserProfile(user_id="ana", attributes={"age": 31}))))
    made.append((USERS, b"ana", None))
    return made


def mutated(rng: random.Random, value: bytes) -> bytes:
    """A few random changes of a good record: bytes, cuts, repeats, and words that parsers trip
    over.
    """
    words = [
        b"null",
        b"NaN",
        b"1e999",
        b"-1",
        b"\\ud800",
        b"\x00",
        b'""',
        b"[" * 2_000,
        b"9" * 400,
        b"{}",
        b'"\\u0000"',
        b"true",
        b"\xff\xfe",
        b'"' + b"x" * 300 + b'"',
    ]
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.randint(0, len(value)) for _ in range(2))
        match rng.randrange(5):
            case 0:
                value = value[:at] + bytes([rng.randrange(256)]) + value[at + 1 :]
            case 1:
                value = value[:at] + value[end:]
            case 2:
                value = value[:end] + value[at:end] + value[end:]
            case 3:
                value = value[:at] + rng.choice(words) + value[at:]
            case _:
                value = value[:at] + rng.choice(words) + value[end:]
    return value
