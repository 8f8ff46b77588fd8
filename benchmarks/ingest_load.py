"""The load of `make bench-ingest`, in a process of its own: clicks as fast as they go, or paced.

One argument, a `Load` as JSON; the servers come from the environment as for every process. It prints one JSON
line at its end: how many were sent, how long that took, and its CPU time.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import msgspec

from eddyline import kafka
from eddyline.events import Click
from eddyline.settings import load

# From this rate on a producer gathers records for a millisecond: one request for each would cost this process
# and the broker more than all of ingest.
LINGER_RATE = 1_000
# Where the generator was held up it catches up in steps of this many events, not in one burst.
BURST_MAX = 64
FLUSH_S = 120


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What to send.

    tag:   begins every event id
    rate:  events a second, 0 for as fast as they go
    users: so many different ones, `u0` …; some click more often than others, `in_turn` all the same
    items: an item is `<item_prefix><1 … items>`, popular ones more often
    """

    tag: str
    count: int
    rate: float = 0
    users: int = 10_000
    in_turn: bool = False
    item_prefix: str = "x"
    items: int = 2_000


def send(what: Load) -> dict[str, Any]:
    """Send it all; what was measured."""
    settings, rng = load(), random.Random(what.tag)
    fast = not what.rate
    more: dict[str, Any] = {"linger_ms": int(what.rate >= LINGER_RATE)}
    if fast:
        more = {"linger_ms": 20, "batch_size": 131_072}
    producer = kafka.make_producer(settings, **more)
    last: Any = None
    begun, cpu = time.perf_counter(), time.process_time()
    for n in range(what.count):
        if what.rate:
            ahead = begun + n / what.rate - time.perf_counter()
            if ahead > 0:
                time.sleep(ahead)
            elif n % BURST_MAX == 0:
                time.sleep(0)
        user = n % what.users if what.in_turn else int(what.users * rng.random() ** 1.5)
        click = Click(
            event_id=f"{what.tag}-{n}",
            user_id=f"u{user}",
            item_id=f"{what.item_prefix}{1 + int(what.items * rng.random() ** 2)}",
            at_ms=time.time_ns() // 1_000_000,
        )
        last = kafka.send_click(producer, settings, click)
    producer.flush(timeout=FLUSH_S)
    last.get(timeout=FLUSH_S)
    took, used = time.perf_counter() - begun, time.process_time() - cpu
    producer.close(timeout=5)
    return {"sent": what.count, "seconds": took, "cpu_s": used}


if __name__ == "__main__":
    print(json.dumps(send(msgspec.json.decode(sys.argv[1], type=Load))))
