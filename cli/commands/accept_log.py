"""`eddyline accept-log`: go on with Kafka's logs as they are now."""

from __future__ import annotations

from typing_extensions import override

from cli.console import console
from eddyline.kafka.topics import CLICKS
from eddyline.settings.loader import Settings
from streams.operations import retention_gaps
from streams.operations.retention_gaps import AcceptObserver, Gap


class _Printer(AcceptObserver):
    @override
    def fences_changed(self, count: int) -> None:
        console.print(
            f"{count} fences changed; new logs are read from their beginning, others go on"
        )

    @override
    def given_up(self, gap: Gap) -> None:
        console.print(f"given up: {CLICKS}/{gap.partition} offsets {gap.first} to {gap.last}")


def accept_log(settings: Settings, *, skip_lost: bool) -> None:
    """Accept the logs, and print each change once it is made."""
    retention_gaps.accept_log(settings, _Printer(), skip_lost=skip_lost)
