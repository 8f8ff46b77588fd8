"""`eddyline refill`: apply clicks from the archive that Kafka no longer has."""

from __future__ import annotations

from rich.console import Console

from cli.console import console, progress_bar
from eddyline.settings.loader import Settings
from streams.operations import refill as operation
from streams.operations.refill import RefillReport


def refill(settings: Settings, *, skip_lost: bool) -> None:
    """Fill every gap and print what was applied. Raises as `streams.operations.refill.run`."""
    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("offsets", total=None, visible=False)
        report = operation.run(
            settings,
            skip_lost=skip_lost,
            on_progress=lambda done, total: bar.update(
                task, completed=done, total=total, visible=True
            ),
            on_lost=console.print,
        )
    show(report)


def show(report: RefillReport) -> None:
    """Print the counts of a refill."""
    if not report.gaps:
        console.print("nothing is missing: Kafka has all that was not applied yet")
        return
    if report.files_without_merges:
        console.print(
            f"{report.files_without_merges:,} files are from before merges were archived: users "
            "who were merged then keep their history"
        )
    console.print(
        f"{report.clicks.applied:,} events applied, {report.profiles.applied:,} profiles, "
        f"{report.clicks.steps:,} steps"
    )
    if report.clicks.duplicates:
        console.print(
            f"{report.clicks.duplicates:,} dropped as sent again: dedupe_window_events was smaller "
            "then"
        )
    for reason, count in sorted(report.refused.items()):
        console.print(f"{count:,} refused by the present settings: {reason}")
    if report.forwarded:
        console.print(f"of merges: {report.forwarded:,} events sent on")
    console.print("ingest can start")
