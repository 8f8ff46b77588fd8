"""`eddyline map <verb>`: the commands on maps and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eddyline.settings.loader import load

map_app = typer.Typer(
    no_args_is_help=True, help="Maps of topics in other formats: check one, guess one."
)


@map_app.command("check")
def map_check(
    source: Annotated[str, typer.Argument(help="A file of JSON lines; or clicks, items or users.")],
    topic: Annotated[
        str, typer.Option(help="What a file is for; by default guessed from its records.")
    ] = "",
    map_name: Annotated[
        str, typer.Option("--map", help="A map's file or a preset; default: of the settings.")
    ] = "",
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="Records at most.")] = 1_000,
) -> None:
    """Show records before and after a map, and each refusal with what would cure it."""
    from cli.commands import maps
    from eddyline.process.discovery import resolve

    of_kafka = source in ("clicks", "items", "users") and not Path(source).exists()
    settings = resolve(load()) if of_kafka else load()
    maps.check(settings, source, topic=topic, map_name=map_name, limit=limit)


@map_app.command("guess")
def map_guess(
    source: Annotated[str, typer.Argument(help="A file of JSON lines.")],
    topic: Annotated[
        str, typer.Option(help="clicks, items or users; by default guessed from the records.")
    ] = "",
    out: Annotated[str, typer.Option(help="Write the map to this new file.")] = "",
) -> None:
    """Guess a map from a sample of records."""
    from cli.commands import maps

    maps.guess(source, topic=topic, out=out)
