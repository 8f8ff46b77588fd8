"""The linters, each as a test of its own, so that one command checks everything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TIMEOUT_S = 240


def clean(*command: str) -> None:
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_ruff() -> None:
    clean("ruff", "check", "--output-format", "concise", ".")


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 20)
def test_mypy() -> None:
    clean("mypy")


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 20)
def test_import_contracts() -> None:
    clean("lint-imports", "--no-cache")
