"""The archive process, wired together: `python -m streams.archive`, `eddyline archive`.

Exit codes: 0 a requested stop · 2 a bad setting · 3 an operator has to decide (the files are of
another log, or Kafka refuses us).
"""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path

from eddyline.archive import Archive
from eddyline.errors import Unavailable
from eddyline.kafka import topics
from eddyline.process import heartbeat, lifecycle
from eddyline.process.retry import Backoff, Retry
from eddyline.settings.loader import Settings
from streams import static_membership
from streams.archive import file_placement
from streams.archive.archiver import Archiver

log = logging.getLogger(__name__)

_BACKOFF_S = 0.2
# A stop waits for a call to a server or a file of the archive. A file that is cut off is no harm:
# the next start removes it and reads its records again.
_STOP_S_MAX = 15.0


def main() -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code."""
    return lifecycle.run("archive", _run, needs_redis=False, stop_limit_s=_STOP_S_MAX)


def _run(settings: Settings, stop: threading.Event) -> None:
    archive = Archive(settings)
    retry = Retry(settings, stop, lambda _: heartbeat.beat(settings, "archive"))
    retry.wait_for("Kafka", lambda: topics.ensure_topics(settings, topics.OF_READERS))
    file_placement.remove_abandoned(archive)
    member = static_membership.take(Path(settings.data_dir) / "archiver")
    archiver = Archiver(settings, archive, stop, member.name)
    backoff = Backoff(_BACKOFF_S, settings.backoff_ms_max / 1000)
    log.info(
        "archive starts", extra={"kafka": settings.kafka_bootstrap_servers, "url": archive.url}
    )
    while not stop.is_set():
        rows = archiver.rows
        try:
            archiver.run_once()
        except (Unavailable, OSError) as error:
            if archiver.rows > rows:
                backoff.reset()
            wait_s = backoff.next_s()
            log.warning("restarting", extra={"reason": str(error), "wait_ms": int(wait_s * 1000)})
            heartbeat.beat(settings, "archive")
            stop.wait(wait_s)
    member.close()


if __name__ == "__main__":
    sys.exit(main())
