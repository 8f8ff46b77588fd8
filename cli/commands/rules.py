"""`eddyline rules check`: a file of editorial rules as a table, or what is wrong with it."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eddyline.errors import EddylineError, SettingsError
from eddyline.settings.loader import Settings
from serving.rules import editorial
from serving.rules.editorial import Boost, Known, Pin, Rule, RulesRejected

console = Console(highlight=False, markup=False)
# Of a rule's items or values, so many are shown.
SHOWN_MAX = 3


def check(settings: Settings, file: Path | None) -> None:
    """Print the rules of a file and when each holds.

    file: None: that of the settings
    Raises EddylineError if it cannot be used, SettingsError if there is none.
    """
    path = file or Path(settings.rules_file)
    if file is None and not settings.rules_file:
        raise SettingsError("rules_file is not set: name a file")
    try:
        rules = editorial.read(path, Known.of(settings))
    except RulesRejected as error:
        raise EddylineError(f"{path}: {error}") from None
    now_ms = time.time_ns() // 1_000_000
    table = Table("rule", "does", "for", "scene", "holds", show_edge=False, pad_edge=False)
    for kind, rule in rules.rules:
        table.add_row(
            rule.name, _does(kind, rule), _items(rule), rule.scene or "all", _holds(rule, now_ms)
        )
    console.print(table)
    for arm in rules.arms.listed:
        console.print(f"arm {arm.name}: {arm.share:.2%} of the users", soft_wrap=True)
    console.print(f"version {rules.version}: {len(rules.rules)} rules", soft_wrap=True)


def _does(kind: str, rule: Rule) -> str:
    if isinstance(rule, Pin):
        return f"{kind} to {rule.position}"
    return f"{kind} × {rule.factor:g}" if isinstance(rule, Boost) else kind


def _items(rule: Rule) -> str:
    listed = rule.items or rule.values
    shown = ", ".join(listed[:SHOWN_MAX])
    more = f" and {len(listed) - SHOWN_MAX} more" if len(listed) > SHOWN_MAX else ""
    return f"{rule.attribute} = {shown}{more}" if rule.attribute else shown + more


def _holds(rule: Rule, now_ms: int) -> str:
    begins, until = rule.window_ms()
    if now_ms < begins:
        return f"from {rule.begins}"
    if now_ms >= until:
        return f"ended {rule.until}"
    return f"now, until {rule.until}" if rule.until is not None else "now"
