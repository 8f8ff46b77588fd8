"""The commands of the pages of docs/feeds, each run as it stands there, on real servers."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from kafka.admin import NewTopic

from eddyline.generations import Manifest
from eddyline.kafka import producers, topics
from eddyline.settings.loader import Settings, load
from sandbox import processes
from sandbox.processes import Deployment
from sandbox.servers.local_servers import log_dir
from sandbox.servers.supervisor import Child, Supervisor

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "feeds"
GOLDEN = ROOT / "tests" / "golden" / "feeds"
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
PREFIX = "EDDYLINE_"
TIMEOUT_S = 60
# What the pages' commands read; `map.toml` is the last one of the page before them.
FILES = {
    "clicks.jsonl": '{"user_id": "u-1", "item_id": "17", "kind": "cart"}\n' * 3,
    "sample.jsonl": '{"user": "u-1", "sku": "17", "action": "view", "ts": 1772355600}\n' * 3,
}


@dataclass(frozen=True)
class Block:
    """Commands of a page: (settings, words after `eddyline`), and the files that they read."""

    commands: list[tuple[dict[str, str], list[str]]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def blocks(page: Path) -> list[Block]:
    found, files = [], dict(FILES)
    for _, language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "toml":
            files["map.toml"] = text
        if language:
            continue
        block = Block()
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if "eddyline" in words:
                at = words.index("eddyline")
                block.commands.append(
                    (dict(word.split("=", 1) for word in words[:at]), words[at + 1 :])
                )
        if block.commands:
            words = [word for named, words in block.commands for word in (*named.values(), *words)]
            block.files.update(
                (name, files[name])
                for name in files.keys() & set(words)
                if words[words.index(name) - 1] != "--out"
            )
            found.append(block)
    return found


def names() -> list[str]:
    return sorted(page.stem for page in PAGES.glob("*.md"))


def test_every_page_has_a_command() -> None:
    assert all(blocks(PAGES / f"{name}.md") for name in names())


@dataclass(frozen=True)
class Place:
    """Where the commands of a block run."""

    settings: Settings
    folder: Path
    bundles: Path
    manifest: Manifest

    def with_topics(self, named: dict[str, str]) -> tuple[Settings, dict[str, str]]:
        """(settings, environment) of a command; its topics exist, under names of this test."""
        own = {
            name: f"{value}.{self.settings.namespace}" if name.endswith("_TOPIC") else value
            for name, value in named.items()
        }
        loaded = load(own, folder=self.folder)
        keys = [name.removeprefix(PREFIX).lower() for name in own]
        settings = msgspec.structs.replace(
            self.settings, **{key: getattr(loaded, key) for key in keys}
        )
        sizes = {
            settings.prefixed(topic): topics.topic_configs(settings, topic)[0]
            for topic in topics.SOURCES
            if settings.has_own_topic(topic)
        }
        with topics.open_admin(settings) as admin:
            if missing := sizes.keys() - set(admin.list_topics()):
                admin.create_topics([NewTopic(name, sizes[name], 1) for name in missing])
                admin.wait_for_topics(list(missing), timeout_ms=10_000)
        base = {
            "KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
            "REDIS_URL": settings.redis_url,
            "NAMESPACE": settings.namespace,
            "DATA_DIR": settings.data_dir,
            "BUNDLE_DIR": str(self.bundles),
            "CLICKS_PARTITIONS": str(settings.clicks_partitions),
            "ITEMS_PARTITIONS": str(settings.items_partitions),
        }
        return settings, {f"{PREFIX}{key}": value for key, value in base.items()} | own

    def send(self, settings: Settings) -> int:
        """Send records of the format of each map; their number."""
        count = 0
        producer = producers.make_producer(settings)
        try:
            for topic in topics.SOURCES:
                for key, value, headers in records(getattr(settings, f"{topic}_map"), topic):
                    name = settings.prefixed(topic)
                    producer.send(name, value, key=key, headers=headers).get(timeout=10)
                    count += 1
        finally:
            producer.close(timeout=5)
        return count

    def ingest(self, settings: Settings, environment: dict[str, str]) -> None:
        """Run it until every record is applied; none may become a dead letter."""
        with Supervisor(log_dir(settings)) as supervisor:
            Deployment(settings, supervisor).prepare(self.manifest)
            if not settings.registry_url:  # that of the page does not exist
                self.send(settings)
            name = f"ingest-{uuid.uuid4().hex[:6]}"
            argv = [sys.executable, "-m", "cli", "ingest"]
            env = {"PYTHONPATH": str(ROOT)} | environment
            supervisor.start(
                Child(name=name, argv=argv, ready=lambda: True, env=env, cwd=self.folder)
            )
            deadline = time.monotonic() + TIMEOUT_S
            log = supervisor.log_file(name)
            while "reading from" not in log.read_text(encoding="utf-8"):
                supervisor.check()
                assert time.monotonic() < deadline, log.read_text(encoding="utf-8")[-2_000:]
                time.sleep(0.05)
            processes.wait_until_applied(settings, timeout_s=TIMEOUT_S, check=supervisor.check)
            assert supervisor.states()[name] == ("ready", 0)
        assert not any(topics.end_offsets(settings, topics.DEAD_LETTERS).values())

    def run(self, environment: dict[str, str], words: list[str]) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "cli", *words],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


def records(map_name: str, topic: str) -> list[tuple[bytes | None, bytes | None, list[object]]]:
    """(key, value, headers) of the golden records that become events.

    Of each item the first one: a later one without a title is refused, as it would empty it.
    """
    golden = GOLDEN / f"{map_name}.jsonl"
    if not map_name:
        return []
    if map_name.endswith(".toml"):
        lines = FILES["sample.jsonl"].encode().splitlines()
        return [(None, line, []) for line in lines] if topic == "clicks" else []
    found: list[tuple[bytes | None, bytes | None, list[object]]] = []
    items: set[str] = set()
    for one in map(json.loads, golden.read_text(encoding="utf-8").splitlines()):
        made = one.get("events")
        if one["topic"] == topic and made and one["value"] is not None:
            key = one["key"]
            if topic == "items":
                ids = {item_id for item_id, _ in made}
                if ids & items:
                    continue
                items |= ids
            if topic != "clicks" and key is None:  # these topics are keyed by the id
                key = made[0][0]
            headers: list[object] = [(name, value.encode()) for name, value in one["headers"]]
            encoded = None if key is None else key.encode()
            found.append((encoded, one["value"].encode(), headers))
    return found


@pytest.mark.parametrize("name", names())
def test_every_command_of_a_page_runs(
    name: str,
    fresh_settings: Settings,
    bundle: tuple[Path, Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundles, manifest = bundle
    for number, block in enumerate(blocks(PAGES / f"{name}.md")):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file, text in block.files.items():
            (folder / file).write_text(text, encoding="utf-8")
        monkeypatch.chdir(folder)
        for step, (named, words) in enumerate(block.commands):
            namespace = f"{fresh_settings.namespace}-{number}-{step}"
            settings = msgspec.structs.replace(fresh_settings, namespace=namespace)
            place = Place(settings, folder, bundles, manifest)
            settings, environment = place.with_topics(named)
            if words == ["ingest"]:
                place.ingest(settings, environment)
                continue
            topics.ensure_topics(settings)
            if named:
                place.send(settings)
            place.run(environment, words)
