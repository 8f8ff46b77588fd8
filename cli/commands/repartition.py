"""`eddyline repartition`: copy all topics into a namespace with other numbers of partitions."""

from __future__ import annotations

import typer
from rich.console import Console

from cli.console import console, progress_bar
from eddyline.kafka.topics import SOURCES
from eddyline.settings.loader import Settings
from streams.operations import repartition as operation
from streams.operations import repartition_plan
from streams.operations.repartition import CopyReport
from streams.operations.repartition_plan import Plan


def repartition(
    settings: Settings,
    namespace: str,
    clicks: int,
    items: int,
    *,
    follow: bool,
    skip_lost: bool,
    yes: bool,
) -> None:
    """Say what will be done, ask, copy and print the counts. Raises as `operation.run`."""
    target = repartition_plan.target_of(settings, namespace, clicks, items)
    plan = repartition_plan.plan(settings, target)
    if plan.lost and not skip_lost:
        raise repartition_plan.lost_error(plan.lost)
    _show_plan(settings, target, plan)
    if not yes:
        typer.confirm("Copy?", abort=True)
    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("records", total=sum(plan.records.values()))
        report = operation.run(
            settings,
            target,
            follow=follow,
            skip_lost=skip_lost,
            on_progress=lambda copied, left_out: bar.update(task, completed=copied + left_out),
        )
    _show(target, report)


def _show_plan(settings: Settings, target: Settings, plan: Plan) -> None:
    for name in SOURCES:
        before, after = settings.clicks_partitions, target.clicks_partitions
        if name == "items":
            before, after = settings.items_partitions, target.items_partitions
        console.print(
            f"{settings.prefixed(name)} ({before} partitions) -> {target.prefixed(name)} "
            f"({after} partitions): {plan.records[name]:,} offsets to copy"
        )
    if plan.lost:
        console.print(f"left out: {plan.lost}")
    console.print("goes on with an earlier copy" if plan.goes_on else "a new copy")
    console.print("Nothing of the present namespace changes; its ingest and workers go on.")


def _show(target: Settings, report: CopyReport) -> None:
    copied = ", ".join(f"{report.copied[name]:,} of {name}" for name in SOURCES)
    console.print(f"copied: {copied}")
    for reason, count in sorted(report.left_out.items()):
        console.print(f"left out, {reason}: {count:,}")
    console.print(
        f"{target.prefixed('clicks')} has all records of now. Next: train, start ingest and "
        "workers there (docs/operations.md)"
    )
