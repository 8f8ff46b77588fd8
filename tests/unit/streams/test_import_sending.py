"""Imports that are killed anywhere and started again send each event once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from kafka.errors import KafkaTimeoutError

from eddyline.errors import KafkaUnavailable, SettingsError
from eddyline.kafka import reading, topics
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId
from streams.importing import rows, sending
from streams.importing.files import open_file
from streams.importing.rows import FileMap, RowReader
from streams.importing.sending import Result, send_file

MAP = FileMap('[clicks]\n[clicks.fields]\nuser_id = "u"\nitem_id = "i"\n', "map")
ROWS = 23


class Killed(BaseException):
    """The process ends here."""


class Broker:
    """A log in memory, and faults: `fuse` counts down at each step, and kills at 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logs: dict[int, list[Any]] = {n: [] for n in range(4)}
        self.fuse = -1
        self.fails = False
        self.topic_id = "t1"
        monkeypatch.setattr(sending.producers, "make_producer", lambda *_, **__: self)
        monkeypatch.setattr(
            topics,
            "log_ids",
            lambda *_: {name: LogId("c", self.topic_id) for name in topics.SOURCES},
        )
        monkeypatch.setattr(topics, "end_offsets", lambda *_: self.ends())
        monkeypatch.setattr(reading, "read", self.read)
        save = sending._save

        def saving(path: Path, point: sending.Checkpoint) -> None:
            self.step()
            save(path, point)
            self.step()

        monkeypatch.setattr(sending, "_save", saving)

    def step(self) -> None:
        self.fuse -= 1
        if self.fuse == 0:
            raise Killed

    def send(self, topic: str, value: bytes, *, key: bytes, headers: Any) -> Any:
        self.step()
        partition = partition_of(key.decode(), 4)
        self.logs[partition].append(SimpleNamespace(value=value, key=key))
        meta = SimpleNamespace(partition=partition, offset=len(self.logs[partition]) - 1)
        return SimpleNamespace(get=lambda timeout: self.confirmed(meta))

    def confirmed(self, meta: Any) -> Any:
        if self.fails:
            raise KafkaTimeoutError("away")
        return meta

    def flush(self, timeout: float) -> None:
        self.step()

    def close(self, timeout: float) -> None:
        pass

    def ends(self) -> dict[int, int]:
        return {partition: len(log) for partition, log in self.logs.items()}

    def read(
        self, _: Settings, name: str, starts: Mapping[int, int], ends: Mapping[int, int]
    ) -> Iterator[Any]:
        for partition, log in self.logs.items():
            yield from log[starts.get(partition, 0) : ends[partition]]

    def ids(self) -> list[str]:
        found = (json.loads(one.value) for log in self.logs.values() for one in log)
        return [one["event_id"] for one in found if one["event_id"].startswith("import/")]


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    monkeypatch.setattr(sending, "CHUNK_ROWS", 5)
    return Broker(monkeypatch)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        kafka_bootstrap_servers="k:1",
        redis_url="redis://r",
        data_dir=str(tmp_path / "data"),
        dedupe_window_events=512,
    )


@pytest.fixture
def reader(settings: Settings, tmp_path: Path) -> RowReader:
    path = tmp_path / "f.csv"
    lines = "".join(f"{'' if n % 7 == 3 else f'u{n}'},i{n}\n" for n in range(ROWS))
    path.write_text("u,i\n" + lines, encoding="utf-8")
    file = open_file(path)
    return RowReader(settings, file, file.digest(), topics.CLICKS, MAP)


def expected(reader: RowReader) -> Counter[str]:
    return Counter(f"import/{reader.digest}/{n}" for n in range(ROWS) if n % 7 != 3)


def steps(broker: Broker, settings: Settings, reader: RowReader) -> int:
    """The steps of a whole import, at each of which a process may be killed."""
    broker.fuse = 0
    send_file(settings, reader)
    return -broker.fuse


def test_an_import_that_is_killed_anywhere_sends_each_event_once(
    broker: Broker, settings: Settings, reader: RowReader, tmp_path: Path
) -> None:
    read = list(reader.file.rows())  # a file is opened fast, but not a hundred times
    reader.file.rows = lambda skip=0: (row for row in read[skip:])  # type: ignore[method-assign]
    count = steps(broker, settings, reader)
    assert count > ROWS
    for at in range(1, count + 1):
        broker.topic_id = f"killed at {at}"  # another topic: nothing is imported yet
        broker.logs = {n: [] for n in range(4)}
        refused = tmp_path / f"refused-{at}.jsonl"
        broker.fuse = at
        with pytest.raises(Killed):
            send_file(settings, reader, refused_file=refused)
        # What others write between does not matter, also if it is more than the window.
        other = msgspec.json.encode({"event_id": "x"})
        broker.logs[1] += [SimpleNamespace(value=other, key=b"k")] * (
            settings.dedupe_window_events + 1
        )
        broker.fuse = max(1, at // 2)
        try:  # killed a second time, mostly
            send_file(settings, reader, refused_file=refused)
        except Killed:
            pass
        broker.fuse = -1
        result = send_file(settings, reader, refused_file=refused)
        assert Counter(broker.ids()) == expected(reader), at
        assert (result.rows, result.sent, result.refused) == (ROWS, 20, 3)
        lines = refused.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["i"] for line in lines] == ["i3", "i10", "i17"]


def test_a_broker_that_does_not_confirm_is_one_sentence_and_resumed(
    broker: Broker, settings: Settings, reader: RowReader
) -> None:
    broker.fails = True
    with pytest.raises(KafkaUnavailable, match="the same command resumes it"):
        send_file(settings, reader)
    broker.fails = False
    send_file(settings, reader)
    assert Counter(broker.ids()) == expected(reader)


def test_a_file_is_imported_once_into_a_topic(
    broker: Broker, settings: Settings, reader: RowReader
) -> None:
    assert not send_file(settings, reader).was_done
    sent = len(broker.ids())
    again = send_file(settings, reader)
    assert again.was_done and (again.rows, again.refused) == (ROWS, 3)
    assert len(broker.ids()) == sent
    broker.topic_id = "made anew"
    assert not send_file(settings, reader).was_done


@pytest.mark.parametrize("rows_", [4, 5, 6, 10, 11])
def test_chunks_end_at_the_limit(
    broker: Broker, settings: Settings, tmp_path: Path, rows_: int
) -> None:
    path = tmp_path / "g.csv"
    path.write_text("u,i\n" + "".join(f"u{n},i\n" for n in range(rows_)), encoding="utf-8")
    reader = RowReader(settings, open_file(path), "d", topics.CLICKS, MAP)
    seen: list[int] = []
    result: Result = send_file(settings, reader, on_progress=lambda done, *_: seen.append(done))
    assert seen == sorted({0, *range(5, rows_ + 1, 5), rows_}) and result.sent == rows_


def test_items_whose_partition_another_producer_decides_on_are_not_imported(
    broker: Broker, settings: Settings, reader: RowReader
) -> None:
    settings = msgspec.structs.replace(settings, items_map="debezium")
    items = FileMap('[items]\n[items.fields]\nitem_id = "i"\n', "map")
    reader = RowReader(settings, reader.file, reader.digest, topics.ITEMS, items)
    with pytest.raises(SettingsError, match="items_map = 'debezium'"):
        send_file(settings, reader)
    assert not any(broker.logs.values())


def test_two_imports_of_a_file_do_not_run_at_once(
    broker: Broker, settings: Settings, reader: RowReader
) -> None:
    def during(done: int, *_: int) -> None:
        with pytest.raises(SettingsError, match="another import"):
            send_file(settings, reader)

    send_file(settings, reader, on_progress=during)
    assert Counter(broker.ids()) == expected(reader)


def test_a_file_of_refused_rows_is_not_overwritten(
    broker: Broker, settings: Settings, reader: RowReader, tmp_path: Path
) -> None:
    path = tmp_path / "kept"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(SettingsError, match="exists already"):
        send_file(settings, reader, refused_file=path)
    assert path.read_text(encoding="utf-8") == "mine"


def test_the_last_row_of_each_item_of_a_table_of_events_is_sent(
    broker: Broker, settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "orders.csv"
    lines = ["u,i,title", "1,a,old", "1,b,B", "2,a,new", "2,c," + "x" * 1_001]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    items = FileMap('[items]\n[items.fields]\nitem_id = "i"\ntitle = "title"\n', "map")
    reader = RowReader(settings, open_file(path), "d", topics.ITEMS, items)
    reader.keep_last()
    send_file(settings, reader)
    sent = [json.loads(one.value) for log in broker.logs.values() for one in log]
    titles = [(one["item_id"], one["title"]) for one in sent if one["item_id"] != "c"]
    assert sorted(titles) == [("a", "new"), ("b", "B")]


def test_own_format_in_csv_cells_is_read(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    text = 'item_id,title,categories,attributes\n007,7,"[""a""]","{""price"": 1.5}"\n'
    path.write_text(text, encoding="utf-8")
    file = open_file(path)
    found = rows.guess_map(file, rows.sample(file))
    assert found == '[items]\npreset = "eddyline"\n'
    reader = RowReader(settings, file, "d", topics.ITEMS, FileMap(found, "m"))
    ((key, item),) = reader.events(0, next(file.rows()))
    assert key == "007" and item is not None
    assert msgspec.to_builtins(item)["attributes"] == {"price": 1.5}
