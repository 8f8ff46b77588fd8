"""Progress on the terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from sandbox.datasets.dataset import OnProgress


class Steps:
    """Progress on the terminal: a bar for steps over a second, and the time of every step."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.took_s: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[OnProgress]:
        """Time a step and show its progress."""
        started = time.monotonic()
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        hidden = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as progress:
            task = progress.add_task(name, total=None)

            def on_progress(what: str, done: int, total: int) -> None:
                progress.update(task, description=what, completed=done, total=total or None)

            yield on_progress
        self.took_s[name] = time.monotonic() - started
        if self.took_s[name] >= 1:
            self.console.print(f"  [dim]{name}: {self.took_s[name]:.1f} s[/]")
