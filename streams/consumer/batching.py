"""What a fetch brings, and how it goes on: chunks of one partition each, and the hauls that they go in.

Pure: nothing here knows a consumer. See `streams/consumer/consumer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from faust.types import TP

from streams.ports import Record


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive records of one partition, as they were read after one seek.

    read_us: when they were taken from the fetcher, microseconds since 1970
    """

    at: TP
    records: Sequence[Record]
    epoch: int
    read_us: int


# Chunks of one topic from one fetch; together no more records than one chunk may have, or one chunk.
Haul = tuple[Chunk, ...]
# By partition: the epoch of the records, and the records.
Fetched = Mapping[Any, tuple[int, Sequence[Record]]]


def split_fetched(
    fetched: Fetched, size: int, part_max: Mapping[str, int], read_us: int
) -> Iterator[list[Chunk]]:
    """What was fetched, by topic and in chunks of at most `size` records, small ones together.

    In turns, so that no partition waits for all of another.
    part_max: topic -> the most records of a chunk of it, where that is less than `size`
    """
    chunks = []
    for at, (epoch, records) in fetched.items():
        most = min(size, part_max.get(at[0], size))
        chunks += [
            (start, at[0], Chunk(TP(*at), records[start : start + most], epoch, read_us))
            for start in range(0, len(records), most)
        ]
    chunks.sort(key=lambda each: each[:2])
    haul: list[Chunk] = []
    room = size
    for _, topic, chunk in chunks:
        if haul and (len(chunk.records) > room or haul[0].at.topic != topic):
            yield haul
            haul, room = [], size
        haul.append(chunk)
        room -= len(chunk.records)
    if haul:
        yield haul
