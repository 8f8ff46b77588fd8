"""`eddyline settings`: the settings of this process, or the page docs/configuration.md."""

from __future__ import annotations

import textwrap

from rich.console import Console
from rich.table import Table

from eddyline.settings.loader import ALIASES, PREFIX, SECRETS, Settings, describe

_TOP = f"""# Configuration

Every setting has a default. A later source wins over an earlier one:

1. the default in the table below;
2. a TOML file: `eddyline.toml` in the working directory, or the one that `EDDYLINE_CONFIG` names;
3. the environment: {", ".join(f"`{name}`" for name in ALIASES)};
4. the environment: `{PREFIX}` and the setting's name in capitals, `k_max` is `{PREFIX}K_MAX`.

A key that is not in the table, or a bad value, stops the process at its start with a sentence that
names the key, the value and the source. Never shown or logged are the secret ones:
{textwrap.fill(", ".join(f"`{name}`" for name in sorted(SECRETS)) + ".", 100)}
`eddyline settings` prints the values in force. A duration is in the unit that ends its name.

This page is generated: `eddyline settings --markdown > docs/configuration.md`.

| setting | values | default | what it does |
|---|---|---|---|
"""


def markdown() -> str:
    """The text of docs/configuration.md."""
    rows = (
        f"| `{name}` | {kind.replace('|', chr(92) + '|')} | {_shown(default)} | {about} |\n"
        for name, kind, default, about in describe()
    )
    return _TOP + "".join(rows)


def show(settings: Settings, *, markdown: bool = False) -> None:
    """Print the page, or a table of the values in force."""
    if markdown:
        Console(markup=False, highlight=False, soft_wrap=True).out(_page(), end="")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("setting", "value", "default"):
        table.add_column(column, overflow="fold")
    in_force = dict(settings.__rich_repr__())
    for name, _, default, _ in describe():
        value = in_force[name]
        table.add_row(name, str(value), "" if value == default else str(default))
    Console(highlight=False, markup=False).print(table)


_page = markdown  # the parameter of `show` hides the name


def _shown(default: object) -> str:
    return f"`{default}`" if default != "" else "empty"
