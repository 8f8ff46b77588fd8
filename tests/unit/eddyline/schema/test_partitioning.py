"""The partition of a key equals that of other clients and of every earlier version."""

import pytest
from aiokafka.partitioner import murmur2 as aiokafka_murmur2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kafka.partitioner.default import murmur2 as kafka_python_murmur2

from eddyline.schema.partitioning import item_slot, murmur2, partition_of, user_slot

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The first seven are from Apache Kafka's own test of murmur2 (as signed integers there).
GOLDEN = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
    b"": 275646681,
    b"ana": 1401504040,
}


@pytest.mark.parametrize("data", GOLDEN)
def test_golden_values(data: bytes) -> None:
    assert murmur2(data) == GOLDEN[data] & 0xFFFFFFFF


@patient
@given(st.binary(max_size=300))
def test_agrees_with_both_python_clients(data: bytes) -> None:
    assert (
        murmur2(data)
        == kafka_python_murmur2(data) & 0xFFFFFFFF
        == aiokafka_murmur2(data) & 0xFFFFFFFF
    )


@patient
@given(st.text(max_size=40), st.integers(1, 4096))
def test_partition_is_in_range_and_java_compatible(key: str, partitions: int) -> None:
    partition = partition_of(key, partitions)
    assert 0 <= partition < partitions
    assert partition == (kafka_python_murmur2(key.encode()) & 0x7FFFFFFF) % partitions


def test_golden_partitions() -> None:
    assert [partition_of(key, 8) for key in ("ana", "ben", "1", "196", "josé", "日本")] == [
        0,
        5,
        7,
        0,
        5,
        3,
    ]


def test_keys_spread_evenly() -> None:
    counts = [0] * 8
    for number in range(8_000):
        counts[partition_of(f"user-{number}", 8)] += 1
    assert min(counts) > 850 and max(counts) < 1150


def test_slot_tags() -> None:
    assert user_slot(3) == "u3"
    assert {item_slot(str(n), 1) for n in range(50)} == {"i0"}
    assert {item_slot(str(n), 4) for n in range(50)} == {"i0", "i1", "i2", "i3"}
    assert item_slot("ana", 8) == f"i{partition_of('ana', 8)}"
