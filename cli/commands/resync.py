"""`eddyline resync`: delete what the compacted topics no longer have."""

from __future__ import annotations

from cli.console import console
from eddyline.settings.loader import Settings
from streams.operations import resync as operation


def resync(settings: Settings) -> None:
    """Append the missing deletes and print how many. Raises as `streams.operations.resync.run`."""
    report = operation.run(settings)
    console.print(
        f"{report.items:,} items and {report.users:,} users are not in Kafka any more: null "
        "records appended, ingest deletes them"
    )
