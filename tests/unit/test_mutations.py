"""The mutation runner names what no test catches, and every planted bug still fits the tree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutations.planted import MUTATIONS
from tests.mutations.runner import Mutation, PatchError, check, run

ROOT = Path(__file__).resolve().parents[2]
TEST = "test_sums.py::test_add"
DOUBLED = Mutation("the sum is doubled", "sums.py", "return a + b", "return 2 * (a + b)", (TEST,))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with one function and one test, which looks at one sum only."""
    root = tmp_path / "tree"
    root.mkdir()
    (root / "sums.py").write_text("def add(a, b):\n    return a + b\n", encoding="utf-8")
    test = "from sums import add\n\n\ndef test_add():\n    assert add(2, 2) == 4\n"
    (root / "test_sums.py").write_text(test, encoding="utf-8")
    return root


def test_every_planted_bug_fits_the_tree() -> None:
    for mutation in MUTATIONS:
        check(ROOT, mutation)
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 20


def test_caught_and_uncaught_bugs_are_told_apart(tree: Path, tmp_path: Path) -> None:
    uncaught = replace(DOUBLED, name="the product is taken", new="return a * b")
    verdicts = run(tree, [DOUBLED, uncaught], tmp_path / "scratch")
    assert [(v.mutation.name, v.caught, v.why) for v in verdicts] == [
        ("the sum is doubled", True, ""),
        ("the product is taken", False, "every test passes"),
    ]
    assert "return a + b" in (tree / "sums.py").read_text(encoding="utf-8"), "only copies change"


def test_a_bug_that_keeps_the_tests_from_running_is_not_caught(tree: Path, tmp_path: Path) -> None:
    broken = replace(DOUBLED, new="return (")
    [verdict] = run(tree, [broken], tmp_path / "scratch")
    assert not verdict.caught and "pytest ended with 4" in verdict.why


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"old": "return a - b"}, "the text is 0 times in sums.py"),
        ({"old": "a"}, "the text is 3 times in sums.py"),
        ({"file": "gone.py"}, "there is no file gone.py"),
        ({"new": "return a + b"}, "the patch changes nothing"),
        ({"tests": ("test_gone.py::test_add",)}, "there is no test test_gone.py::test_add"),
        ({"tests": ("test_sums.py::test_gone",)}, "there is no test test_sums.py::test_gone"),
        ({"tests": ("test_sums.py",)}, "there is no test test_sums.py"),
    ],
)
def test_a_patch_that_does_not_fit_is_an_error(
    tree: Path, tmp_path: Path, changed: dict[str, str], said: str
) -> None:
    with pytest.raises(PatchError, match=said):
        run(tree, [replace(DOUBLED, **changed)], tmp_path / "scratch")  # type: ignore[arg-type]
    assert not (tmp_path / "scratch").exists(), "no test ran"


def test_tests_that_fail_without_a_bug_are_an_error(tree: Path, tmp_path: Path) -> None:
    (tree / "sums.py").write_text("def add(a, b):\n    return a + b  # 5\n", encoding="utf-8")
    test = "from sums import add\n\n\ndef test_add():\n    assert add(2, 2) == 5\n"
    (tree / "test_sums.py").write_text(test, encoding="utf-8")
    with pytest.raises(PatchError, match="do not pass without a bug"):
        run(tree, [DOUBLED], tmp_path / "scratch")
