"""Archive a test's topics in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from eddyline.archive import HOUR_MS, Archive
from eddyline.kafka.producers import now_ms
from eddyline.settings.loader import Settings
from streams import static_membership
from streams.archive.archiver import Archiver

LIMIT_S = 90


def archive_all(
    settings: Settings,
    ahead_ms: int = 2 * HOUR_MS,
    at_each_poll: Callable[[Archiver], None] = lambda archiver: None,
) -> None:
    """Archive until all that lies in Kafka is in files: by this clock the hour is over.

    For 4 partitions of clicks (users and answers have as many) and 2 of items.
    """
    member = static_membership.take(Path(settings.data_dir) / "archiver")
    archiver = Archiver(
        settings, Archive(settings), threading.Event(), member.name, lambda: now_ms() + ahead_ms
    )
    deadline = time.monotonic() + LIMIT_S

    def done() -> bool:
        assert time.monotonic() < deadline, "the archive did not catch up"
        at_each_poll(archiver)
        # A member of before may still hold its partitions, until its session is over.
        if len(archiver._consumer.assignment()) < 14 or not archiver.caught_up():
            return False
        archiver._complete_past_hours()
        return True

    try:
        archiver.run_once(done)
    finally:
        member.close()
