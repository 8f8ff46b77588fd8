"""Kafka with TLS, mTLS, SASL and ACLs: valid clients connect; others get the reason at once.

The broker is a real one with a listener for each way (`secured_kafka.py`). Every process of
Eddyline logs in as a user of its own with exactly the rights that docs/security.md gives it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from cli.commands import replay_file
from eddyline import generations
from eddyline.archive import Archive
from eddyline.errors import KafkaRefused
from eddyline.generations import Manifest
from eddyline.kafka import producers, reading, topics
from eddyline.settings.loader import Settings
from sandbox import processes
from sandbox.datasets import synthetic
from sandbox.datasets.dataset import Dataset
from sandbox.processes import Deployment
from sandbox.servers import status
from sandbox.servers.local_servers import local_servers
from sandbox.servers.supervisor import Supervisor
from serving.rpc.client import Client, is_ready
from serving.worker.item_vectors import ItemVectorLog
from tests.integration.secured_kafka import (
    KEY_PASSWORD,
    PASSWORDS,
    PLAIN_PASSWORDS,
    SECRETS,
    WRONG_PASSWORD,
    SecuredKafka,
    secured_kafka,
)

DOCS = Path(__file__).parents[2] / "docs" / "security.md"
# Each way that lets a user in, and what its settings are made of.
WAYS = ("LOGINTLS", pytest.param("MTLS", marks=pytest.mark.long))


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    with secured_kafka(tmp_path_factory.mktemp("secured")) as made:
        yield made


@pytest.fixture(scope="module")
def base(broker: SecuredKafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings with a Redis, and with Kafka's port that needs no credentials."""
    folder = tmp_path_factory.mktemp("eddyline")
    settings = Settings(
        data_dir=str(folder),
        clicks_partitions=2,
        items_partitions=2,
        worker_port=0,
        kafka_timeout_ms=5_000,
        kafka_bootstrap_servers=broker.address("PLAINTEXT"),
        redis_url=os.environ.get("REDIS_URL", ""),
    )
    with (
        Supervisor(folder / "servers") as supervisor,
        local_servers(settings, supervisor, owner="t") as made,
    ):
        yield made


@pytest.fixture(scope="module")
def small_dataset() -> Dataset:
    return synthetic.generate(items=60, users=20, clicks=300, seed=7)


@dataclass
class System:
    """A namespace of one test, and its users."""

    broker: SecuredKafka
    base: Settings
    way: str

    def settings(self, user: str) -> Settings:
        who = self.broker.scram(user) if self.way == "LOGINTLS" else self.broker.client(user)
        return self.broker.settings(self.base, self.way, **who)


@pytest.fixture(params=WAYS)
def system(
    request: pytest.FixtureRequest, broker: SecuredKafka, base: Settings, tmp_path: Path
) -> System:
    space = f"t-{uuid.uuid4().hex[:12]}"
    settings = msgspec.structs.replace(base, namespace=space, data_dir=str(tmp_path))
    for user in ("ingest", "worker", "archive", "judge", "operator"):
        broker.allow(user, *rights(user, space))
    return System(broker, settings, request.param)


def rights(user: str, space: str) -> list[tuple[str, str, str]]:
    """(kind, prefix, operation) of the table in docs/security.md, with those for `blend`."""
    found = []
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        row = r"\| (\w+)(?: with `fusion = blend`)? \| `(\w+)` \| (.+) \| (.+) \|"
        match = re.fullmatch(row, line)
        if match and match[1] == user:
            names, operations = re.findall(r"`([^`]+)`", match[3]), re.findall(r"`(\w+)`", match[4])
            found += [(match[2], f"{space}.{name}", op) for name in names for op in operations]
    assert found, f"docs/security.md has no rights for {user}"
    return found


def environment(settings: Settings) -> dict[str, str]:
    changed = {n: getattr(settings, n) for n in settings.__struct_fields__}
    defaults = Settings()
    env = {f"EDDYLINE_{n.upper()}": str(v) for n, v in changed.items() if v != getattr(defaults, n)}
    return os.environ | env


def run(settings: Settings, *argv: str, timeout_s: float = 40) -> subprocess.CompletedProcess[str]:
    """A command of Eddyline as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-m", *argv],
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    keeps_secrets(done.stdout, done.stderr)
    return done


def keeps_secrets(*texts: str) -> None:
    for text in texts:
        assert not [secret for secret in SECRETS if secret in text]


def eventually(check: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_everything_works_with_the_rights_in_the_docs(
    system: System, small_dataset: Dataset, bundle: tuple[Path, Manifest]
) -> None:
    folder, manifest = bundle
    system.base = msgspec.structs.replace(
        system.base, bundle_dir=str(folder), archive_file_offsets=8
    )
    operator = system.settings("operator")
    logs = Path(system.base.data_dir) / "logs"
    with Supervisor(logs) as supervisor:
        Deployment(operator, supervisor).prepare(manifest)
        replay_file.send(operator, small_dataset.items)
        replay_file.send(operator, small_dataset.clicks)
        cut = {"clicks_partitions": "2", "items_partitions": "2"}
        ingest = Deployment(system.settings("ingest"), supervisor).ingest_child(**cut)
        worker, address = Deployment(system.settings("worker"), supervisor).worker_child(
            is_ready, **cut, answers_sample="1", fusion="blend"
        )
        archiving = Deployment(system.settings("archive"), supervisor).child(
            "archive", "streams.archive", lambda: True, archive_file_offsets="8", **cut
        )
        judging = Deployment(system.settings("judge"), supervisor).child(
            "judge", "evaluation.judge", lambda: True, judge_report_s="1", fusion="blend", **cut
        )
        supervisor.start(ingest, worker, archiving, judging)
        processes.wait_until_applied(operator, timeout_s=30, check=supervisor.check)

        with Client(address) as client:
            before = [item.item_id for item in client.retrieve("ana", 10).items]
            done = run(operator, "cli", "click", "ana", before[0])
            assert done.returncode == 0, done.stderr
            partition, offset = re.search(r"sent: clicks/(\d+)/(\d+)", done.stdout).groups()  # type: ignore[union-attr]
            answer = client.retrieve("ana", 10, after=(int(partition), int(offset)), wait_ms=2_000)
            after = [item.item_id for item in answer.items]
        assert before[0] not in after and after != before
        assert answer.freshness.user.offset == int(offset) and not answer.missing

        # A dead letter, and a click in a foreign partition: what else ingest writes.
        producer = producers.make_producer(operator)
        clicks = operator.prefixed(topics.CLICKS)
        producer.send(clicks, b"no json", key=b"ana").get(timeout=5)
        producer.close(timeout=5)
        eventually(lambda: list(reading.read(operator, topics.DEAD_LETTERS, {0: 0})))
        done = run(operator, "cli", "dead-letters", "list")
        assert done.returncode == 0 and "malformed_json" in done.stdout, done.stderr
        done = run(operator, "cli", "stats", "--address", address)
        assert done.returncode == 0 and "clicks" in done.stdout, done.stderr
        eventually(lambda: list(Archive(system.base).read(topics.ITEMS)))
        eventually(lambda: list(reading.read(operator, topics.ANSWERS)))
        eventually(lambda: list(reading.read(operator, topics.BLENDER)))
        supervisor.check()
    written = {path.name: path.read_text(encoding="utf-8") for path in logs.glob("*.log")}
    assert {"ingest.log", "worker.log", "archive.log", "judge.log"} <= set(written)
    for name in ("worker.log", "judge.log"):
        assert "of the blender cannot be" not in written[name]
    keeps_secrets(
        *written.values(), (system.broker.folder / "logs" / "kafka.log").read_text(encoding="utf-8")
    )


def test_plain_works_too_and_an_encrypted_key(broker: SecuredKafka, base: Settings) -> None:
    password = PLAIN_PASSWORDS["operator"]
    plain = {
        "kafka_sasl_mechanism": "PLAIN",
        "kafka_sasl_username": "operator",
        "kafka_sasl_password": password,
    }
    locked = broker.client("operator", password=KEY_PASSWORD)
    for settings in (
        broker.settings(base, "LOGIN", **plain),
        broker.settings(base, "MTLS", **locked),
    ):
        topics.wait_until_up(settings, timeout_s=5)


def wrong(broker: SecuredKafka, base: Settings) -> dict[str, tuple[Settings, list[str]]]:
    """Settings that Kafka refuses, and the words that the message must contain."""
    login = {"kafka_sasl_mechanism": "SCRAM-SHA-512", "kafka_sasl_username": "operator"}
    wrong_password = login | {"kafka_sasl_password": WRONG_PASSWORD}
    nobody = wrong_password | {"kafka_sasl_username": "nobody"}
    plain = wrong_password | {"kafka_sasl_mechanism": "PLAIN"}
    right = login | {"kafka_sasl_password": PASSWORDS["operator"]}
    foreign, user = (
        broker.ca(foreign=True),
        ["kafka_sasl_username = 'operator'", "kafka_sasl_password"],
    )
    made = {
        "password": (broker.settings(base, "LOGINTLS", **wrong_password), user),
        "password in the clear": (broker.settings(base, "LOGIN", **wrong_password), user),
        "password of PLAIN": (broker.settings(base, "LOGIN", **plain), user),
        "user": (broker.settings(base, "LOGINTLS", **nobody), ["kafka_sasl_username = 'nobody'"]),
        "mechanism": (
            broker.settings(base, "LOGINTLS", **plain),
            ["kafka_sasl_mechanism = 'PLAIN'", "it knows SCRAM-SHA-512"],
        ),
        "authority": (
            broker.settings(base, "TLS", kafka_ca_file=foreign),
            ["kafka_ca_file", foreign],
        ),
        "no authority": (
            broker.settings(base, "TLS", kafka_ca_file=""),
            ["kafka_ca_file", "system's"],
        ),
        "no certificate": (broker.settings(base, "MTLS"), ["kafka_cert_file", "kafka_key_file"]),
        "foreign certificate": (
            broker.settings(base, "MTLS", **broker.client("operator", foreign=True)),
            ["kafka_cert_file", "operator-foreign"],
        ),
        "name": (
            msgspec.structs.replace(
                broker.settings(base, "TLS"),
                kafka_bootstrap_servers=broker.address("TLS", "localhost"),
            ),
            ["kafka_bootstrap_servers", "localhost"],
        ),
    }
    for ours, port, words in (
        ("PLAINTEXT", "TLS", ["speaks TLS", "kafka_security_protocol"]),
        ("PLAINTEXT", "LOGIN", ["SASL (PLAIN, SCRAM-SHA-512)", "kafka_security_protocol"]),
        ("LOGIN", "LOGINTLS", ["speaks TLS", "kafka_security_protocol"]),
        ("TLS", "PLAINTEXT", ["speaks no TLS", "kafka_security_protocol"]),
        ("TLS", "LOGINTLS", ["SASL (SCRAM-SHA-512)", "SASL_SSL"]),
        ("LOGIN", "PLAINTEXT", ["no login by SASL", "kafka_security_protocol to PLAINTEXT"]),
        ("LOGINTLS", "TLS", ["no login by SASL", "kafka_security_protocol to SSL"]),
    ):
        more = right if ours.startswith("LOGIN") else {}
        at = msgspec.structs.replace(
            broker.settings(base, ours, **more),
            kafka_bootstrap_servers=broker.address(port),
            kafka_timeout_ms=500,
        )
        made[f"{ours} to {port}"] = (at, words)
    return made


def test_what_is_wrong_is_told_at_once(broker: SecuredKafka, base: Settings) -> None:
    for what, (settings, words) in wrong(broker, base).items():
        begun = time.monotonic()
        with pytest.raises(KafkaRefused) as refused:
            topics.wait_until_up(settings, timeout_s=30)
        sentence = str(refused.value)
        missing = [
            word for word in (*words, settings.kafka_bootstrap_servers) if word not in sentence
        ]
        assert missing == [] and "\n" not in sentence, (what, sentence)
        keeps_secrets(sentence, repr(settings))
        assert time.monotonic() - begun < 5, what


@pytest.mark.parametrize("what", ["password", "PLAINTEXT to TLS"])
def test_every_kind_of_client_is_told(what: str, broker: SecuredKafka, base: Settings) -> None:
    settings, words = wrong(broker, base)[what]
    for call in (
        lambda: producers.make_producer(settings),
        lambda: topics.end_offsets(settings, topics.CLICKS),
        lambda: ItemVectorLog(settings, "1"),
        lambda: generations.active(settings),
        lambda: list(reading.read(settings, topics.CLICKS, {0: 0})),
        lambda: status.server_status(settings),
    ):
        try:
            message = str(call())
        except KafkaRefused as refused:
            message = str(refused)
        assert [word for word in words if word not in message] == []
        keeps_secrets(message)


PROCESSES = (("cli", "click", "ana", "5"), ("streams",), ("serving",), ("streams.archive",))


@pytest.mark.parametrize(
    ("what", "argv"),
    [
        *(("password", argv) for argv in PROCESSES),
        ("PLAINTEXT to TLS", PROCESSES[0]),
        ("no certificate", PROCESSES[1]),
        ("authority", PROCESSES[3]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_process_that_is_refused_ends_with_one_sentence(
    what: str, argv: tuple[str, ...], broker: SecuredKafka, base: Settings, tmp_path: Path
) -> None:
    settings, words = wrong(broker, base)[what]
    done = run(
        msgspec.structs.replace(settings, data_dir=str(tmp_path), namespace="t-refused"), *argv
    )
    assert done.returncode == 3, done.stderr
    assert len(done.stderr.splitlines()) == 1 and all(word in done.stderr for word in words)


@pytest.mark.parametrize("argv", PROCESSES[:2], ids=lambda argv: argv[0])
def test_settings_that_do_not_fit_end_a_process_with_code_2(
    argv: tuple[str, ...], broker: SecuredKafka, base: Settings
) -> None:
    settings = broker.settings(base, "LOGINTLS", kafka_sasl_mechanism="SCRAM-SHA-512")
    done = run(settings, *argv)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "kafka_sasl_username" in done.stderr and "kafka_sasl_password" in done.stderr


@pytest.mark.parametrize("argv", PROCESSES, ids=lambda argv: argv[0])
def test_a_user_without_rights_is_told_which_one_is_missing(
    argv: tuple[str, ...], broker: SecuredKafka, base: Settings, tmp_path: Path
) -> None:
    space = msgspec.structs.replace(base, namespace="t-forbidden", data_dir=str(tmp_path))
    topics.ensure_topics(space)
    done = run(broker.settings(space, "LOGINTLS", **broker.scram("stranger")), *argv)
    assert done.returncode == 3, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "user 'stranger' lacks a right" in done.stderr and "t-forbidden." in done.stderr


@pytest.mark.parametrize("lacking", ["GROUP", "TRANSACTIONAL_ID"])
def test_ingest_says_which_right_its_group_or_its_transactions_lack(
    lacking: str,
    broker: SecuredKafka,
    base: Settings,
    bundle: tuple[Path, Manifest],
    tmp_path: Path,
) -> None:
    """aiokafka keeps a group's missing right to itself; without a look at it ingest would wait for
    ever.
    """
    folder, manifest = bundle
    space = f"t-{uuid.uuid4().hex[:12]}"
    settings = msgspec.structs.replace(
        base, namespace=space, data_dir=str(tmp_path), bundle_dir=str(folder)
    )
    with Supervisor(tmp_path / "logs") as supervisor:
        Deployment(settings, supervisor).prepare(manifest)
    broker.allow("ingest", *(right for right in rights("ingest", space) if right[0] != lacking))
    done = run(broker.settings(settings, "LOGINTLS", **broker.scram("ingest")), "streams")
    assert done.returncode == 3, done.stderr
    assert (
        "Traceback" not in done.stderr
        and "user 'ingest' lacks a right" in done.stderr.splitlines()[-1]
    )
