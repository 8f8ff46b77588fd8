"""`eddyline merge`: move a visitor's history into the history of a known user.

The command sends a record into the visitor's own clicks; ingest moves the history at exactly that
point of the log. So the command may be killed or run twice: moved events are gone from the visitor.
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
    """Move the visitor's history, then forget the visitor; prints the token of the merge.

    wait_s: how long ingest may take to apply the merge; only then is the visitor forgotten
    Raises Rejected for a bad id, and EddylineError if ingest takes longer: it applies the merge
    once it runs.
    """
    sent = Merge(user_id=visitor, merge_into=user, at_ms=now_ms())
    record = events.decode_user_event(
        events.encode(sent), appended_ms=sent.at_ms, far_future_ms_max=0, id_form=settings.id_form
    )
    assert isinstance(record, Merge)
    visitor, user = record.user_id, record.merge_into
    partition = partition_of(visitor, settings.clicks_partitions)
    store = RedisStore(settings)
    producer = producers.make_producer(settings)
    try:
        entries = store.read_user(user_slot(partition), partition, visitor, "").history.entries
        at = sent_to(producers.send_merge(producer, settings, record), settings)
        console.print(
            f"sent: {topics.CLICKS}/{at[0]}/{at[1]}, {len(entries)} events of {visitor} so far"
        )
        _wait_for_fence(store, Source(topics.CLICKS, at[0]), at[1], wait_s)
        sent_to(producers.send_forget(producer, settings, visitor), settings)
        console.print(f"moved to {user}; {visitor} is forgotten")
    finally:
        producer.close(timeout=settings.kafka_timeout_ms / 1000)
        store.close()


def _wait_for_fence(store: RedisStore, source: Source, offset: int, wait_s: float) -> None:
    """Return once the fence has reached the offset."""
    slot, deadline = user_slot(source.partition), time.monotonic() + wait_s
    while (fence := store.fences(source, [slot])[slot]) is None or fence.offset < offset:
        if time.monotonic() > deadline:
            raise EddylineError(
                f"ingest has not applied the merge in {wait_s:g} s; it will once it runs. Then run "
                "the same command again: it moves later events and forgets the visitor"
            )
        time.sleep(_POLL_S)
