"""`eddyline generations`."""

from __future__ import annotations

import time

from rich.table import Table

from cli.console import console
from eddyline import generations
from eddyline.generations import Generations
from eddyline.settings.loader import Settings
from embeddings.bundle import removal


def show_list(settings: Settings) -> None:
    """Print all generations with their state, the newest first."""
    found = generations.read(settings)
    table = Table("generation", "trained", "state", show_edge=False, pad_edge=False)
    for name in dict.fromkeys([*reversed(found.manifests), *reversed(found.ended)]):
        manifest = found.manifests.get(name)
        trained = "" if manifest is None else generations.utc(manifest.created_ms)
        table.add_row(name, trained, _state(found, name))
    console.print(table)


def _state(found: Generations, name: str) -> str:
    if name == found.active:
        return "active"
    if name not in found.ended:
        return "kept"
    end = found.ended[name]
    if name not in found.manifests:
        return f"ended {generations.utc(end.ended_ms)}, removed"
    return f"ended {generations.utc(end.ended_ms)}, removed from {generations.utc(end.remove_ms)}"


def activate(settings: Settings, name: str) -> None:
    """Activate a published generation."""
    generations.activate(settings, name)
    console.print(f"generation {name} is active; restart ingest and workers, which then load it")


def end(settings: Settings) -> None:
    """End outdated generations; remove those whose time is over."""
    for name in generations.end_outdated(settings):
        leave = generations.read(settings).ended[name].leave_ms
        console.print(f"generation {name} has ended; it may be used until {generations.utc(leave)}")
    for name in removal.remove_ended(settings):
        console.print(f"generation {name} is removed: item vectors, bundle, records")
    found = generations.read(settings)
    waiting = [
        name
        for name in found.ended
        if name in found.manifests and found.ended[name].remove_ms > time.time() * 1_000
    ]
    console.print(f"{len(waiting)} ended generations wait for their removal")
