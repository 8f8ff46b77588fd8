"""Before a worker serves a generation: has ingest published what happened to items since the bundle's cut?

A bundle holds the items as they were at its cut. One that was deleted since is in it still, and leaves only
by the record that ingest publishes. So a worker that starts on a new generation waits until the generation's
fences have reached the ends that `items` has now; for a limited time, because ingest may be down.
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

# Encoding and publishing 100,000 items takes about this long; a worker that waits longer helps nobody.
WAIT_S = 20.0
POLL_S = 0.05


def wait_until_published(
    settings: Settings,
    store: StateStore,
    generation: str,
    stop: threading.Event,
    limit_s: float = WAIT_S,
) -> int:
    """Return once the item changes that lie in `items` now are published; how many are missing, 0 for none.

    Returns early where `stop` is set, and after `limit_s`.
    """
    deadline = time.monotonic() + limit_s
    try:
        ends = {p: end for p, end in topics.end_offsets(settings, topics.ITEMS).items() if end}
        while (behind := _behind(store, generation, ends)) and not stop.wait(POLL_S):
            if time.monotonic() > deadline:
                log.warning(
                    "items are served as the bundle has them: ingest has not published their last changes",
                    extra={"generation": generation, "records": behind},
                )
                return behind
    except Unavailable as error:
        log.warning(
            "served without knowing what ingest has published", extra={"reason": str(error)}
        )
    return 0


def _behind(store: StateStore, generation: str, ends: dict[int, int]) -> int:
    """How many records of `items` lie between the generation's fences and these ends."""
    total = 0
    for partition, end in ends.items():
        fence = store.fences(Source(f"{topics.ITEMS}@{generation}", partition), ["i0"])["i0"]
        total += max(0, end - 1 - (fence.offset if fence else -1))
    return total
