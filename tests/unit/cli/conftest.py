"""Commands print on lines that are long enough, whatever the terminal of the tests is."""

import pytest

from cli.commands import import_files
from cli.console import console


@pytest.fixture(autouse=True)
def long_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (console, import_files.console):
        monkeypatch.setattr(one, "width", 400)
