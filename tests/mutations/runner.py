"""Plants one bug at a time in a copy of the tree and runs the tests that must catch it."""

from __future__ import annotations

import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# Of one run of pytest. A bug that makes the tests hang is not caught: nobody would wait for it.
TIMEOUT_S = 240
# Of the run without a bug, which runs all tests that are named.
SOUND_TIMEOUT_S = 3 * TIMEOUT_S
COPIES = 2
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
_LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")


@dataclass(frozen=True)
class Mutation:
    """A planted bug.

    name:  the wrong behaviour
    file:  relative to the root of the tree
    old:   text that occurs exactly once in the file; new: what replaces it
    tests: ids of pytest (`file::function`), of which one test at least must fail; all of their
           cases run
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """caught: a test failed, and nothing else went wrong; why: what happened otherwise.

    test: the test that failed
    """

    mutation: Mutation
    caught: bool
    seconds: float
    why: str = ""
    test: str = ""


class PatchError(Exception):
    """A mutation does not fit the tree any more."""


def check(root: Path, mutation: Mutation) -> str:
    """The file's text with the bug. Raises PatchError where the patch no longer applies."""
    path = root / mutation.file
    if not path.is_file():
        raise PatchError(f"{mutation.name}: there is no file {mutation.file}")
    text = path.read_text(encoding="utf-8")
    if (found := text.count(mutation.old)) != 1:
        raise PatchError(f"{mutation.name}: the text is {found} times in {mutation.file}")
    if mutation.old == mutation.new:
        raise PatchError(f"{mutation.name}: the patch changes nothing")
    for test in mutation.tests:
        file, _, function = test.partition("::")
        there = (root / file).is_file() and (root / file).read_text(encoding="utf-8")
        if not there or f"def {function}(" not in there:
            raise PatchError(f"{mutation.name}: there is no test {test}")
    return text.replace(mutation.old, mutation.new)


def copy_tree(root: Path, into: Path) -> Path:
    """A copy of the tree without hidden files and caches."""
    shutil.copytree(root, into, ignore=_LEFT_OUT, symlinks=True)
    return into


def run_tests(tree: Path, tests: Sequence[str], timeout_s: float = TIMEOUT_S) -> tuple[int, str]:
    """(pytest's exit code, the end of its output); code -1 after `timeout_s`."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["--show-capture=no", "--tb=short"]
    command += ["--hypothesis-seed=0", *tests]
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "mutations", "PYTHONPATH": str(tree)}
    if environment.pop("PYTHONDONTWRITEBYTECODE", ""):
        # Without compiled modules the imports of a run take three times as long.
        environment.setdefault("PYTHONPYCACHEPREFIX", str(tree.parent / "bytecode"))
    with subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return -1, f"not finished after {timeout_s} s"
    return process.returncode, output[-4_000:]


def judge(tree: Path, mutation: Mutation) -> Verdict:
    """Plant the bug in the tree, run its tests, and take it out again. Raises PatchError."""
    begun, path = time.monotonic(), tree / mutation.file
    sound, planted = path.read_text(encoding="utf-8"), check(tree, mutation)
    _write(path, planted)
    try:
        code, output = run_tests(tree, mutation.tests)
    finally:
        _write(path, sound)
    why = {0: "every test passes", 1: ""}.get(code, f"pytest ended with {code}: {output}")
    failed = _FAILED.search(output)
    test = failed[1] if code == 1 and failed else ""
    return Verdict(mutation, code == 1, time.monotonic() - begun, why, test)


def _write(path: Path, text: str) -> None:
    """Write a file with a time of its own: by time and size Python knows whether it is compiled."""
    before_s = int(path.stat().st_mtime)
    path.write_text(text, encoding="utf-8")
    os.utime(path, (before_s + 1, before_s + 1))


def run(
    root: Path,
    mutations: Sequence[Mutation],
    scratch: Path,
    on_verdict: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Judge all mutations in copies of the tree, in `scratch`.

    Raises PatchError, before any test, if a patch does not apply or if the tests fail without a
    bug.
    """
    for mutation in mutations:
        check(root, mutation)
    trees = [copy_tree(root, scratch / f"tree-{n}") for n in range(min(COPIES, len(mutations)))]
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    with ThreadPoolExecutor(len(trees)) as pool:
        parts = [tests[n :: len(trees)] for n in range(len(trees))]
        given = [(tree, part) for tree, part in zip(trees, parts, strict=True) if part]
        for code, output in pool.map(lambda one: run_tests(*one, SOUND_TIMEOUT_S), given):
            if code:
                raise PatchError(
                    f"the tests do not pass without a bug (pytest ended with {code}): {output}"
                )
    waiting: queue.SimpleQueue[Mutation] = queue.SimpleQueue()
    for mutation in mutations:
        waiting.put(mutation)
    verdicts: list[Verdict] = []

    def work(tree: Path) -> None:
        while True:
            try:
                mutation = waiting.get_nowait()
            except queue.Empty:
                return
            verdicts.append(verdict := judge(tree, mutation))
            on_verdict(verdict)

    threads = [threading.Thread(target=work, args=(tree,)) for tree in trees]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = {mutation.name: number for number, mutation in enumerate(mutations)}
    return sorted(verdicts, key=lambda verdict: order[verdict.mutation.name])
