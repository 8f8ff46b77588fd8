"""The archive process, wired together: `python -m streams.archive`, `eddyline archive`.

Exit codes: 0 a wanted stop · 2 a bad setting · 3 a person has to decide (the files are of another log, or
Kafka refuses us).
"""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path

from eddyline.archive import Archive
from eddyline.errors import SettingsError, Unavailable
from eddyline.kafka import topics
from eddyline.process import discovery, heartbeat, lifecycle, logs
from eddyline.process.retry import Retry
from eddyline.settings import loader
from eddyline.settings.loader import Settings
from streams import static_membership
from streams.archive import file_placement
from streams.archive.archiver import Archiver

log = logging.getLogger(__name__)

_BACKOFF_S = 0.2


def main() -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code."""
    stop = threading.Event()
    lifecycle.stop_on_signals(stop)
    try:
        settings = discovery.resolve(loader.load(), redis=False)
        archive = Archive(settings)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    logs.configure(settings, "archive")
    return lifecycle.run_until_exit(lambda: _run(settings, archive, stop))


def _run(settings: Settings, archive: Archive, stop: threading.Event) -> None:
    def reach() -> None:
        heartbeat.beat(settings, "archive")
        topics.ensure_topics(settings)

    Retry(settings, stop).wait_for("Kafka", reach)
    file_placement.remove_abandoned(archive)
    member = static_membership.take(Path(settings.data_dir) / "archiver")
    archiver, wait_s = Archiver(settings, archive, stop, member.name), _BACKOFF_S
    log.info(
        "archive starts", extra={"kafka": settings.kafka_bootstrap_servers, "url": archive.url}
    )
    while not stop.is_set():
        rows = archiver.rows
        try:
            archiver.run_once()
        except (Unavailable, OSError) as error:
            wait_s = (
                _BACKOFF_S
                if archiver.rows > rows
                else min(2 * wait_s, settings.backoff_ms_max / 1000)
            )
            log.warning(
                "starting again", extra={"reason": str(error), "wait_ms": int(wait_s * 1000)}
            )
            heartbeat.beat(settings, "archive")
            stop.wait(wait_s)
    member.close()


if __name__ == "__main__":
    sys.exit(main())
