"""docker-compose.yml and the Dockerfile against the compose schema, the settings and the code.

No engine is asked here; what has been run with one is in docs/deployment.md.
"""

import json
import re
import shutil
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from eddyline.settings.loader import NOT_SETTINGS, load
from evaluation.judge import __main__ as judge
from evaluation.judge import checkpoint, report
from serving.__main__ import GRACE_S, STOP_S_MAX
from serving.recall import popularity
from serving.worker import prefork, replica, snapshots

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SCHEMA = json.loads((ROOT / "tests" / "data" / "compose-spec.json").read_text(encoding="utf-8"))
OURS = ("ingest", "worker", "archive", "trainer", "judge")
# What each image holds besides the kernel and the engines' room that all of them need.
ROOMS = {
    "ingest": {"streams"},
    "archive": {"streams", "cli"},
    "worker": {"index", "serving"},
    "trainer": set[str](),
    "judge": {"evaluation", "index", "serving", "streams"},
}


def stages() -> dict[str, tuple[str, list[str]]]:
    """The Dockerfile's stages by name: (the stage or image it starts from, its instructions)."""
    found: dict[str, tuple[str, list[str]]] = {}
    lines: list[str] = []
    for line in re.sub(r"\\\n", " ", DOCKERFILE).splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            lines = []
            found[match[2]] = (match[1], lines)
        elif line and not line.startswith("#"):
            lines.append(line)
    return found


def lineage(target: str) -> list[str]:
    """The instructions of a stage after those of the stages it starts from."""
    start, lines = stages()[target]
    return [*(lineage(start) if start in stages() else []), *lines]


def errors(compose: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft201909Validator(SCHEMA)
    return [
        f"{'.'.join(map(str, error.path))}: {error.message}"
        for error in validator.iter_errors(compose)
    ]


def test_the_file_fits_the_compose_schema() -> None:
    assert errors(COMPOSE) == []


@pytest.mark.parametrize(
    ("service", "change"),
    [
        ("kafka", {"imagee": "x"}),
        ("worker", {"healthcheck": {"tests": []}}),
        ("ingest", {"depends_on": {"kafka": {}}}),
        ("worker", {"ports": "50051"}),
        ("valkey", {"restart": 5}),
    ],
)
def test_the_schema_finds_mistakes(service: str, change: dict[str, Any]) -> None:
    broken = json.loads(json.dumps(COMPOSE))
    broken["services"][service].update(change)
    assert errors(broken) != []


def test_docker_compose_itself_takes_the_file() -> None:
    docker = shutil.which("docker")
    known = (
        docker
        and subprocess.run(
            [docker, "compose", "version"], capture_output=True, timeout=30
        ).returncode
        == 0
    )
    if not docker or not known:
        pytest.skip("docker compose is not installed")
    command = [docker, "compose", "--file", str(ROOT / "docker-compose.yml"), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_services() -> None:
    assert list(SERVICES) == ["kafka", "valkey", *OURS]


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_and_its_value_is_taken(name: str, tmp_path: Path) -> None:
    environment = SERVICES[name]["environment"]
    assert all(key.startswith("EDDYLINE_") for key in environment), (
        "other variables steer nothing of ours"
    )
    assert not NOT_SETTINGS & set(environment)
    assert all(isinstance(value, str) for value in environment.values()), (
        "compose turns others into text"
    )
    settings = load(environment, folder=tmp_path)
    assert settings.kafka_bootstrap_servers and settings.redis_url
    inside = [line for line in lineage(name) if line.startswith("ENV")]
    set_there = dict(re.findall(r"(EDDYLINE_\w+)=(\S+)", " ".join(inside)))
    assert load(set_there, folder=tmp_path).data_dir == settings.data_dir


@pytest.mark.parametrize("name", OURS)
def test_the_addresses_are_those_of_the_other_services(name: str) -> None:
    environment = SERVICES[name]["environment"]
    kafka = SERVICES["kafka"]["environment"]
    assert (
        f"://{environment['EDDYLINE_KAFKA_BOOTSTRAP_SERVERS']}"
        in kafka["KAFKA_ADVERTISED_LISTENERS"]
    )
    assert environment["EDDYLINE_REDIS_URL"].startswith("redis://valkey:6379/")


@pytest.mark.parametrize("name", OURS)
def test_every_build_target_is_a_stage_of_its_extra(name: str) -> None:
    build = SERVICES[name]["build"]
    assert build["context"] == "." and build["target"] == name
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert name in extras
    assert f"COPY --from=build-{name} /opt/venv /opt/venv" in stages()[name][1]
    install = " ".join(stages()[f"build-{name}"][1])
    assert f"--require-hashes --constraint requirements.lock --requirement {name}.txt" in install


def test_images_fetch_nothing_without_a_hash_but_torch_of_another_index() -> None:
    assert {"!requirements.lock", "!requirements-build.lock"} <= set(
        (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    )
    assert "PIP_ONLY_BINARY=:all:" in " ".join(stages()["build"][1])
    found = []
    for name, (_, lines) in stages().items():
        for command in re.split(r"&&|;|\bfi\b", " ".join(lines)):
            if not re.search(r"\bpip (install|wheel|download)\b", command):
                continue
            if "--require-hashes" in command or "--no-index" in command:
                continue
            found.append((name, "--index-url" in command))
    assert found == [("build-trainer", True)]
    wheel = next(line for line in stages()["build-worker"][1] if "pip wheel" in line)
    assert "--no-build-isolation" in wheel and "--no-binary hnswlib" in wheel


@pytest.mark.parametrize("name", OURS)
def test_an_image_holds_the_rooms_that_its_process_may_import(name: str) -> None:
    copied = {line.split()[1] for line in lineage(name) if re.match(r"COPY (?!--from)", line)}
    assert copied == {"cli", "eddyline", "embeddings"} | ROOMS[name]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert all(f"!{path}" in ignored and (ROOT / path).is_dir() for path in copied)


@pytest.mark.parametrize("name", OURS)
def test_every_command_is_a_module_of_ours(name: str) -> None:
    command = SERVICES[name]["command"]
    assert command == json.loads(
        next(line[4:] for line in lineage(name)[::-1] if line.startswith("CMD "))
    )
    python, flag, module = command
    assert (python, flag) == ("python", "-m")
    assert find_spec(f"{module}.__main__"), f"{module} cannot be run"


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_a_health_check_with_limits(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert {"test", "interval", "timeout", "retries", "start_period"} <= set(check)
    test = check["test"]
    assert test[0] in ("CMD", "CMD-SHELL")
    if test[1:3] == ["python", "-c"]:
        compile(test[3], "healthcheck", "exec")
        assert f"127.0.0.1:{SERVICES[name]['environment']['EDDYLINE_WORKER_PORT']}" in test[3]
    elif test[1:3] == ["python", "-m"]:
        assert find_spec(test[3]) and test[4:] == [name]


@pytest.mark.parametrize("name", OURS)
def test_the_servers_are_healthy_before_a_process_starts(name: str) -> None:
    expected = {"condition": "service_healthy"}
    assert SERVICES[name]["depends_on"] == {"kafka": expected, "valkey": expected}


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_runs_as_root_or_listens_beyond_the_loopback(name: str) -> None:
    service = SERVICES[name]
    if name in OURS:
        users = [line.split()[1] for line in lineage(name) if line.startswith("USER ")]
        assert users == ["eddyline"]
    else:
        assert int(service["user"].split(":")[0]) > 0
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert service["networks"] == ["eddyline"] and "privileged" not in service


def test_compilers_stay_in_the_build_stages() -> None:
    for name in OURS:
        assert not re.search(r"apt-get|g\+\+|pip install", " ".join(lineage(name)))
    build = " ".join(stages()["build"][1])
    assert "g++" in build and "HNSWLIB_NO_NATIVE=1" in build


def test_state_is_in_volumes_and_bundles_are_shared() -> None:
    mounts = {name: service.get("volumes", []) for name, service in SERVICES.items()}
    bundles = {SERVICES[name]["environment"]["EDDYLINE_BUNDLE_DIR"] for name in OURS}
    assert len(bundles) == 1
    folder = bundles.pop()
    bundles_at = folder
    assert mounts["trainer"][0] == f"generations:{folder}"
    assert mounts["ingest"] == [f"generations:{folder}:ro"]
    kept = load(SERVICES["worker"]["environment"]).snapshots
    assert mounts["worker"] == [f"snapshots:{kept}", f"generations:{folder}:ro"]
    assert any(str(kept) in line and "-o eddyline" in line for line in lineage("worker"))
    assert any(folder in line and "-o eddyline" in line for line in lineage("trainer"))
    kafka = SERVICES["kafka"]["environment"]["KAFKA_LOG_DIRS"]
    assert mounts["kafka"] == [f"kafka:{kafka}"] and mounts["valkey"] == ["valkey:/data"]
    folder = SERVICES["archive"]["environment"]["EDDYLINE_ARCHIVE_URL"]
    assert mounts["archive"] == [f"archive:{folder}", f"generations:{bundles_at}:ro"]
    assert mounts["trainer"][1:] == [f"archive:{folder}:ro"]
    assert SERVICES["trainer"]["environment"]["EDDYLINE_ARCHIVE_URL"] == folder
    assert SERVICES["trainer"]["environment"]["EDDYLINE_TRAIN_FROM"] == "archive"
    assert any(folder in line and "-o eddyline" in line for line in lineage("archive"))
    settings = load(SERVICES["judge"]["environment"])
    kept = checkpoint.path_of(settings).parent
    assert report.path_of(settings).parent == kept
    assert mounts["judge"] == [f"judge:{kept}", f"generations:{bundles_at}:ro"]
    assert any(str(kept) in line and "-o eddyline" in line for line in lineage("judge"))
    volumes = {"kafka", "valkey", "generations", "archive", "snapshots", "judge"}
    assert set(COMPOSE["volumes"]) == volumes


def test_valkey_keeps_what_it_was_told_and_drops_no_key() -> None:
    command = SERVICES["valkey"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--maxmemory-policy"] == "noeviction" and options["--appendonly"] == "yes"


def test_kafka_makes_no_topic_by_itself() -> None:
    environment = SERVICES["kafka"]["environment"]
    assert environment["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"
    assert all(isinstance(value, str) for value in environment.values())


def test_the_judge_runs_where_it_is_wanted_and_has_the_time_to_write_its_state() -> None:
    assert SERVICES["judge"]["profiles"] == ["judge"]
    assert not any("profiles" in SERVICES[name] for name in SERVICES if name != "judge")
    grace_s = float(SERVICES["judge"]["stop_grace_period"].removesuffix("s"))
    assert grace_s >= judge.STOP_S_MAX + 10


def test_a_worker_has_the_time_to_stop_and_to_write_its_last_snapshot() -> None:
    grace_s = float(SERVICES["worker"]["stop_grace_period"].removesuffix("s"))
    one = GRACE_S + replica.CLOSE_S + snapshots.CLOSE_S + popularity.CLOSE_S
    assert grace_s >= STOP_S_MAX + 10 >= prefork.END_S + 10 and STOP_S_MAX >= one
