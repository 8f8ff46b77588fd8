"""`eddyline merge`: what a visitor did becomes part of the list of the user he turned out to be.

The command only sends a record into the visitor's own clicks; ingest moves the list at exactly that point of
the log. So it may be killed or run twice: whatever has been moved is no longer there to be moved again.
"""

from __future__ import annotations

import time

from cli.console import console
from eddyline.errors import EddylineError
from eddyline.kafka import producers, topics
from eddyline.kafka.producers import now_ms, sent_to
from eddyline.schema import events
from eddyline.schema.events import Merge
from eddyline.schema.partitioning import partition_of, user_slot
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Source

_POLL_S = 0.02


def merge(settings: Settings, visitor: str, user: str, *, wait_s: float) -> None:
    """Move the visitor's list into the user's, then forget the visitor; prints the token of the merge.

    wait_s: how long ingest may take to apply it; the visitor's profile is forgotten only after that
    Raises Rejected for a bad id, and EddylineError where ingest took longer: the list is moved when it runs.
    """
    made = Merge(user_id=visitor, merge_into=user, at_ms=now_ms())
    events.decode_user_event(events.encode(made), appended_ms=made.at_ms, far_future_ms_max=0)
    partition = partition_of(visitor, settings.clicks_partitions)
    store = RedisStore(settings)
    producer = producers.make_producer(settings)
    try:
        found = store.read_user(user_slot(partition), partition, visitor, "").history.entries
        at = sent_to(producers.send_merge(producer, settings, made), settings)
        console.print(
            f"sent: {topics.CLICKS}/{at[0]}/{at[1]}, {len(found)} behaviours of {visitor} so far"
        )
        _await(store, Source(topics.CLICKS, at[0]), at[1], wait_s)
        sent_to(producers.send_forget(producer, settings, visitor), settings)
        console.print(f"moved to {user}; {visitor} is forgotten")
    finally:
        producer.close(timeout=settings.kafka_timeout_ms / 1000)
        store.close()


def _await(store: RedisStore, source: Source, offset: int, wait_s: float) -> None:
    """Return once the fence has passed the offset."""
    slot, deadline = user_slot(source.partition), time.monotonic() + wait_s
    while (fence := store.fences(source, [slot])[slot]) is None or fence.offset < offset:
        if time.monotonic() > deadline:
            raise EddylineError(
                f"ingest has not applied the merge in {wait_s:g} s; it will when it runs. Run the same "
                "command again then: it moves what came since, and forgets the visitor"
            )
        time.sleep(_POLL_S)
