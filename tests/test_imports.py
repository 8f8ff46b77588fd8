"""The rooms as a graph of files: no circle, and no import runs up.

Imports under TYPE_CHECKING and inside functions count as well.
"""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A room may import itself and the rooms of the levels below it.
LEVELS = (
    ("eddyline",),
    ("embeddings", "index", "sandbox"),
    ("streams", "serving"),
    ("evaluation",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Written and generated modules of the rooms, by dotted name."""
    return {module_of(path): path for room in LEVEL for path in (ROOT / room).rglob("*.py")}


def imported_names(module: str, tree: ast.AST) -> set[str]:
    """Every dotted name that the module imports, at any depth of its code."""
    package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            origin = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


@cache
def graph() -> dict[str, set[str]]:
    """Module -> the modules of the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for module, path in modules().items():
        names = imported_names(module, ast.parse(path.read_text(encoding="utf-8")))
        targets = {n if n in modules() else n.rpartition(".")[0] for n in names}
        found[module] = targets & modules().keys()
    return found


def test_no_circle_between_files() -> None:
    try:
        tuple(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        raise AssertionError(" imported by ".join(error.args[1])) from None


def test_no_import_runs_up() -> None:
    def room(module: str) -> str:
        return module.partition(".")[0]

    wrong = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in targets
        if room(module) != room(target) and LEVEL[room(target)] >= LEVEL[room(module)]
    ]
    assert wrong == []


def test_the_graph_sees_late_and_type_checking_imports() -> None:
    code = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from index import port\n"
        "def late():\n    import streams.app\n    from . import clicks\n"
    )
    names = imported_names("streams.users", ast.parse(code))
    assert names == {"typing.TYPE_CHECKING", "index.port", "streams.app", "streams.clicks"}
