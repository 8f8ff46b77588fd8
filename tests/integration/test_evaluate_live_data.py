"""`eddyline evaluate` on what a user has: Kafka's topics, read by a map, and the archive."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from kafka import TopicPartition
from kafka.admin import KafkaAdminClient
from typer.testing import CliRunner

from cli.main import app
from eddyline.archive import Archive
from eddyline.kafka import clients, producers, topics
from eddyline.schema.events import Click, Item, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from tests.archiving import archive_all
from tests.unit.evaluation.small import BASE_MS, ITEMS, make_bundle

pytestmark = pytest.mark.timeout(120)
MAP = """
[clicks.fields]
user_id = "visitor"
item_id = "sku"
event_id = "id"
at_ms = "seen_ms"
kind = "what"
"""
CATALOGUE = [Item(item_id=f"i{n}", title=f"Film {n}", at_ms=BASE_MS + n) for n in range(ITEMS)]
ROWS = "popular-all,popular,towers,cascade"


@pytest.fixture
def settings(fresh_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Topics whose clicks are in a shop's own format; the command line has the same settings."""
    (tmp_path / "shop.toml").write_text(MAP, encoding="utf-8")
    settings = msgspec.structs.replace(
        fresh_settings, clicks_map=str(tmp_path / "shop.toml"), archive_file_offsets=100
    )
    default = msgspec.structs.asdict(Settings())
    for name, value in msgspec.structs.asdict(settings).items():
        if value != default[name]:
            monkeypatch.setenv(f"EDDYLINE_{name.upper()}", str(value))
    topics.ensure_topics(settings)
    return settings


def clicks() -> list[Click]:
    rng = np.random.default_rng(5)
    return [
        Click(
            user_id=f"u{rng.integers(8)}",
            item_id=f"i{rng.integers(ITEMS)}",
            at_ms=BASE_MS + 1_000 * (n + 1),
            kind="purchase" if n % 5 == 0 else "click",
            event_id=f"e{n}",
        )
        for n in range(240)
    ]


def send(settings: Settings, some: Sequence[Click], *, everything: bool) -> None:
    """Clicks as the shop writes them; with `everything` also items and a profile."""
    producer, name = producers.make_producer(settings, linger_ms=5), settings.prefixed("clicks")
    try:
        for click in some:
            record: dict[str, Any] = {"visitor": click.user_id, "sku": click.item_id}
            record |= {"id": click.event_id, "seen_ms": click.at_ms, "what": click.kind}
            partition = partition_of(click.user_id, settings.clicks_partitions)
            producer.send(name, json.dumps(record).encode(), partition=partition)
        producer.send(name, b"no JSON", partition=0)
        if everything:
            for item in CATALOGUE:
                producers.send_item(producer, settings, item)
            profile = UserProfile(user_id="u3", attributes={"age": 3})
            producers.send_profile(producer, settings, profile)
        producer.flush(timeout=20)
    finally:
        producer.close(timeout=5)


def evaluate(folder: Path, name: str, *words: str) -> list[Any]:
    """The rows of a report."""
    out = folder / f"{name}.json"
    given = [*words, "--bundle", str(folder / "bundles" / "1"), "--rows", ROWS, "--json", str(out)]
    result = CliRunner().invoke(app, ["evaluate", *given, "--repeats", "keep"])
    assert result.exit_code == 0, (result.output, result.exception)
    [report] = json.loads(out.read_text(encoding="utf-8"))
    assert report["events"]["scored"] > 30 and not report["rejected"]
    return [report["events"], report["rows"]]


def of_files(folder: Path, some: Sequence[Click]) -> list[Any]:
    """The rows of a report on the same data in files."""
    make_bundle(folder / "bundles", CATALOGUE)
    for name, lines in (("clicks", some), ("items", CATALOGUE)):
        raw = b"\n".join(msgspec.json.encode(line) for line in lines)
        (folder / f"{name}.jsonl").write_bytes(raw + b"\n")
    users = folder / "users.jsonl"
    users.write_text(json.dumps({"user_id": "u3", "attributes": {"age": 3}}), encoding="utf-8")
    words = ["--items", str(folder / "items.jsonl"), "--users", str(users)]
    return evaluate(folder, "files", str(folder / "clicks.jsonl"), *words, "--map", "eddyline")


def test_topics_are_evaluated_as_files_with_the_same_events(
    settings: Settings, tmp_path: Path
) -> None:
    some = clicks()
    send(settings, some, everything=True)
    assert evaluate_and_compare(tmp_path, "--topics", some)


def test_the_archive_is_evaluated_with_what_kafka_no_longer_has(
    settings: Settings, tmp_path: Path
) -> None:
    some = clicks()
    send(settings, some[:150], everything=True)
    archive_all(settings)
    ends = {p: end + 1 for p, end in Archive(settings).ends(topics.CLICKS).items()}
    send(settings, some[150:], everything=False)
    admin = KafkaAdminClient(**clients.client_options(settings))
    try:
        name = settings.prefixed(topics.CLICKS)
        admin.delete_records({TopicPartition(name, p): end for p, end in ends.items()})
    finally:
        admin.close()
    assert evaluate_and_compare(tmp_path, "--archive", some)


def evaluate_and_compare(folder: Path, option: str, some: Sequence[Click]) -> bool:
    wanted = of_files(folder, some)
    assert evaluate(folder, "live", option) == wanted
    return wanted[0]["log"] == len(some)
