"""`eddyline evaluate`: what the recall paths and the fused answer are worth on a log.

The files are those that `eddyline import` reads, with the same maps. Nothing is sent: all state is
in stores in memory. The towers are trained on the events before the split.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cli.commands import import_files
from cli.commands.import_files import Plan
from cli.console import console
from eddyline.errors import Rejected, SettingsError
from eddyline.kafka import topics
from eddyline.process import files as disk
from eddyline.schema.events import Click, Item, UserProfile
from eddyline.settings import loader
from eddyline.settings.loader import Settings
from embeddings.bundle import bundle as bundles
from embeddings.bundle.bundle import Bundle
from embeddings.data.examples import TrainingData
from embeddings.evaluation.metrics import of_ranks
from evaluation import offline, page
from evaluation.event_log import EventLog, LogBuilder
from evaluation.metrics import Bootstrap
from evaluation.offline import ROWS
from evaluation.protocol import Outcome
from evaluation.report import Report, differences
from streams.importing.rows import Event, RowReader

_ROWS_PER_SHOW = 1_000
_OF_EVENTS = (topics.CLICKS, topics.ITEMS)
_BECOMES = {topics.CLICKS: "a click", topics.ITEMS: "an item", topics.USERS: "a profile"}
_SHOWN = ("hr_50", "hr_100", "mrr", "ndcg_10", "hr_10_debiased")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of the command. bundle: None to train one; rows: empty for all

    processes: 0 for as many as are worth it
    compare, diff: two files of settings, or none
    """

    map_name: str = ""
    split: float = 0.8
    repeats: str = "drop"
    rows: Sequence[str] = ()
    bundle: Path | None = None
    epochs: int = 8
    seed: int = 0
    processes: int = 0
    json: Path | None = None
    html: Path | None = None
    compare: tuple[Path, Path] | None = None
    diff: tuple[Path, Path] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """What is read. source: reads everything instead of files"""

    settings: Settings
    files: Sequence[Path] = ()
    items: Path | None = None
    users: Path | None = None
    source: Callable[[Settings], TrainingData] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What was read and trained. configurations: (name, settings) of each"""

    log: EventLog
    bundle: Bundle
    configurations: Sequence[tuple[str, Settings]]
    bar: Progress


def evaluate(source: Input, options: Options) -> list[Report]:
    """Read, train, replay and report. Raises EddylineError."""
    begun_s = time.monotonic()
    name = source.files[0].name if source.files else "the log"
    with prepared(source, options) as found:
        made = [
            _replay(one, found, f"{name}, {of}" if of else name, options)
            for of, one in found.configurations
        ]
        reports = [one for one, _ in made]
        if options.compare:
            reports[0] = _compared(found.log, made, options)
    for one in reports:
        show(one)
    if options.json is not None:
        write_json(options.json, reports)
    if options.html is not None:
        text = page.page(reports[0], reports[1:])
        disk.write_atomically(options.html, text.encode(), mode=0o644)
    console.print(f"in {time.monotonic() - begun_s:.0f} s")
    return reports


@contextmanager
def prepared(source: Input, options: Options) -> Iterator[Prepared]:
    """Read the log, and load or train the towers; with a progress bar. Raises EddylineError."""
    configurations = _configurations(source.settings, options)
    with _removed_on_sigterm(), _bar() as bar:
        named = None if options.bundle is None else bundles.load(options.bundle)
        if named is None:
            _load_trainer()
        settings = configurations[0][1]
        if source.source is None:
            log = read(settings, source.files, source.items, source.users, options.map_name, bar)
        else:
            log = _log_of(settings, source.source(source.settings))
        offline.check_split(log, options.split)
        with tempfile.TemporaryDirectory(prefix="eddyline-evaluate-towers-") as folder:
            bundle = named or _trained(log, Path(folder), options, bar)
            yield Prepared(log=log, bundle=bundle, configurations=configurations, bar=bar)


def read(
    settings: Settings,
    files: Sequence[Path],
    items: Path | None,
    users: Path | None,
    map_name: str,
    bar: Progress,
) -> EventLog:
    """The log of some files. Raises EddylineError if one cannot be read, or no row of it counts.

    Rows that are refused are counted and shown.

    Where a table of events describes its items, the first row of each counts, from its first event
    on: later rows hold what was not known then.
    """
    builder, refused, empty = LogBuilder(settings.dwell_ms_full), Counter[str](), list[str]()
    named = [(path, topics.CLICKS) for path in files]
    named += [(path, topics.ITEMS) for path in (items,) if path is not None]
    named += [(path, topics.USERS) for path in (users,) if path is not None]
    plans = [_plan(path, topic, map_name, describes=items is None) for path, topic in named]
    for (path, topic), plan in zip(named, plans, strict=True):
        accepted = Counter[str]()
        for one in plan.topics:
            reader = RowReader(settings, plan.file, plan.file.digest(), one, plan.file_map)
            described = one != topic
            for event in _events(reader, refused, bar):
                if isinstance(event, Click):
                    builder.add(event)
                elif isinstance(event, Item) and described:
                    builder.descriptions.setdefault(event.item_id, event)
                elif isinstance(event, Item):
                    builder.changes.append(event)
                elif isinstance(event, UserProfile):
                    builder.profiles.append(event)
                else:
                    refused[f"{path.name}: deletes and merges are not evaluated"] += 1
                    continue
                accepted[one] += 1
        if not accepted[topic]:
            empty.append(f"{path}: no row becomes {_BECOMES[topic]}")
    for reason, count in sorted(refused.items()):
        console.print(f"{count:,} rows left out: {reason}")
    if empty:
        raise SettingsError(empty[0])
    return builder.build()


def show(one: Report) -> None:
    """Print the table of a report, and its differences."""
    numbers = ", ".join(f"{name} {count:,}" for name, count in one.events.items())
    console.print(f"\n{one.name}: {numbers}; {one.users:,} users, {one.items:,} items")
    if one.rejected:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in one.rejected.items())
        console.print(f"refused as ingest does: {counts}")
    lines = [["row", "HR@10", "95 %", *(page.METRICS[name] for name in _SHOWN)]]
    for row in one.rows:
        first, others = row.metrics["hr_10"], (row.metrics[name] for name in _SHOWN)
        lines.append([row.name, first.number, first.interval, *(one.number for one in others)])
    columns(lines)
    for found in one.differences:
        group = f", {found.group}" if found.group else ""
        console.print(f"HR@10 of {found.left} − {found.right}{group}: {found.hr_10}")


def columns(lines: Sequence[Sequence[str]]) -> None:
    """Print a table. Not one of rich, which cuts the figures where the output has 80 columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        console.print("  ".join(cells).rstrip())


def _plan(path: Path, topic: str, map_name: str, *, describes: bool) -> Plan:
    """How a file is read. describes: whether events may describe their items"""
    options = import_files.Options(map_name=map_name)
    if topic == topics.CLICKS and describes:
        plan = import_files.plan(path, options)
        if topic in plan.topics:
            return replace(plan, topics=[one for one in _OF_EVENTS if one in plan.topics])
    return import_files.plan(path, replace(options, topic=topic))


def _events(reader: RowReader, refused: Counter[str], bar: Progress) -> Iterator[Event | None]:
    """The events of a file, in its order."""
    path = reader.file.path
    task = bar.add_task(f"{path.name} → {reader.topic}", total=reader.file.total)
    for number, row in enumerate(reader.file.rows()):
        if number % _ROWS_PER_SHOW == 0:
            bar.update(task, completed=number)
        try:
            made = reader.events(number, row)
        except Rejected as why:
            refused[f"{path.name}: {why.reason} {why.field}".rstrip()] += 1
            continue
        for _, event in made:
            yield event
    bar.update(task, completed=reader.file.total)


def _log_of(settings: Settings, data: TrainingData) -> EventLog:
    builder = LogBuilder(settings.dwell_ms_full, list(data.items))
    builder.profiles += [
        msgspec.convert({"user_id": user_id, "attributes": dict(attributes)}, UserProfile)
        for user_id, attributes in data.profiles.items()
    ]
    for click in data.clicks:
        builder.add(click)
    return builder.build()


def _configurations(settings: Settings, options: Options) -> list[tuple[str, Settings]]:
    """(name, settings) of each run. Raises SettingsError."""
    if options.repeats not in ("drop", "keep"):
        raise SettingsError(f"--repeats {options.repeats!r}: expected drop or keep")
    offline.check_rows(options.rows or tuple(ROWS))
    if not 0 < options.split < 1:
        raise SettingsError(f"--split {options.split}: must be between 0 and 1")
    _check_outputs(options)
    if options.compare and options.diff:
        raise SettingsError("--compare and --diff: name one of them")
    if options.diff and options.html is not None:
        raise SettingsError("--html: --diff makes no page")
    files = options.compare or options.diff
    if files is None:
        return [("", settings)]
    found = [
        (path.name, loader.load({**os.environ, "EDDYLINE_CONFIG": str(path)})) for path in files
    ]
    first, second = (one.dwell_ms_full for _, one in found)
    if first != second:
        option = "--compare" if options.compare else "--diff"
        raise SettingsError(
            f"{option}: dwell_ms_full is {first} in {found[0][0]} and {second} in {found[1][0]}; "
            "the events are read once, so it must be the same"
        )
    return found


def _check_outputs(options: Options) -> None:
    """Raise SettingsError unless the reports can be written, each to a new file."""
    for name, path in (("--json", options.json), ("--html", options.html)):
        if path is None:
            continue
        if path.exists():
            raise SettingsError(f"{name} {path}: exists already")
        disk.check_writable(name, str(path.parent))
    if options.json is not None and options.json == options.html:
        raise SettingsError(f"--html {options.html}: is the file of --json too")


def _load_trainer() -> None:
    """Load what trains, before the log is read. Raises SettingsError if it is missing."""
    try:
        import embeddings.training.trainer  # noqa: F401
    except ImportError:
        raise SettingsError(
            "towers are trained by torch, which is missing: install eddyline[trainer], or name a "
            "trained --bundle"
        ) from None


def _trained(log: EventLog, folder: Path, options: Options, bar: Progress) -> Bundle:
    """A bundle that is trained on the events before the split."""
    from embeddings.models.base import Progress as Step
    from embeddings.models.base import Recipe
    from embeddings.training.trainer import train

    task = bar.add_task("training", total=None)

    def on_progress(step: Step) -> None:
        bar.update(task, completed=step.step, total=step.steps)

    data = offline.training_data(log, log.split(options.split))
    recipe = Recipe(epochs=options.epochs, seed=options.seed)
    report = train(data, folder / "1", "1", recipe=recipe, on_progress=on_progress)
    return bundles.load(report.folder)


def _replay(
    settings: Settings, found: Prepared, name: str, options: Options
) -> tuple[Report, Outcome]:
    task = found.bar.add_task("replay", total=len(found.log))
    return offline.evaluate(
        settings,
        found.log,
        found.bundle,
        name=name,
        split=options.split,
        keeps_repeats=options.repeats == "keep",
        seed=options.seed,
        rows=options.rows or tuple(ROWS),
        wanted_processes=options.processes,
        on_progress=lambda done, _: found.bar.update(task, completed=done),
    )


def _compared(log: EventLog, found: Sequence[tuple[Report, Outcome]], options: Options) -> Report:
    """The first report, with the paired differences of every row from the second."""
    (first, left), (second, right) = found
    # Where the lists' lengths differ, other events are repeats: those that count for both remain.
    both = left.kept & right.kept
    users = log.users[left.scored.events[both]].astype(np.int64)
    hits = {
        f"{one.name}: {row}": of_ranks(outcome.rows[row].ranks[both])["hr_10"]
        for one, outcome in found
        for row in left.rows
    }
    wanted = [(f"{first.name}: {row}", f"{second.name}: {row}", "") for row in left.rows]
    more = differences(
        Bootstrap(users, seed=options.seed), hits, wanted, {"": np.ones(len(users), bool)}
    )
    return msgspec.structs.replace(first, differences=[*first.differences, *more])


def write_json(path: Path, value: object) -> None:
    """Write a result to a new file."""
    raw = msgspec.json.format(msgspec.json.encode(value), indent=1)
    disk.write_atomically(path, raw, mode=0o644)


@contextmanager
def _removed_on_sigterm() -> Iterator[None]:
    """Have SIGTERM end the command as an error does: the files of the log are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # the signal is not ours
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )
