"""Records with header names that are not UTF-8 are read by both clients, and none is lost."""

from __future__ import annotations

from typing import Any

import aiokafka.consumer.fetcher as fetcher
import pytest
from aiokafka.consumer.fetcher import READ_COMMITTED
from aiokafka.structs import TopicPartition
from kafka.record import MemoryRecords
from kafka.record.default_records import DefaultRecordBatchBuilder

from eddyline.kafka import aiokafka_header_names, header_names
from tests.whole_records import RawName

CODECS = [0, 1]
BAD, GOOD = [(RawName(b"\xff\xfe"), b"1"), ("after", b"2")], [("named", b"3")]


@pytest.fixture(autouse=True)
def lenient() -> None:
    header_names.read_any_name()
    aiokafka_header_names.read_any_name()


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
