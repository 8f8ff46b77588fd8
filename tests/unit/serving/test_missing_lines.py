"""docs/operations.md explains each line of `missing` and of `after.why`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = " ".join((ROOT / "docs" / "operations.md").read_text(encoding="utf-8").split())
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "serving").rglob("*.py"))
# As they are in the source and on the page.
STEMS = [
    "the user's state cannot be used",
    "the popular list is",
    "there is no popular list",
    "no cards: ",
    "no co-visits: ",
    "cards cannot be read, such as",
    "items stand as they were then",
    "ingest has not published",
    "it is unknown which items ingest has still to publish",
    "was made anew or deleted",
    "cards are left out, or the answer would exceed",
    "waits for ",
    "recall path ",
    "was not called: ",
    "the blender was learned for other recall paths",
    "the blender's weights",
    "is applied up to offset",
    "of clicks ends before offset",
    "the state was written for another log of clicks",
    "the fence cannot be read",
    "the user could not be read",
    "the worker stops",
]


@pytest.mark.parametrize("stem", STEMS)
def test_a_line_is_in_the_source_and_on_the_page(stem: str) -> None:
    assert stem in SOURCE and stem.strip() in PAGE


def test_every_line_that_names_a_server_is_known() -> None:
    """`redis: `, `kafka: ` and `worker: ` begin a line; what follows is a stem or a reason."""
    found = set(re.findall(r'f"(?:redis|kafka|worker): ([^"]*)"', SOURCE))
    reasons = {"{behind}", "{remade}", "{missing}", "{users}", "{error}", "{which}"}
    reasons |= {"recall path {path.name} {why}", "{why}"}
    known = {text for text in found if any(stem.strip() in text for stem in STEMS)}
    assert found - known - reasons <= {"{left_out} cards are left out, or the answer would exceed "}
