"""How both clients decode: header names that are not UTF-8, and batches that cannot be decoded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import aiokafka.consumer.fetcher as fetcher
import pytest
from aiokafka.consumer.fetcher import READ_COMMITTED
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.structs import TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.record import MemoryRecords
from kafka.record.default_records import DefaultRecordBatchBuilder
from kafka.record.legacy_records import LegacyRecordBatchBuilder
from kafka.record.util import calc_crc32c

from eddyline.kafka import aiokafka_decoding, kafka_python_decoding, unreadable
from eddyline.kafka.unreadable import UnreadableBatch
from tests.whole_records import RawName

CODECS = [0, 1]
BAD, GOOD = [(RawName(b"\xff\xfe"), b"1"), ("after", b"2")], [("named", b"3")]


@pytest.fixture(autouse=True)
def lenient() -> None:
    kafka_python_decoding.install()
    aiokafka_decoding.install()


def batch(first: int, headers: list[Any], codec: int = 0, producer: int = -1) -> bytes:
    """A batch with one record for each element of `headers`."""
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=codec,
        is_transactional=producer >= 0,
        producer_id=producer,
        producer_epoch=0 if producer >= 0 else -1,
        base_sequence=0 if producer >= 0 else -1,
        batch_size=100_000,
    )
    for number, of_record in enumerate(headers):
        builder.append(number, 7, b"key", b"value", of_record)
    built = bytearray(builder.build())
    built[:8] = first.to_bytes(8, "big")
    return bytes(built)


def by_kafka_python(data: bytes) -> list[tuple[int, list[Any]]]:
    records, found = MemoryRecords(data), []
    while (one := records.next_batch()) is not None:
        found += [(record.offset, list(record.headers)) for record in one]
    return found


def by_aiokafka(data: bytes, aborted: list[Any], first: int = 0) -> list[tuple[int, list[Any]]]:
    records = fetcher.PartitionRecords(
        TopicPartition("t", 0),
        fetcher.MemoryRecords(data),
        aborted,
        first,
        None,
        None,
        True,
        READ_COMMITTED,
    )
    found = [(record.offset, list(record.headers)) for record in records]
    assert records.next_fetch_offset == 6
    return found


WANTED = [("\ufffd\ufffd", b"1"), ("after", b"2")]


@pytest.mark.parametrize("codec", CODECS)
def test_a_name_that_is_not_utf_8_is_replaced(codec: int) -> None:
    data = batch(0, [GOOD, BAD, GOOD], codec) + batch(3, [BAD, GOOD, []], codec)
    expected = [(0, GOOD), (1, WANTED), (2, GOOD), (3, WANTED), (4, GOOD), (5, [])]
    assert by_kafka_python(data) == expected
    assert by_aiokafka(data, []) == expected
    assert by_aiokafka(data, [], first=2) == expected[2:]


def test_aborted_transactions_stay_aborted() -> None:
    data = batch(0, [GOOD], producer=8) + batch(1, [BAD, GOOD]) + batch(3, [GOOD], producer=8)
    data += batch(4, [BAD, GOOD])
    expected = [(1, WANTED), (2, GOOD), (4, WANTED), (5, GOOD)]
    assert by_aiokafka(data, [(8, 0)]) == expected


def test_other_batches_are_decoded_by_the_compiled_code() -> None:
    made = fetcher.MemoryRecords(batch(0, [GOOD])).next_batch()
    assert type(made).__module__.startswith("aiokafka.record._crecords")


# --- batches that cannot be decoded

AT = TopicPartition("t", 0)
Decode = Callable[..., tuple[list[Any], int]]


def taken_by_aiokafka(data: bytes, first: int = 0) -> tuple[list[Any], int]:
    """(what a consumer gets, the offset that it fetches next)"""
    records = fetcher.MemoryRecords(data)
    assert records.has_next()
    found = fetcher.PartitionRecords(AT, records, [], first, None, None, True, READ_COMMITTED)
    return list(found), found.next_fetch_offset


def taken_by_kafka_python(data: bytes, first: int = 0) -> tuple[list[Any], int]:
    import kafka.consumer.fetcher as fetcher

    records = fetcher.MemoryRecords(data)
    assert records.has_next()
    found = Fetcher.PartitionRecords(first, AT, records)
    taken = list(found.take(100))
    assert not found
    return taken, found.next_fetch_offset


def patched(data: bytes, at: int, new: bytes, *, checked: bool = False) -> bytes:
    """The batch with other bytes. checked: with a right checksum, as if its producer sent it so."""
    changed = bytearray(data)
    changed[at : at + len(new)] = new
    if checked:
        changed[17:21] = calc_crc32c(bytes(changed[21:])).to_bytes(4, "big")
    return bytes(changed)


def old(magic: int) -> bytes:
    """A batch of an old format, at offset 3."""
    builder = LegacyRecordBatchBuilder(magic=magic, compression_type=0, batch_size=10_000)
    builder.append(3, timestamp=7, key=b"key", value=b"value")
    return bytes(builder.build())


BROKEN = batch(3, [[], []])
AFTER = batch(9, [[]])
CASES = {
    "codec": (patched(BROKEN, 21, b"\x00\x07", checked=True), 4, "codec"),
    "checksum": (patched(BROKEN, 65, b"?"), 4, "checksum"),
    "records": (patched(BROKEN, 61, b"\x7f\x7f", checked=True), 4, "damaged"),
    "not compressed": (patched(BROKEN, 21, b"\x00\x01", checked=True), 4, "damaged"),
    "count": (patched(BROKEN, 57, b"\x00\x00\x00\x01", checked=True), 4, "damaged"),
    "length": (patched(BROKEN, 8, b"\x00\x01\x00\x00"), None, "damaged"),
    "negative length": (patched(BROKEN, 8, b"\xff\xff\xff\x00"), None, "damaged"),
    "short": (patched(BROKEN, 8, b"\x00\x00\x00\x05"), None, "damaged"),
    "last offset": (patched(BROKEN, 23, b"\x00\x00\x01\x00"), 8, "checksum"),
    "negative last": (patched(BROKEN, 23, b"\xff\xff\xff\x00"), None, "checksum"),
    "old": (old(0), None, "format"),
}


DECODE = pytest.mark.parametrize("decode", [taken_by_aiokafka, taken_by_kafka_python])


@DECODE
@pytest.mark.parametrize("case", CASES)
def test_a_batch_that_cannot_be_decoded_is_named(case: str, decode: Decode) -> None:
    broken, last, reason = CASES[case]
    taken, first = decode(broken + AFTER, 3)
    if first > 3:  # its checksum is right: what comes before the error is read
        assert [record.offset for record in taken] == list(range(3, first))
        taken, _ = decode(broken + AFTER, first)
    [bad] = taken
    assert isinstance(bad, UnreadableBatch)
    assert (bad.at, bad.first, bad.offset) == (f"t/0/{first}", first, first)
    assert (bad.last, bad.reason, bad.base) == (last, reason, 3)
    assert f"eddyline dead-letters skip t/0/{first}" in str(bad) and bad.detail
    if last is not None:
        assert bad.data == broken


@DECODE
@pytest.mark.parametrize("case", CASES)
def test_the_records_before_the_batch_are_read_first(case: str, decode: Decode) -> None:
    taken, position = decode(batch(0, [[], [], []]) + CASES[case][0] + AFTER, 1)
    assert [record.offset for record in taken][:2] == [1, 2]
    assert position == taken[-1].offset + 1 >= 3
    assert not any(isinstance(record, UnreadableBatch) for record in taken)


@DECODE
def test_a_batch_that_is_cut_is_named(decode: Decode) -> None:
    cut = patched(BROKEN, 8, b"\x00\x01\x00\x00")[:70]
    taken, position = decode(batch(0, [[]]) + cut, 0)
    assert [record.offset for record in taken] == [0] and position == 1
    [bad], position = decode(cut, 1)
    assert (bad.first, bad.last, bad.reason, position) == (3, None, "damaged", 1)
    [bad], position = decode(cut[:7], 1)
    assert (bad.first, bad.last, bad.reason, position) == (1, None, "damaged", 1)


@DECODE
def test_a_batch_that_compaction_emptied_is_not_meant(decode: Decode) -> None:
    empty = patched(batch(1, [[]])[:61], 57, bytes(4))
    empty = patched(empty, 8, (49).to_bytes(4, "big"), checked=True)
    taken, position = decode(empty + CASES["codec"][0], 1)
    if position > 1:
        taken, position = decode(CASES["codec"][0], position)
    [bad] = taken
    assert (bad.first, bad.last, bad.reason) == (3, 4, "codec")


@DECODE
def test_format_1_is_read(decode: Decode) -> None:
    taken, position = decode(old(1), 3)
    assert [(record.offset, record.timestamp) for record in taken] == [(3, 7)] and position == 4


@DECODE
def test_an_error_after_the_last_offset_of_a_batch_is_passed(decode: Decode) -> None:
    too_many = patched(BROKEN, 57, b"\x00\x00\x00\x07", checked=True)
    taken, position = decode(too_many + AFTER, 3)
    assert [record.offset for record in taken] == [3, 4] and position == 5


@DECODE
@pytest.mark.parametrize(
    ("code", "name"),
    [
        (-1, "UNKNOWN_SERVER_ERROR"),
        (2, "CORRUPT_MESSAGE"),
        (76, "UNSUPPORTED_COMPRESSION_TYPE"),
        (87, "INVALID_RECORD"),
    ],
)
def test_what_the_broker_cannot_read_is_a_batch(code: int, name: str, decode: Decode) -> None:
    [bad], position = decode(unreadable.of_broker(code), 7)
    assert (bad.first, bad.last, bad.reason, position) == (7, None, "broker", 7)
    assert name in str(bad)


def test_only_errors_of_this_kind_are_changed_in_aiokafkas_answers() -> None:
    class Client:
        cluster = "cluster"

        async def send(self, node_id: int, request: Any) -> Any:
            parts = [
                (0, 0, 9, 9, 0, [], b"records"),
                (1, 2, -1, -1, -1, None, b""),
                (2, 3, -1, b""),
            ]
            return SimpleNamespace(topics=[("t", parts)])

    answers = aiokafka_decoding._Answers(Client())
    assert answers.cluster == "cluster"
    request = FetchRequest(1, 1, 1, 0, [])
    [(_, parts)] = asyncio.run(answers.send(1, request)).topics
    assert parts[0] == (0, 0, 9, 9, 0, [], b"records") and parts[2] == (2, 3, -1, b"")
    assert parts[1] == (1, 0, -1, -1, -1, None, unreadable.of_broker(2))
