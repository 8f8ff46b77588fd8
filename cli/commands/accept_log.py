"""`eddyline accept-log`: go on with Kafka's logs as they are now."""

from __future__ import annotations

from cli.console import console
from eddyline.kafka.topics import CLICKS
from eddyline.settings.loader import Settings
from streams.operations import retention_gaps


def accept_log(settings: Settings, *, skip_lost: bool) -> None:
    """Accept the logs and print what was changed and given up."""
    accepted = retention_gaps.accept_log(settings, skip_lost=skip_lost)
    console.print(
        f"{accepted.fences_changed} fences changed; new logs are read from their beginning, "
        "others go on"
    )
    for gap in accepted.given_up:
        console.print(f"given up: {CLICKS}/{gap.partition} offsets {gap.first} to {gap.last}")
