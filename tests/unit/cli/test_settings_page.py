"""`eddyline settings`: the page of all settings, as the command prints it and as docs/ has it."""

from pathlib import Path
from typing import get_type_hints

import pytest

from cli.commands import settings as commands_settings
from eddyline.settings.loader import Settings, describe

DOCS = Path(__file__).parents[3] / "docs"


def test_the_page_is_what_the_generator_makes() -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert page == commands_settings.markdown(), (
        "run: eddyline settings --markdown > docs/configuration.md"
    )


def test_the_page_has_every_setting_with_its_default_and_limits() -> None:
    rows = [line for line in commands_settings.markdown().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(get_type_hints(Settings))
    for row, (name, kind, default, about) in zip(rows, describe(), strict=True):
        assert about in row and kind.split(",")[0].split(" |")[0] in row, name
        assert str(default) in row, name


def test_the_command_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    commands_settings.show(Settings(), markdown=True)
    assert capsys.readouterr().out == commands_settings.markdown()
