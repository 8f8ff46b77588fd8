"""Reports of benchmarks: a table, `.eddyline/bench/NAME.json`, exit code 1 if a row fails."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LIBRARIES = (
    "numpy",
    "hnswlib",
    "faust-streaming",
    "aiokafka",
    "kafka-python",
    "redis",
    "grpcio",
    "torch",
)


def row(
    measure: str, value: float, unit: str, must_be: str = "", holds: bool = True
) -> dict[str, Any]:
    """One measured figure. must_be: the bound in words, "" if there is none."""
    return {
        "measure": measure,
        "value": round(value, 3),
        "unit": unit,
        "must_be": must_be,
        "holds": holds,
    }


def report(name: str, rows: list[dict[str, Any]], folder: Path, **more: Any) -> int:
    """Print and store the rows; the exit code."""
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release().split('-')[0]}"
    )
    versions = {"python": platform.python_version(), **{lib: version(lib) for lib in LIBRARIES}}
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine,
        "load": os.getloadavg(),
        "versions": versions,
        **more,
        "rows": rows,
    }
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = Table("measure", "value", "must be", "holds", title=f"{name} · {machine}")
    for one in rows:
        holds = ("yes" if one["holds"] else "NO") if one["must_be"] else ""
        table.add_row(one["measure"], f"{one['value']:,} {one['unit']}", one["must_be"], holds)
    Console().print(table)
    return 0 if all(one["holds"] for one in rows) else 1
