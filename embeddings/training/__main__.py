"""The trainer process: reads the data, trains, writes the bundle and publishes the generation.

Exit codes: 0 done · 1 an error that a retry may solve · 2 a bad setting or option · 3 an operator
has to decide (the archive belongs to another log, or Kafka refuses access).
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from eddyline import generations
from eddyline.errors import EddylineError
from eddyline.kafka import topics
from eddyline.process import lifecycle
from eddyline.schema.events import Click
from eddyline.settings.loader import Settings
from embeddings.bundle import bundle, removal
from embeddings.data import sources
from embeddings.data.examples import TrainingData, split
from embeddings.evaluation.next_item import evaluate
from embeddings.models.base import Progress, Recipe
from embeddings.models.registry import DEFAULT, MODELS
from embeddings.seed import SEED_MAX
from embeddings.training.trainer import Report, train

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Train one generation. Returns the exit code; an error is a sentence on standard error."""
    arguments = _arguments(argv)
    return lifecycle.run(
        "trainer",
        lambda settings, _: _main(settings, arguments),
        needs_kafka=arguments.file is None or arguments.publish,
        needs_redis=False,
        stops_in_order=False,
    )


def _main(settings: Settings, arguments: argparse.Namespace) -> int:
    try:
        # Bars are for people.
        console = Console(stderr=True, quiet=settings.log_format == "json")
        report = _run(settings, arguments, console)
    except OSError as error:
        log.error(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    log.info(
        "generation trained",
        extra={
            "generation": report.generation,
            "events": report.events,
            "items": report.items,
            "users": report.users,
            "wall_s": round(report.wall_s, 1),
            "bundle": str(report.folder),
        },
    )
    return 0


def _run(settings: Settings, arguments: argparse.Namespace, console: Console) -> Report:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console) as bar:
        data = _read(settings, arguments, bar)
        generation = _name(settings, arguments)
        training_clicks, held_out = split(data.clicks, 1.0 - arguments.holdout)
        task = bar.add_task("training", total=None)

        def on_progress(p: Progress) -> None:
            text = f"training, epoch {p.epoch} of {p.epochs}, loss {p.loss:.2f}"
            bar.update(task, description=text, completed=p.step, total=p.steps)

        report = train(
            dataclasses.replace(data, clicks=training_clicks),
            settings.bundles / generation,
            generation,
            recipe=Recipe(epochs=arguments.epochs, seed=arguments.seed, threads=arguments.threads),
            model=MODELS[arguments.model],
            on_progress=on_progress,
        )
        if held_out:
            _evaluate(report, data, training_clicks, held_out, bar)
    if arguments.publish:
        manifest = generations.Manifest(
            generation=generation,
            bundle=generation,
            dimension=bundle.load(report.folder).dimension,
            created_ms=report.created_ms,
            cut=dict(report.cut),
        )
        generations.publish(settings, manifest, activate=arguments.activate)
        _remove_ended(settings)
    return report


def _name(settings: Settings, arguments: argparse.Namespace) -> str:
    """The generation's name. Raises BundleError for one that has ended."""
    if not arguments.publish:
        return arguments.generation or _next_name(settings.bundles, ())
    found = generations.read(settings)
    if arguments.generation:
        generations.refuse_ended(found, arguments.generation)
        return str(arguments.generation)
    return _next_name(settings.bundles, {*found.manifests, *found.ended})


def _remove_ended(settings: Settings) -> None:
    """Remove the generations whose time is over; the new one is published in any case."""
    try:
        removal.remove_ended(settings)
    except EddylineError as error:
        log.warning(
            "ended generations are not removed; `eddyline generations end` tries again",
            extra={"reason": str(error)},
        )


def _read(settings: Settings, arguments: argparse.Namespace, bar: Bar) -> TrainingData:
    if arguments.file is not None:
        return sources.from_file(settings, arguments.file)
    topics.wait_until_up(settings, arguments.wait_s)
    topics.ensure_topics(settings)
    tasks = {name: bar.add_task(f"reading {name}", total=None) for name in topics.SOURCES}

    def on_read(name: str, done: int, total: int) -> None:
        bar.update(tasks[name], completed=done, total=total)

    from_archive = (
        settings.train_from == "archive" if arguments.archive is None else arguments.archive
    )
    read = sources.from_archive if from_archive else sources.from_kafka
    data = read(settings, on_read=on_read)
    log.info(
        "read",
        extra={"archive": from_archive, "clicks": len(data.clicks), "items": len(data.items)},
    )
    if data.rejected:
        log.warning("records skipped", extra=dict(data.rejected))
    return data


def _evaluate(
    report: Report,
    data: TrainingData,
    training_clicks: list[Click],
    held_out: list[Click],
    bar: Bar,
) -> None:
    task = bar.add_task("evaluating on held-out clicks", total=None)
    result = evaluate(
        bundle.load(report.folder),
        data.profiles,
        training_clicks,
        held_out,
        on_progress=lambda done, total: bar.update(task, completed=done, total=total),
    )
    for name, quality in (("towers", result.towers), ("popularity", result.popularity)):
        log.info(
            "evaluated on held-out clicks",
            extra={
                "path": name,
                "events": quality.events,
                "hit_rate_10": round(quality.hit_rate_10, 4),
                "hit_rate_100": round(quality.hit_rate_100, 4),
                "mrr": round(quality.mrr, 4),
            },
        )


def _next_name(folder: Path, known: Collection[str]) -> str:
    """One above the highest number among bundles and known generations; 1 for the first."""
    names = {*known, *(path.name for path in folder.glob("*"))}
    numbers = [int(name) for name in names if name.isascii() and name.isdigit()]
    return str(max(numbers, default=0) + 1)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m embeddings.training", description=__doc__)
    parser.add_argument(
        "--file", type=Path, help="JSON lines to train from instead of the Kafka topics"
    )
    parser.add_argument(
        "--archive",
        action=argparse.BooleanOptionalAction,
        help="read the archive, then the topics beyond its end (by default the setting train_from)",
    )
    parser.add_argument("--generation", help="the generation's name; by default the next number")
    parser.add_argument(
        "--model",
        choices=sorted(MODELS),
        default=DEFAULT,
        help="kind of the model (default %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=_positive, default=8, help="passes over the clicks (default 8)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help=f"0 … {SEED_MAX} (default 0)")
    parser.add_argument("--threads", type=_positive, default=1, help="torch threads (default 1)")
    parser.add_argument(
        "--holdout",
        type=_share,
        default=0.0,
        help="share of the newest clicks to evaluate on instead of training on them",
    )
    parser.add_argument(
        "--wait-s", type=float, default=60.0, help="how long to wait for Kafka (default 60)"
    )
    parser.add_argument(
        "--no-publish", dest="publish", action="store_false", help="only write the bundle"
    )
    parser.add_argument(
        "--no-activate", dest="activate", action="store_false", help="publish, do not switch to it"
    )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value <= SEED_MAX:
        raise argparse.ArgumentTypeError(f"must be from 0 to {SEED_MAX}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError("must be at least 0 and below 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
