"""`eddyline rules <verb>`: the commands on editorial rules and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eddyline.settings.loader import load

rules_app = typer.Typer(
    no_args_is_help=True, help="Editorial rules of answers: check a file before workers read it."
)


@rules_app.callback()
def rules() -> None:
    """A group also with one command."""


@rules_app.command("check")
def rules_check(
    file: Annotated[
        Path | None, typer.Argument(help="A TOML file; default: that of the settings.")
    ] = None,
) -> None:
    """Check a file of editorial rules, and show what each rule does now."""
    from cli.commands import rules as commands_rules

    commands_rules.check(load(), file)
