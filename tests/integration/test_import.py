"""Files into a real Kafka, killed in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from eddyline.kafka import reading, topics
from eddyline.settings.loader import Settings

ROWS = 10_000


def command(settings: Settings, *words: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "EDDYLINE_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "EDDYLINE_REDIS_URL": settings.redis_url,
        "EDDYLINE_NAMESPACE": settings.namespace,
        "EDDYLINE_DATA_DIR": settings.data_dir,
        "COLUMNS": "200",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "cli", *words],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def records(settings: Settings, name: str) -> list[dict[str, Any]]:
    return [json.loads(record.value) for record in reading.read(settings, name)]


def test_a_killed_import_is_resumed_without_a_double(
    fresh_settings: Settings, tmp_path: Path
) -> None:
    settings, movies, ratings = fresh_settings, tmp_path / "movies.csv", tmp_path / "ratings.csv"
    movies.write_text("movieId,title,genres\n1,Heat,Crime|Drama\n", encoding="utf-8")
    users = ("" if n % 1_000 == 999 else f"{n % 97}" for n in range(ROWS))
    lines = (f"{user},{n % 11},4.0,{964982703 + n}\n" for n, user in enumerate(users))
    ratings.write_text("userId,movieId,rating,timestamp\n" + "".join(lines), encoding="utf-8")
    topics.ensure_topics(settings)
    words = ["import", str(ratings), str(movies), "--yes", "--refused", str(tmp_path / "bad.jsonl")]
    first = command(settings, *words)
    try:
        folder = Path(settings.data_dir) / "imports"
        while first.poll() is None:  # killed after the first confirmed chunk of clicks
            found = [json.loads(one.read_bytes()) for one in folder.glob("*.clicks.json")]
            if found and found[0]["next_row"]:
                first.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        first.communicate(timeout=30)
    finally:
        first.kill()
    assert first.returncode == -signal.SIGKILL
    second = command(settings, *words)
    printed, _ = second.communicate(timeout=120)
    assert second.returncode == 0, printed
    assert "resumed at row" in printed and "was imported" in printed
    ids = Counter(one["event_id"] for one in records(settings, topics.CLICKS))
    assert len(ids) == ROWS - 10 and set(ids.values()) == {1}
    refused = (tmp_path / "bad.ratings.csv.clicks.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(one)["timestamp"] for one in refused] == [
        str(964982703 + n) for n in range(999, ROWS, 1_000)
    ]
    assert (tmp_path / "bad.movies.csv.items.jsonl").read_bytes() == b""
    (item,) = records(settings, topics.ITEMS)
    assert (item["title"], item["categories"]) == ("Heat", ["Crime", "Drama"])
