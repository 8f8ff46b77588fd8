"""The set-up: what it says where something is missing, and what it does again after an
interruption.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bootstrap.py as if it lay in an empty folder with a lock of its own."""
    spec = importlib.util.spec_from_file_location("bootstrap_under_test", ROOT / "bootstrap.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    places = {
        "ROOT": tmp_path,
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "UV": venv / "bin" / "uv",
        "STAMP": venv / "eddyline.stamp",
        "LOCK": tmp_path / "requirements.lock",
        "CDC_LOCK": tmp_path / "requirements-cdc.lock",
        "BUILD_LOCK": tmp_path / "requirements-build.lock",
    }
    for name, place in places.items():
        monkeypatch.setattr(module, name, place)
    (tmp_path / "requirements.lock").write_text(
        "torch==1 \\\n    --hash=sha256:00\n", encoding="utf-8"
    )
    (tmp_path / "pyproject.toml").write_text("[project]\n", encoding="utf-8")
    (tmp_path / "requirements-build.lock").write_text(
        "pip==1 \\\n    --hash=sha256:01\nuv==2 \\\n    --hash=sha256:02\n", encoding="utf-8"
    )
    monkeypatch.delenv("TORCH_BACKEND", raising=False)
    return module


@pytest.fixture
def steps(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps of a set-up, each only noted; the first makes the folder."""
    done: list[str] = []

    def note(name: str) -> None:
        def step(*_: object) -> None:
            if name == "_environment":
                bootstrap.PYTHON.parent.mkdir(parents=True, exist_ok=True)
                bootstrap.PYTHON.touch()
            done.append(name)

        monkeypatch.setattr(bootstrap, name, step)

    for name in ("_environment", "_installer", "_compiler", "_packages", "_project", "_jars"):
        note(name)
    return done


def test_a_second_set_up_does_nothing_until_something_changes(
    bootstrap: ModuleType, steps: list[str]
) -> None:
    bootstrap.set_up()
    assert steps == ["_environment", "_installer", "_compiler", "_packages", "_project", "_jars"]
    steps.clear()
    bootstrap.set_up()
    assert steps == []
    for changed in ("requirements.lock", "requirements-build.lock", "pyproject.toml"):
        with (bootstrap.ROOT / changed).open("a", encoding="utf-8") as file:
            file.write("# changed\n")
        bootstrap.set_up()
        assert len(steps) == 6
        steps.clear()
    bootstrap.PYTHON.unlink()  # the Python it links to was removed
    bootstrap.set_up()
    assert len(steps) == 6


def test_an_interrupted_set_up_leaves_no_stamp(
    bootstrap: ModuleType, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap.set_up()
    (bootstrap.ROOT / "requirements.lock").write_text("other", encoding="utf-8")

    def interrupted(_backend: str) -> None:
        raise KeyboardInterrupt

    before = bootstrap._packages
    monkeypatch.setattr(bootstrap, "_packages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bootstrap.set_up()
    assert not bootstrap.STAMP.exists()
    monkeypatch.setattr(bootstrap, "_packages", before)
    steps.clear()
    bootstrap.set_up()
    assert len(steps) == 6


def test_the_build_of_torch_is_kept(
    bootstrap: ModuleType, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap.set_up()
    steps.clear()
    monkeypatch.setenv("TORCH_BACKEND", "cpu")
    bootstrap.set_up()
    (bootstrap.VENV / "eddyline.torch").write_text("cpu", encoding="utf-8")  # as _packages does
    assert len(steps) == 6
    steps.clear()
    monkeypatch.delenv("TORCH_BACKEND")
    bootstrap.set_up()
    assert steps == []
    monkeypatch.setenv("TORCH_BACKEND", "tpu")
    with pytest.raises(bootstrap.StepError, match=r"'tpu'(?s:.)*cpu or default"):
        bootstrap.set_up()


def test_the_lock_without_cuda_keeps_everything_else(bootstrap: ModuleType) -> None:
    locked = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    kept, torch = bootstrap.without_cuda(locked)
    assert re.fullmatch(r"torch==[0-9.]+", torch)

    def names(text: str) -> set[str]:
        return set(re.findall(r"^([a-z0-9._-]+)==", text, re.MULTILINE))

    dropped = names(locked) - names(kept)
    assert {"torch", "triton"} < dropped
    assert all(name.startswith(("torch", "triton", "nvidia-", "cuda-")) for name in dropped)
    assert kept.count("--hash") == locked.count("--hash") - sum(
        block.count("--hash")
        for block in re.split(r"\n(?=\S)", locked)
        if bootstrap.CUDA.match(block)
    )


def test_whatever_is_fetched_is_compared_with_a_hash(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for torch without CUDA, which comes from another index, and the fuzzer."""
    commands: list[list[str]] = []
    monkeypatch.setattr(
        bootstrap, "_run", lambda step, command, *_: commands.append([str(c) for c in command])
    )
    bootstrap.VENV.mkdir()
    bootstrap._installer()
    bootstrap._packages("default")
    bootstrap._project()
    pip, sync, project = commands
    wanted = Path(pip[pip.index("--requirement") + 1]).read_text(encoding="utf-8")
    assert "--require-hashes" in pip and wanted == "uv==2 \\\n    --hash=sha256:02\n"
    assert "--require-hashes" in sync
    for command in (sync, project):
        assert command[command.index("--build-constraints") + 1] == "requirements-build.lock"
    with pytest.raises(ValueError, match="make lock"):
        bootstrap.locked_only("pip==1\n", "uv")


def test_the_locked_uv_is_the_one_that_is_installed(bootstrap: ModuleType) -> None:
    locked = (ROOT / "requirements-build.lock").read_text(encoding="utf-8")
    assert bootstrap.locked_only(locked, "uv").startswith(f"uv=={bootstrap.UV_VERSION} ")


def test_a_failed_step_says_which_why_and_what_to_do(
    bootstrap: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    tool = [
        sys.executable,
        "-c",
        "import sys; print('a' * 9000); print('no space left'); sys.exit(28)",
    ]
    with pytest.raises(bootstrap.StepError) as caught:
        bootstrap._run("copying", tool, "free some space")
    said = str(caught.value)
    assert "Set-up failed at: copying" in said
    assert "exit code 28" in said and "no space left" in said
    assert "What to do: free some space" in said
    assert "no space left" in capfd.readouterr().out
    with pytest.raises(bootstrap.StepError, match="No such file"):
        bootstrap._run("looking", ["/nothing/here"], "install it")


def test_a_missing_compiler_is_one_sentence(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(bootstrap.ROOT))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(bootstrap.StepError, match=r"apt install g\+\+"):
        bootstrap._compiler()
    compiler = bootstrap.ROOT / "clang++"
    compiler.touch()
    compiler.chmod(0o755)
    monkeypatch.setattr(bootstrap.sysconfig, "get_path", lambda _name: str(bootstrap.ROOT))
    with pytest.raises(bootstrap.StepError, match=r"Python\.h"):
        bootstrap._compiler()
    (bootstrap.ROOT / "Python.h").touch()
    bootstrap._compiler()


def test_an_old_python_is_told(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match=r"3\.11 or newer; .* is 3\.9\.18"):
        bootstrap.main(["setup"])


@pytest.mark.parametrize("arguments", [["dmeo"], ["bench"], ["bench", "../setup"]])
def test_a_wrong_command_sets_nothing_up(
    bootstrap: ModuleType, steps: list[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit):
        bootstrap.main(arguments)
    assert steps == []


def test_every_target_of_the_makefile_is_a_command(bootstrap: ModuleType) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = set(re.findall(r"\$\(BOOTSTRAP\) ([a-z]+)", makefile))
    assert {
        "setup",
        "demo",
        "test",
        "cdc",
        "chaos",
        "containers",
        "mutations",
        "soak",
        "fuzz",
        "up",
        "down",
        "lint",
        "bench",
    } == commands
    assert bootstrap.__doc__ is not None
    assert all(re.search(rf"\b{command}\b", bootstrap.__doc__) for command in commands)


@pytest.mark.parametrize(
    ("arguments", "cdc", "installs"),
    [
        (["cdc", "--rounds", "5"], "", True),
        (["demo"], "1", True),
        (["demo", "--cdc"], "", True),
        (["demo"], "", False),
        (["up"], "1", False),
    ],
)
def test_postgresql_is_installed_for_the_commands_that_need_it(
    bootstrap: ModuleType,
    steps: list[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    cdc: str,
    installs: bool,
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setenv("CDC", cdc)
    monkeypatch.setattr(bootstrap, "_uv", lambda _step, command, _what: ran.append(command))
    monkeypatch.setattr(bootstrap, "_become", lambda *command: ran.append(list(command)))
    bootstrap.main(arguments)
    assert len(ran) == 1 + installs
    if installs:
        assert ran[0][:2] == ["pip", "install"] and "--require-hashes" in ran[0]
        assert ran[0][-1] == str(bootstrap.CDC_LOCK)


@pytest.mark.parametrize(
    ("arguments", "parallel"),
    [
        ([], True),
        (["-x", "--maxfail=2"], True),
        (["tests/unit", "-q"], True),
        (["tests/unit/test_compose.py"], False),
        (["tests/unit/test_compose.py::test_one", "-x"], False),
        (["tests/unit", "-k", "compose"], False),
        (["-n", "4"], False),
        (["--pdb"], False),
    ],
)
def test_three_processes_unless_a_test_is_named(
    bootstrap: ModuleType, arguments: list[str], parallel: bool
) -> None:
    (bootstrap.ROOT / "tests" / "unit").mkdir(parents=True)
    (bootstrap.ROOT / "tests" / "unit" / "test_compose.py").touch()
    assert bool(bootstrap._test_workers(arguments)) == parallel


def test_compiled_modules_are_kept_in_the_cache_where_the_environment_forbids_them(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    bootstrap._keep_bytecode()
    assert "PYTHONPYCACHEPREFIX" not in os.environ
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    bootstrap._keep_bytecode()
    assert "PYTHONDONTWRITEBYTECODE" not in os.environ
    assert os.environ["PYTHONPYCACHEPREFIX"] == str(bootstrap.ROOT / ".cache" / "bytecode")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX")


def test_the_help_needs_no_set_up() -> None:
    said = subprocess.run(
        [sys.executable, ROOT / "bootstrap.py", "--help"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert said.returncode == 0
    assert "TORCH_BACKEND=cpu" in said.stdout
