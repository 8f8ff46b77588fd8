"""`eddyline evaluate --diff`: the first query that two configurations answer differently."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import zip_longest

from cli.commands import evaluate
from cli.commands.evaluate import Input, Options
from cli.console import console
from evaluation import difference
from evaluation.difference import Entry, Queries


def diff(source: Input, options: Options) -> Queries:
    """Read, train, and query both until they differ. Raises EddylineError."""
    with evaluate.prepared(source, options) as found:
        task = found.bar.add_task("queries", total=len(found.log))
        result = difference.find(
            [name for name, _ in found.configurations],
            [one for _, one in found.configurations],
            found.log,
            found.bundle,
            found.log.split(options.split),
            keeps_repeats=options.repeats == "keep",
            on_progress=lambda done, _: found.bar.update(task, completed=done),
        )
    show(result)
    if options.json is not None:
        evaluate.write_json(options.json, result)
    return result


def show(found: Queries) -> None:
    """Print the first query whose answers differ, both answers and the first such position."""
    if found.first_difference is None:
        console.print(
            f"{found.queries:,} queries: {found.left} and {found.right} answer all of them alike"
        )
        return
    one = found.first_difference
    at = datetime.fromtimestamp(one.at_ms / 1000, UTC).isoformat(timespec="milliseconds")
    console.print(
        f"query {one.query:,}, before event {one.event:,} of the sorted log: user {one.user_id} at "
        f"{at} ({one.at_ms}); the answers differ from position {one.first_position} on"
    )
    lines = [["", found.left, found.right]]
    for position, pair in enumerate(zip_longest(one.left, one.right), 1):
        mark = f"{'→' if position == one.first_position else ' '} {position}"
        lines.append([mark, *(_entry(entry) for entry in pair)])
    evaluate.columns(lines)


def _entry(entry: Entry | None) -> str:
    return "–" if entry is None else f"{entry.item_id} ({entry.path} {entry.score:.6g})"
