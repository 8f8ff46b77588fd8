"""The options of the commands that read and write files; `cli.main` adds them."""

# Imports inside the functions: every command starts fast and loads only what it needs.

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from eddyline.errors import SettingsError
from eddyline.settings.loader import load
from embeddings.seed import SEED_MAX

Seed = Annotated[int, typer.Option(min=0, max=SEED_MAX, help="Of training, chance and intervals.")]
Processes = Annotated[
    int, typer.Option(min=0, max=64, help="Default: 2 if there are cores and events for them.")
]
Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option(help="Two files of settings: evaluate both, show the differences."),
]
Diff = Annotated[
    tuple[Path, Path] | None,
    typer.Option(help="Two files of settings: show the first query that differs, no more."),
]


def import_(
    files: Annotated[list[Path], typer.Argument(help="CSV, TSV, JSON lines, Parquet; .gz, .zst.")],
    map_name: Annotated[
        str, typer.Option("--map", help="A map's file or a preset; default: guessed.")
    ] = "",
    topic: Annotated[
        str, typer.Option(help="clicks, items or users; default: by the columns.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look at all rows, send none.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not show and ask first.")] = False,
    refused: Annotated[
        Path | None, typer.Option(help="Write refused rows to this new file.")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Train and activate a generation afterwards.")
    ] = False,
    delimiter: Annotated[str, typer.Option(help="Of CSV files; default: found out.")] = "",
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="Whether CSV files have names.")
    ] = None,
) -> None:
    """Import files: each row once, also if the command is killed and started again.

    Shows first what each column was taken for and what the first rows become. The guessed map is
    written to FILE.map.toml; edit it and look again.
    """
    from cli.commands import import_files
    from eddyline.process.discovery import resolve

    import_files.import_files(
        lambda: resolve(load()),
        load(),
        files,
        import_files.Options(map_name, topic, delimiter, header, dry_run, refused),
        None if yes else lambda question: typer.confirm(question, abort=True),
    )
    if train and not dry_run:
        from cli.commands import first_answer

        first_answer.prepare(resolve(load()))


def export(
    what: Annotated[str, typer.Argument(help="items, users or clicks.")],
    file: Annotated[
        Path, typer.Argument(help="A new .jsonl, .csv (both also .gz, .zst) or .parquet file.")
    ],
    archive: Annotated[
        bool | None,
        typer.Option("--archive/--no-archive", help="Read the archive; default: train_from."),
    ] = None,
) -> None:
    """Write items, profiles or clicks to a file that `eddyline import` reads again."""
    from cli.commands import export_files
    from eddyline.process.discovery import resolve

    export_files.export(resolve(load(), redis=False), what, file, archive=archive)


def replay(
    file: Annotated[
        Path | None, typer.Argument(help="One JSON object a line: clicks, items or users.")
    ] = None,
    speed: Annotated[
        float, typer.Option(help="1 keeps the gaps, 10 is ten times as fast, 0 has no gaps.")
    ] = 0,
    topic: Annotated[str, typer.Option(help="clicks, items or users.")] = "clicks",
    shift_to_now: Annotated[
        bool, typer.Option(help="Move all times so that the last event is now.")
    ] = False,
    begin: Annotated[
        str, typer.Option("--from", help="earliest, a time, or offsets: clicks:0=100,items:1=5.")
    ] = "earliest",
    end: Annotated[str, typer.Option("--to", help="As --from; the end is exclusive.")] = "latest",
    into: Annotated[
        str, typer.Option(help="memory or redis: replay a slice of Kafka, no file.")
    ] = "",
    chunk: Annotated[int, typer.Option(help="With --into: records in one batch.")] = 256,
) -> None:
    """Send the events of a file, with their gaps or faster.

    With --into, replay a slice of Kafka's topics and print the hash of the resulting state: the
    same each time, in memory and in Redis.
    """
    from eddyline.process.discovery import resolve

    if into:
        if file is not None:
            raise SettingsError(
                f"replay {file} --into {into}: name a file or a slice of Kafka, not both"
            )
        from cli.commands import state_replay

        state_replay.replay(resolve(load()), begin=begin, end=end, into=into, batch=chunk)
        return
    if file is None:
        raise SettingsError(
            "replay needs a file to send, or --into memory|redis for a slice of Kafka"
        )
    from cli.commands import replay_file

    replay_file.replay_file(
        resolve(load()), file, speed=speed, topic=topic, shift_to_now=shift_to_now
    )


def init(
    kafka: Annotated[str, typer.Option(help="Kafka's host:port; empty: a local one.")] = "",
    redis: Annotated[str, typer.Option(help="Redis's URL; empty: a local one.")] = "",
    data_dir: Annotated[str, typer.Option(help="Folder for data.")] = ".eddyline",
    files: Annotated[str, typer.Option(help="Files to import, separated by blanks.")] = "",
    start: Annotated[bool, typer.Option(help="Start ingest and worker now.")] = True,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; take the options.")] = False,
) -> None:
    """Write eddyline.toml and maps of files, start what is missing; asks five questions."""
    from cli.commands import init as commands_init

    answers = commands_init.Answers(kafka, redis, data_dir, files, start)
    if not yes:
        answers = commands_init.asked(
            answers, lambda question, default: str(typer.prompt(question, default=default))
        )
    commands_init.init(answers, Path())


def evaluate(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Files of events, as `eddyline import` reads them.")
    ] = None,
    items: Annotated[Path | None, typer.Option(help="A file of items.")] = None,
    users: Annotated[Path | None, typer.Option(help="A file of profiles.")] = None,
    map_name: Annotated[
        str, typer.Option("--map", help="A map's file or a preset; default: guessed.")
    ] = "",
    archive: Annotated[bool, typer.Option("--archive", help="The archive, instead.")] = False,
    topics: Annotated[bool, typer.Option("--topics", help="Kafka's topics, instead.")] = False,
    split: Annotated[float, typer.Option(help="Share of the events to learn from.")] = 0.8,
    repeats: Annotated[
        str, typer.Option(help="drop: without seen items, as answers are; keep: with them.")
    ] = "drop",
    rows: Annotated[str, typer.Option(help="Some rows only, separated by commas.")] = "",
    bundle: Annotated[
        Path | None, typer.Option(help="A trained bundle; default: one is trained.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of the training.")] = 8,
    seed: Seed = 0,
    processes: Processes = 0,
    json: Annotated[Path | None, typer.Option(help="Write everything to this new file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to this new file.")] = None,
    compare: Compare = None,
    diff: Diff = None,
) -> None:
    """Measure what every recall path and the fused answer are worth on a log.

    Replays the log through ingest's handlers and the worker's paths on stores in memory, and ranks
    each later event with what was known before it. Sends nothing.
    """
    # Processes are the parallelism here. Read when numpy is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from cli.commands import evaluate as command
    from eddyline.process.discovery import resolve
    from embeddings.data import sources

    if sum((bool(files), archive, topics)) != 1:
        raise SettingsError("evaluate needs files of events, --archive or --topics: one of them")
    source = sources.from_archive if archive else sources.from_kafka if topics else None
    read = command.Input(
        settings=load() if source is None else resolve(load(), redis=False),
        files=files or [],
        items=items,
        users=users,
        source=source,
    )
    options = command.Options(
        map_name=map_name,
        split=split,
        repeats=repeats,
        rows=[name for one in rows.split(",") if (name := one.strip())],
        bundle=bundle,
        epochs=epochs,
        seed=seed,
        processes=processes,
        json=json,
        html=html,
        compare=compare,
        diff=diff,
    )
    if diff:
        from cli.commands import evaluate_diff

        evaluate_diff.diff(read, options)
    else:
        command.evaluate(read, options)
