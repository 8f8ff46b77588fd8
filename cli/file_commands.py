"""The options of the commands that read and write files; `cli.main` adds them."""

# Imports inside the functions: every command starts fast and loads only what it needs.

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eddyline.settings.loader import load


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
