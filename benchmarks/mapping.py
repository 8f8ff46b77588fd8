"""CPU time of an event that a map makes, beside the plain codec: `python -m benchmarks.mapping`.

Both decode a batch of records as ingest does, up to the checked event. The flat map takes six
fields of a flat record: two ids, a time in seconds, a kind, an event id and a weight. Presets read
the golden records of the tests. CPU time of one thread, the least of several runs in turns.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from benchmarks.report import report, row
from eddyline.schema import events, validation
from eddyline.schema.events import Click
from eddyline.settings.loader import Settings
from streams.clicks.batch import decode
from streams.ports import RecordBatch

RECORDS = 500
RUNS = 30
MAPPED_US_MAX = 6.0
MS = 1_772_355_600_000
APPENDED_MS = 1_800_000_000_000  # after all golden records
GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "feeds"
MAP = """
[clicks]
kinds = { seen = "view", bought = "purchase" }
[clicks.fields]
user_id = "uid"
item_id = "sku"
at_ms = { path = "ts", format = "s" }
kind = "action"
event_id = "id"
weight = "score"
"""


def record(offset: int, value: bytes, key: bytes | None = b"k", headers: Any = ()) -> Any:
    fields = {"topic": "clicks", "partition": 0, "timestamp": APPENDED_MS, "headers": headers}
    return SimpleNamespace(offset=offset, value=value, key=key, **fields)


def plain(n: int) -> bytes:
    click = Click(
        user_id=f"u-{n % 97}", item_id=str(n), at_ms=MS, kind="view", event_id=f"e-{n}", weight=1.5
    )
    return events.encode(click)


def foreign(n: int) -> bytes:
    return msgspec.json.encode(
        {
            "uid": f"u-{n % 97}",
            "sku": n,
            "ts": MS // 1_000,
            "action": "seen",
            "id": f"e-{n}",
            "score": 1.5,
        }
    )


def golden(preset: str, topic: str) -> list[Any]:
    """Records of a preset, repeated, that it makes events of."""
    lines = (GOLDEN / f"{preset}.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    found = [one for one in found if one["topic"] == topic and one.get("events") and one["value"]]
    return [
        record(
            n,
            (one := found[n % len(found)])["value"].encode(),
            None if one["key"] is None else one["key"].encode(),
            [(name, value.encode()) for name, value in one["headers"]],
        )
        for n in range(RECORDS)
    ]


def cpu_us(work: Callable[[], int]) -> float:
    """CPU time of one event, µs. work: returns the number of events"""
    began = time.thread_time_ns()
    events_ = work()
    return (time.thread_time_ns() - began) / 1_000 / events_


def main() -> int:
    """Run and report."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
        file.write(MAP)
        file.flush()
        base = Settings(clicks_partitions=1, items_partitions=1, at_ms_min=0)

        def clicks(records: list[Any], map_name: str) -> Callable[[], int]:
            settings = msgspec.structs.replace(base, clicks_map=map_name)
            batch = RecordBatch("clicks", 0, records, 0)
            return lambda: len(decode(settings, batch).events)

        def items(records: list[Any], map_name: str) -> Callable[[], int]:
            settings = msgspec.structs.replace(base, items_map=map_name)
            return lambda: sum(len(validation.item_changes(settings, one)) for one in records)

        works = {
            "plain codec": clicks([record(n, plain(n)) for n in range(RECORDS)], ""),
            "flat map": clicks([record(n, foreign(n)) for n in range(RECORDS)], file.name),
            "segment": clicks(golden("segment", "clicks"), "segment"),
            "cloudevents": clicks(golden("cloudevents", "clicks"), "cloudevents"),
            "debezium, items": items(golden("debezium", "items"), "debezium"),
        }
        least = dict.fromkeys(works, float("inf"))
        for _ in range(RUNS):
            for name, work in works.items():
                least[name] = min(least[name], cpu_us(work))
    rows = [
        row(
            f"CPU of an event, {name}",
            value,
            "µs",
            f"≤ {MAPPED_US_MAX:g}" if name == "flat map" else "",
            name != "flat map" or value <= MAPPED_US_MAX,
        )
        for name, value in least.items()
    ]
    return report("mapping", rows, Path(".eddyline/bench"))


if __name__ == "__main__":
    sys.exit(main())
