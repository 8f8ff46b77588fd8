"""`eddyline items <verb>`: the commands on items and their options."""

from __future__ import annotations

from typing import Annotated

import typer

from eddyline.settings.loader import load

items_app = typer.Typer(no_args_is_help=True, help="Items: those with a refused newer record.")


@items_app.callback()
def items() -> None:
    """A group also with one command."""


@items_app.command("refused")
def items_refused(
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="Items at most.")] = 1_000,
) -> None:
    """Show the items whose last record was refused, why, and what is shown instead."""
    from cli.commands import items as commands_items
    from eddyline.process.discovery import resolve

    commands_items.refused(resolve(load()), limit=limit)
