"""A worker that starts waits until ingest has published all item changes since the bundle's cut.

The bundle holds the items as of its cut, later deleted ones included; they leave the index only by
the records that ingest publishes. So the worker waits until the fences of the generation have
reached the present ends of `items`; for a limited time, because ingest may be down.
"""

from __future__ import annotations

import logging
import threading
import time

from eddyline.errors import Unavailable
from eddyline.kafka import topics
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import Source, StateStore

log = logging.getLogger(__name__)

# Encoding and publishing 100,000 items takes about this long.
WAIT_S = 20.0
POLL_S = 0.05


def wait_until_published(
    settings: Settings,
    store: StateStore,
    generation: str,
    stop: threading.Event,
    limit_s: float = WAIT_S,
) -> int:
    """Wait until all present records of `items` are published. Returns how many are missing.

    Returns early if `stop` is set, and after `limit_s`.
    """
    deadline = time.monotonic() + limit_s
    try:
        ends = {p: end for p, end in topics.end_offsets(settings, topics.ITEMS).items() if end}
        while (behind := _behind(store, generation, ends)) and not stop.wait(POLL_S):
            if time.monotonic() > deadline:
                log.warning(
                    "items are served as of the bundle: ingest has not published all changes",
                    extra={"generation": generation, "records": behind},
                )
                return behind
    except Unavailable as error:
        log.warning(
            "it is unknown what ingest has published; serving starts", extra={"reason": str(error)}
        )
    return 0


def _behind(store: StateStore, generation: str, ends: dict[int, int]) -> int:
    """Number of records of `items` between the fences of the generation and these ends."""
    total = 0
    for partition, end in ends.items():
        fence = store.fences(Source(f"{topics.ITEMS}@{generation}", partition), ["i0"])["i0"]
        total += max(0, end - 1 - (fence.offset if fence else -1))
    return total
