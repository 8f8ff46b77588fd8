"""The console that commands print to, their progress bar, and how they show an event."""

from __future__ import annotations

import json

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

console = Console(highlight=False, markup=False, soft_wrap=True)


def progress_bar(on: Console) -> Progress:
    """A bar with counts and time; silent where there is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=on,
    )


def event_text(event: msgspec.Struct) -> str:
    """An event as JSON, without the fields that have no value."""
    fields = msgspec.to_builtins(event)
    found = {name: value for name, value in fields.items() if value not in (None, [], {}, "")}
    return json.dumps(found, ensure_ascii=False)


def shortened(text: str, chars_max: int) -> str:
    """The text, cut to `chars_max` characters with a mark at its end."""
    return text if len(text) <= chars_max else text[: chars_max - 1] + "…"
