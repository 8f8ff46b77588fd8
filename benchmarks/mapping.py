"""CPU time of an event that a map makes, beside the plain codec: `python -m benchmarks.mapping`.

Both decode a batch of records as ingest does, up to the checked event. The flat map takes six
fields of a flat record: two ids, a time in seconds, a kind, an event id and a weight. The row of
Protobuf is of the same six fields. Presets read the golden records of the tests. CPU time of one
thread, the least of several runs in turns.
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
from google.protobuf import message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from typing_extensions import override

from benchmarks.report import report, row
from eddyline.schema import events, validation
from eddyline.schema.events import Click
from eddyline.schema.mapping import mapper, protobuf, spec
from eddyline.schema.mapping.registry import Access, Registry
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
ENCODED = '[clicks]\nencoding = "registry"'
SETTINGS = Settings(clicks_partitions=1, items_partitions=1, at_ms_min=0)
PROTOBUF_TYPES = {
    str: FieldDescriptorProto.TYPE_STRING,
    int: FieldDescriptorProto.TYPE_INT64,
    float: FieldDescriptorProto.TYPE_DOUBLE,
}
# A zero byte, the schema's id, and the path of the file's first message.
PROTOBUF_HEADER = b"\0" + (1).to_bytes(4, "big") + b"\0"


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


class CompiledRegistry(Registry):
    """A registry that already gave its only schema, of a Protobuf message."""

    def __init__(self) -> None:
        super().__init__(Access("http://localhost"), msgspec.json.decode)
        file = FileDescriptorProto(syntax="proto3")
        message = file.message_type.add(name="Event")
        for name, value in msgspec.json.decode(foreign(0)).items():
            message.field.add(
                name=name,
                number=len(message.field) + 1,
                type=PROTOBUF_TYPES[type(value)],
                label=FieldDescriptorProto.LABEL_OPTIONAL,
            )
        self._schema = protobuf.compile_schema(file.SerializeToString())

    @override
    def decoded(self, value: bytes) -> Any:
        return protobuf.decode(self._schema, value, len(PROTOBUF_HEADER) - 1)

    def encoded(self, n: int) -> bytes:
        """The value of `foreign(n)`, as a Protobuf message."""
        message = message_factory.GetMessageClass(self._schema.messages[0])
        return PROTOBUF_HEADER + message(**msgspec.json.decode(foreign(n))).SerializeToString()


def by_protobuf() -> Callable[[], int]:
    """Decode Protobuf messages by the map of `MAP`."""
    registry = CompiledRegistry()
    topic_map = spec.parse(MAP.replace("[clicks]", ENCODED, 1).encode(), "clicks", "the benchmark")
    assert topic_map is not None
    by_map = mapper.compiled(topic_map, "clicks", "the benchmark", registry)
    records = [record(n, registry.encoded(n)) for n in range(RECORDS)]
    return lambda: sum(len(validation.user_events(SETTINGS, one, by_map)) for one in records)


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

        def clicks(records: list[Any], map_name: str) -> Callable[[], int]:
            settings = msgspec.structs.replace(SETTINGS, clicks_map=map_name)
            batch = RecordBatch("clicks", 0, records, 0)
            return lambda: len(decode(settings, batch).events)

        def items(records: list[Any], map_name: str) -> Callable[[], int]:
            settings = msgspec.structs.replace(SETTINGS, items_map=map_name)
            return lambda: sum(len(validation.item_changes(settings, one)) for one in records)

        works = {
            "plain codec": clicks([record(n, plain(n)) for n in range(RECORDS)], ""),
            "flat map": clicks([record(n, foreign(n)) for n in range(RECORDS)], file.name),
            "flat map, Protobuf": by_protobuf(),
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
