"""`make containers`: build the images, run docker-compose.yml, check what operators rely on.

make containers                                   with docker and `docker compose`
make containers ARGS="--engine podman --compose podman-compose"
make containers ARGS="--no-build"                 with the images that are there

Runs under a project name of its own, on free ports; removes its containers, networks and volumes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from eddyline.schema.events import encode
from sandbox.datasets import synthetic
from sandbox.servers import free_ports

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
TARGETS = ("ingest", "worker", "archive", "trainer", "judge")
LONG_RUNNING = ("ingest", "worker", "archive")
BUILD_S = 3_600
UP_S = 240
TRAIN_S = 600
BACK_S = 120
CALL_S = 120
KAFKA_TIMEOUT_MS = 60_000
SECRET = "s3cret-7f2c9a"
# What a process says when its folder cannot be written, and its exit code.
NOT_WRITABLE, BAD_SETTING = "cannot be written", 2


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result."""

    what: str
    found: str
    good: bool
    seconds: float


class Engine:
    """Commands of docker or podman, and of its compose, for one project."""

    def __init__(self, engine: str, compose: str, project: str, build_args: str) -> None:
        self.engine = shlex.split(engine)
        self._compose = [*shlex.split(compose), "--project-name", project, "--file", str(COMPOSE)]
        self._build_args = shlex.split(build_args)
        self.project = project
        with tempfile.TemporaryDirectory() as folder:
            ports = free_ports.choose_ports(
                Path(folder), ("KAFKA_PORT", "VALKEY_PORT", "WORKER_PORT")
            )
        self.worker_port = ports["WORKER_PORT"]
        self._ports = {name: str(port) for name, port in ports.items()}

    def call(
        self, *arguments: str, timeout_s: float = CALL_S, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run the engine; with `check` a failure raises RuntimeError with its last lines."""
        return self._run([*self.engine, *arguments], timeout_s, check)

    def compose(
        self, *arguments: str, timeout_s: float = CALL_S, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run compose for this project."""
        return self._run([*self._compose, *arguments], timeout_s, check)

    def build(self, target: str) -> None:
        """Build the image of one target under the name that the compose file gives it."""
        arguments = ("build", *self._build_args, "--target", target, "--tag", f"eddyline-{target}")
        self.call(*arguments, str(ROOT), timeout_s=BUILD_S)

    def container(self, service: str) -> str:
        """The id of a running container of this service."""
        return self.containers(service)[0]

    def containers(self, service: str) -> list[str]:
        """The ids of the running containers of this service."""
        listed = self.call(
            "ps",
            "--quiet",
            "--filter",
            f"label=com.docker.compose.project={self.project}",
            "--filter",
            f"label=com.docker.compose.service={service}",
        ).stdout.split()
        return listed

    def is_healthy(self, container: str) -> bool:
        """Run the container's health check now, or ask the engine what it found."""
        if Path(self.engine[0]).name == "podman":
            return self.call("healthcheck", "run", container, check=False).returncode == 0
        status = self.call("inspect", "--format", "{{.State.Health.Status}}", container)
        return status.stdout.strip() == "healthy"

    def exec(
        self, service: str, *command: str, timeout_s: float = CALL_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a container of this service."""
        # On a busy machine Kafka's answers may take longer than users would wait.
        longer = ("--env", f"EDDYLINE_KAFKA_TIMEOUT_MS={KAFKA_TIMEOUT_MS}")
        return self.call("exec", *longer, self.container(service), *command, timeout_s=timeout_s)

    def logs(self, container: str) -> str:
        """Standard output and standard error of a container."""
        done = self.call("logs", container)
        return done.stdout + done.stderr

    def _run(
        self, command: Sequence[str], timeout_s: float, check: bool
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            env={**os.environ, **self._ports},
        )
        if check and done.returncode:
            last = (done.stdout + done.stderr).strip()[-2_000:]
            raise RuntimeError(f"{shlex.join(command)}: exit code {done.returncode}\n{last}")
        return done


class Checks:
    """Runs checks one by one and keeps their rows."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.rows: list[Row] = []

    def check(self, what: str, call: Callable[[], str]) -> bool:
        """Run one check: it returns what it found, or raises."""
        begun = time.monotonic()
        try:
            found, good = call(), True
        except (AssertionError, RuntimeError, TimeoutError, subprocess.TimeoutExpired) as error:
            found, good = f"{type(error).__name__}: {error}", False
        row = Row(what, found, good, time.monotonic() - begun)
        self.rows.append(row)
        mark = "ok  " if good else "FAIL"
        sys.stdout.write(f"{mark} {row.seconds:7.1f} s  {what}: {found}\n")
        sys.stdout.flush()
        return good

    # ---- what is checked

    def builds(self) -> None:
        """Every target builds."""
        for target in TARGETS:
            self.check(f"build {target}", lambda target=target: self._build(target))

    def _build(self, target: str) -> str:
        self.engine.build(target)
        size = self.engine.call("image", "inspect", "--format", "{{.Size}}", f"eddyline-{target}")
        return f"{int(size.stdout) / 1e6:,.0f} MB"

    def comes_up(self) -> str:
        """Kafka, Valkey and the processes are healthy before any generation exists."""
        services = ("kafka", "valkey", *LONG_RUNNING)
        self.engine.compose("up", "--detach", "--no-build", *services, timeout_s=UP_S)
        took = {name: self._healthy(name) for name in services}
        return ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took.items())

    def _healthy(self, service: str, timeout_s: float = UP_S) -> float:
        begun = time.monotonic()
        while True:
            found = self.engine.containers(service)
            if found and all(self.engine.is_healthy(container) for container in found):
                return time.monotonic() - begun
            if time.monotonic() - begun > timeout_s:
                last = self.engine.logs(found[0])[-1_500:] if found else "no container"
                raise TimeoutError(f"{service} is not healthy after {timeout_s:.0f} s: {last}")
            time.sleep(2)

    def trains(self) -> str:
        """Events go in by the command line; the trainer makes a generation; the worker serves."""
        dataset = synthetic.generate(items=300, users=120, clicks=6_000, seed=7)
        with tempfile.TemporaryDirectory() as folder:
            for topic, records in (("items", dataset.items), ("clicks", dataset.clicks)):
                file = Path(folder) / f"{topic}.jsonl"
                file.write_bytes(b"\n".join(encode(record) for record in records))
                self.engine.call("cp", str(file), f"{self.engine.container('ingest')}:/tmp/")
                replay = ("python", "-m", "cli", "replay", f"/tmp/{topic}.jsonl", "--topic", topic)
                shift = ("--shift-to-now",) if topic == "clicks" else ()
                self.engine.exec("ingest", *replay, *shift)
        begun = time.monotonic()
        # It ends with an error while the archive lacks the clicks, and is started again.
        while True:
            done = self.engine.compose(
                "run", "--rm", "--no-deps", "trainer", timeout_s=TRAIN_S, check=False
            )
            if done.returncode == 0:
                break
            if time.monotonic() - begun > TRAIN_S:
                raise TimeoutError(f"the trainer fails: {(done.stdout + done.stderr)[-1_500:]}")
            time.sleep(5)
        trained_s = time.monotonic() - begun
        served_s = self._serving()
        return f"trained in {trained_s:.0f} s, served {served_s:.0f} s later"

    def _serving(self) -> float:
        """Seconds until the worker's published port says SERVING."""
        begun = time.monotonic()
        while not _serves(f"127.0.0.1:{self.engine.worker_port}"):
            if time.monotonic() - begun > UP_S:
                raise TimeoutError(self.engine.logs(self.engine.container("worker"))[-1_500:])
            time.sleep(1)
        return time.monotonic() - begun

    def click_is_seen(self) -> str:
        """A click of a new user is in the next answer that waits for it."""
        begun = time.monotonic()
        user = f"visitor-{time.time_ns()}"
        click = self.engine.exec("ingest", "python", "-m", "cli", "click", user, "f1")
        token = click.stdout.split()[-1]
        query = ("python", "-m", "cli", "query", user, "--after", token, "--wait-ms", "2000")
        address = ("--address", "127.0.0.1:50051", "--json")
        # After a restart ingest may need a rebalance first.
        while True:
            answer = json.loads(self.engine.exec("worker", *query, *address).stdout)
            if answer["freshness"]["after"].get("applied"):
                break
            if time.monotonic() - begun > BACK_S:
                raise TimeoutError(f"the click is not applied: {answer['freshness']}")
        assert answer["items"], answer
        return f"{len(answer['items'])} items, {time.monotonic() - begun:.1f} s by two commands"

    def rights(self) -> str:
        """No process of ours runs as root, has a capability or can gain one."""
        for service in LONG_RUNNING:
            status = self.engine.exec(service, "cat", "/proc/1/status").stdout
            lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            assert set(lines["Uid"].split()) == {"10001"}, (service, lines["Uid"])
            assert int(lines["CapEff"], 16) == int(lines["CapBnd"], 16) == 0, (service, lines)
            assert lines["NoNewPrivs"].strip() == "1", service
        return "uid 10001, no capability, no new privileges"

    def logs_are_json(self) -> str:
        """Every line of ours is one JSON object, and none has the secret."""
        count = 0
        for service in LONG_RUNNING:
            for container in self.engine.containers(service):
                for line in self.engine.logs(container).splitlines():
                    assert isinstance(json.loads(line) if line[:1] == "{" else None, dict), (
                        f"{service}: {line!r}"
                    )
                    count += 1
        return f"{count} lines"

    def keeps_secrets(self) -> str:
        """A password in an address is in no line, whether the server answers or not."""
        found = 0
        for service in LONG_RUNNING:
            environment = {
                "EDDYLINE_REDIS_URL": f"redis://:{SECRET}@127.0.0.1:1/0",
                "EDDYLINE_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
                "EDDYLINE_KAFKA_SASL_MECHANISM": "PLAIN",
                "EDDYLINE_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
                "EDDYLINE_KAFKA_SASL_USERNAME": "eddyline",
                "EDDYLINE_KAFKA_SASL_PASSWORD": SECRET,
                "EDDYLINE_ARCHIVE_URL": "/var/lib/eddyline/archive",
            }
            with self._once(service, environment=environment) as container:
                deadline = time.monotonic() + BACK_S
                while not (said := self.engine.logs(container)) and time.monotonic() < deadline:
                    time.sleep(1)
                assert said and SECRET not in said, (service, said[-500:])
                found += len(said.splitlines())
        return f"not in {found} lines of processes that find no server"

    def read_only(self) -> str:
        """A read-only root needs a writable data folder only; without it there is one sentence."""
        for service in LONG_RUNNING:
            with self._once(service, "--read-only", network=True) as container:
                code = self.engine.call("wait", container).stdout.strip()
                said = self.engine.logs(container)
                assert code == str(BAD_SETTING), (service, code, said)
                assert NOT_WRITABLE in said and "Traceback" not in said, (service, said)
            mounts = ("--read-only", "--tmpfs", "/tmp", "--volume", "/var/lib/eddyline")
            with self._once(service, *mounts, network=True) as container:
                self._lives(service, container)
        return "refused in one line without a data folder, runs with a volume"

    def arbitrary_uid(self) -> str:
        """Any user id of group 0 runs them, as some clusters want it."""
        for service in LONG_RUNNING:
            with self._once(service, "--user", "123456:0", network=True) as container:
                self._lives(service, container)
        return "uid 123456, gid 0"

    def _lives(self, service: str, container: str) -> None:
        """The process waits for a generation, or works; it neither ends nor shows a traceback."""
        time.sleep(10)
        running = self.engine.call("inspect", "--format", "{{.State.Running}}", container)
        said = self.engine.logs(container)
        assert running.stdout.strip() == "true" and "Traceback" not in said, (
            service,
            said[-1_500:],
        )

    @contextmanager
    def _once(
        self,
        service: str,
        *options: str,
        environment: dict[str, str] | None = None,
        network: bool = False,
    ) -> Iterator[str]:
        """A container of the image alone, without compose and volumes; removed at the end.

        network: with the project's network and the addresses of its servers
        """
        values = {
            name: str(value)
            for name, value in yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"][
                service
            ]["environment"].items()
        } | (environment or {})
        bundles = f"{self.engine.project}_generations:/var/lib/eddyline/generations:ro"
        where = ("--network", self._network(), "--volume", bundles) if network else ()
        flags = [text for name, value in values.items() for text in ("--env", f"{name}={value}")]
        container = self.engine.call(
            "run", "--detach", *options, *where, *flags, f"eddyline-{service}"
        ).stdout.strip()
        try:
            yield container
        finally:
            self.engine.call("rm", "--force", "--volumes", container, check=False)

    def _network(self) -> str:
        names = self.engine.call("network", "ls", "--format", "{{.Name}}").stdout.split()
        return next(name for name in names if name.startswith(self.engine.project))

    def stops(self) -> str:
        """SIGTERM ends each process with code 0 within its grace."""
        services = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
        took = []
        for service in LONG_RUNNING:
            grace_s = int(services[service]["stop_grace_period"].removesuffix("s"))
            container = self.engine.container(service)
            begun = time.monotonic()
            self.engine.call("stop", "--time", str(grace_s), container, timeout_s=grace_s + 30)
            seconds = time.monotonic() - begun
            code = self.engine.call("inspect", "--format", "{{.State.ExitCode}}", container)
            assert code.stdout.strip() == "0", (service, code.stdout)
            took.append(f"{service} {seconds:.1f} s of {grace_s}")
            self.engine.call("start", container)
        for service in LONG_RUNNING:
            self._healthy(service)
        self._serving()
        return ", ".join(took)

    def resumes(self) -> str:
        """kill -9 of ingest, worker and Valkey; all come back and a click is seen."""
        for service in ("ingest", "worker", "valkey"):
            container = self.engine.container(service)
            self.engine.call("kill", "--signal", "KILL", container)
            # An engine's own kill counts as a wanted stop: then nothing restarts it but this.
            self.engine.call("start", container, check=False)
        took = [self._healthy(name, BACK_S) for name in ("valkey", "ingest", "worker")]
        serves_s = self._serving()
        return f"serves after {sum(took) + serves_s:.0f} s; {self.click_is_seen()}"

    def scales(self) -> str:
        """Two ingest processes share the partitions."""
        up = ("up", "--detach", "--no-build", "--no-recreate", "--scale", "ingest=2", "ingest")
        self.engine.compose(*up)
        self._healthy("ingest", BACK_S)
        found = self.engine.containers("ingest")
        assert len(found) == 2, found
        seen = self.click_is_seen()
        self.engine.call("rm", "--force", found[0])
        return f"two ingest processes; {seen}; one removed; {self.click_is_seen()}"

    def addresses(self) -> str:
        """The worker answers on IPv4 through its published port, and on IPv6 when told `::`."""
        assert _serves(f"127.0.0.1:{self.engine.worker_port}"), "IPv4"
        check = (
            "import grpc,sys; from grpc_health.v1 import health_pb2 as m, health_pb2_grpc as g; "
            "s = g.HealthStub(grpc.insecure_channel(sys.argv[1])); "
            "s.Check(m.HealthCheckRequest(), timeout=10)"
        )
        with self._once(
            "worker", environment={"EDDYLINE_WORKER_HOST": "::"}, network=True
        ) as container:
            time.sleep(8)
            for address in ("[::1]:50051", "127.0.0.1:50051"):
                self.engine.call("exec", container, "python", "-c", check, address)
        return "IPv4 published, [::1] and 127.0.0.1 under `::`"

    def idles_cheaply(self) -> str:
        """One health check of Kafka costs little."""
        container = self.engine.container("kafka")
        begun = time.monotonic()
        for _ in range(5):
            assert self.engine.is_healthy(container)
        each_s = (time.monotonic() - begun) / 5
        assert each_s < 2, each_s
        return f"{each_s * 1_000:.0f} ms by the clock each"

    def down(self) -> str:
        """Remove everything of this project."""
        down = ("down", "--volumes", "--timeout", "60")
        self.engine.compose(*down, timeout_s=240)
        # podman-compose leaves what `--scale` added, and the network with it.
        of_project = f"label=com.docker.compose.project={self.engine.project}"
        listed = self.engine.call("ps", "--all", "--quiet", "--filter", of_project)
        if added := listed.stdout.split():
            for _ in added:  # one at a time may wait for another that depends on it
                self.engine.call("rm", "--force", *added, check=False)
            self.engine.compose(*down, timeout_s=240)
        left = [name for name in ("kafka", "valkey", *TARGETS) if self.engine.containers(name)]
        assert not left, left
        return "containers, networks and volumes are gone"


def _serves(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main() -> int:
    """Run all checks; 0 where each of them holds."""
    parser = argparse.ArgumentParser(prog="make containers")
    parser.add_argument("--engine", default="docker", help="docker or podman")
    parser.add_argument("--compose", default="", help="default: the engine's own compose")
    parser.add_argument("--build-args", default="", help="more options of the engine's build")
    parser.add_argument("--no-build", action="store_true", help="with the images that are there")
    parser.add_argument("--json", default=".eddyline/containers/last.json", help="the result")
    options = parser.parse_args()
    compose = options.compose or f"{options.engine} compose"
    engine = Engine(options.engine, compose, f"eddyline-check-{os.getpid()}", options.build_args)
    checks = Checks(engine)
    try:
        if not options.no_build:
            checks.builds()
        if all(row.good for row in checks.rows):
            _run_all(checks)
    finally:
        checks.check("down", checks.down)
    Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    rows = [{"what": r.what, "found": r.found, "good": r.good} for r in checks.rows]
    Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    bad = [row.what for row in checks.rows if not row.good]
    sys.stdout.write(f"{len(checks.rows)} checks, failed: {', '.join(bad) or 'none'}\n")
    return 1 if bad else 0


def _run_all(checks: Checks) -> None:
    if not checks.check("comes up healthy", checks.comes_up):
        return
    checks.check("trains and serves", checks.trains)
    checks.check("a click is seen", checks.click_is_seen)
    checks.check("rights", checks.rights)
    checks.check("IPv4 and IPv6", checks.addresses)
    checks.check("Kafka's health check", checks.idles_cheaply)
    checks.check("two ingest processes", checks.scales)
    checks.check("kill -9 and resume", checks.resumes)
    checks.check("stops within the grace", checks.stops)
    checks.check("JSON logs", checks.logs_are_json)
    checks.check("secrets", checks.keeps_secrets)
    checks.check("read-only root", checks.read_only)
    checks.check("arbitrary uid", checks.arbitrary_uid)


if __name__ == "__main__":
    sys.exit(main())
