"""A reader that follows some users: their lists are exact, and every event counts for items."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from eddyline.kafka.topics import CLICKS, SOURCES
from eddyline.schema import events
from eddyline.schema.events import Click
from eddyline.schema.partitioning import partition_of, user_slot
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import LogId
from streams.generation import Generation
from streams.handlers import Handlers, Outputs
from streams.operations.state_replay import _ReplaySinks
from tests.applying import ingest
from tests.unit.evaluation.small import make_bundle, make_items

MS = 1_700_000_000_000
SETTINGS = Settings(clicks_partitions=1, items_partitions=1, item_slots=1)


def record(offset: int, user: str, item: str) -> Any:
    click = Click(user_id=user, item_id=item, at_ms=MS + offset, event_id=f"e{offset}")
    fields = {"partition": 0, "timestamp": MS + offset, "headers": (), "topic": CLICKS}
    return SimpleNamespace(offset=offset, key=user.encode(), value=events.encode(click), **fields)


def state(store: MemoryStore, user: str) -> tuple[list[str], tuple[int, bytes] | None]:
    found = store.read_user(user_slot(0), 0, user, "1")
    return [entry.item_id for entry in found.history.entries], found.embedding


def test_only_followed_users_have_lists_and_every_event_counts(tmp_path: Any) -> None:
    bundle = make_bundle(tmp_path, make_items())
    stores = []
    for follows in (None, lambda user: user == "ana"):
        store, sinks = MemoryStore(), _ReplaySinks({})
        handlers = Handlers(
            SETTINGS,
            store,
            {topic: LogId("c", topic) for topic in SOURCES},
            [Generation(bundle, sinks)],
            Outputs.to_sink(sinks),
            ["1"],
            follows=follows,
        )
        handlers.clicks.fences.open({0: (0, 100)})
        batch = [record(n, ("ana", "bob")[n % 2], f"i{n}") for n in range(6)]
        # The resent one counts for nobody.
        resent = record(6, "bob", "i1")
        resent.value = batch[1].value
        outcome = ingest(handlers.clicks, 0, [*batch, resent])
        assert (outcome.applied, outcome.duplicates) == (6, 1)
        handlers.clicks.popularity.write(0)
        stores.append(store)
    everyone, some = stores
    assert partition_of("ana", 1) == 0
    assert state(some, "ana") == state(everyone, "ana")
    assert state(everyone, "bob")[0] and state(some, "bob") == ([], None)
    assert some.popular("i0", 100) == everyone.popular("i0", 100)
