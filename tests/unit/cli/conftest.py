"""Commands print on lines that are long enough, whatever the terminal of the tests is."""

import pytest

from cli.console import console


@pytest.fixture(autouse=True)
def long_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 400)
