"""Batches in the broker's files that no client can read, as of a damaged disk or a foreign codec.

They are damaged between their append and the commit of their transaction: no reader has seen them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kafka.record.util import calc_crc32c

from eddyline.kafka import producers
from eddyline.settings.loader import Settings

OVERHEAD = 12


def codec(batch: bytearray) -> None:
    """Compressed by a codec that nobody knows; the checksum is right."""
    batch[22] |= 7
    batch[17:21] = calc_crc32c(bytes(batch[21:])).to_bytes(4, "big")


def checksum(batch: bytearray) -> None:
    """A flipped bit in the last record."""
    batch[-2] ^= 1


def old_format(batch: bytearray) -> None:
    """Its head names the message format 0, in which the broker has no look inside."""
    batch[16], batch[17] = 0, 0


def old_compressed(batch: bytearray) -> None:
    """Its head names format 0 and gzip: the broker fails to read what is no gzip."""
    batch[16], batch[17] = 0, 1


def length(batch: bytearray) -> None:
    """The head says that the batch is longer than it is."""
    batch[8:12] = (2 * len(batch)).to_bytes(4, "big")


def segment(data_dir: Path, topic: str, partition: int) -> Path:
    """The file of a partition's records; the broker runs on this machine."""
    [found] = data_dir.glob(f"**/{topic}-{partition}/00000000000000000000.log")
    return found


def damage(path: Path, offset: int, change: Callable[[bytearray], None]) -> None:
    """Change the batch with this first offset, in the file."""
    with path.open("r+b") as file:
        data, at = file.read(), 0
        while (end := at + OVERHEAD + int.from_bytes(data[at + 8 : at + 12], "big")) <= len(data):
            if int.from_bytes(data[at : at + 8], "big") == offset:
                batch = bytearray(data[at:end])
                change(batch)
                file.seek(at)
                file.write(batch)
                return
            at = end
    raise AssertionError(f"{path} has no batch at {offset}")


def append(
    settings: Settings,
    data_dir: Path,
    wanted: Sequence[tuple[str, int, Sequence[tuple[bytes, bytes | None]], Callable[..., None]]],
) -> list[str]:
    """Append one unreadable batch each.

    wanted: (topic without prefix, partition, (key, value) of its records, what damages it)
    Returns the coordinates of the batches.
    """
    producer: Any = producers.make_producer(
        settings, transactional_id=f"{settings.namespace}-broken", linger_ms=500
    )
    try:
        producers.in_time(settings, producer.init_transactions)
        producer.begin_transaction()
        found = []
        for name, partition, records, change in wanted:
            topic = settings.prefixed(name)
            sent = [producer.send(topic, v, key=k, partition=partition) for k, v in records]
            producer.flush(timeout=20)
            offsets = [future.get(timeout=20).offset for future in sent]
            damage(segment(data_dir, topic, partition), offsets[0], change)
            found.append(f"{topic}/{partition}/{offsets[0]}")
        producers.in_time(settings, producer.commit_transaction)
        return found
    finally:
        producer.close(timeout=5)
