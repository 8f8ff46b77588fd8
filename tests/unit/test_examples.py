"""The examples of the property tests are the same in every process, whatever ran there before."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import PROFILE


def drawn() -> list[int]:
    """The examples of one property test, in order."""
    found: list[int] = []

    @settings(max_examples=200, derandomize=True, database=None)
    @given(st.integers())
    def draw(number: int) -> None:
        found.append(number)

    draw()
    return found


@pytest.mark.skipif(PROFILE == "explore", reason="that profile draws other examples each time")
def test_a_module_that_is_loaded_meanwhile_changes_no_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = drawn()
    path = tmp_path / "numbers_of_ours.py"
    path.write_text(f"NUMBERS = {[10**9 + 7 * n for n in range(500)]}\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, path.stem, module)
    assert drawn() == before
