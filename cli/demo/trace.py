"""How long a click took to change an answer, by hop. Each process stamps its own hop.

kafka   produced by the producer → read by ingest, through the broker
ingest  read → written, by Redis' clock: decode, read the state, micro-step, write
wait    applied → the query worker has read the user, by polling or at the next call
tower   the user's vector computed
search  the recall paths
answer  fused, sent, and received by the caller
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

from serving.proto.retrieval_pb2 import RetrieveResponse

HOPS = ("kafka", "ingest", "wait", "tower", "search", "answer")


@dataclass(frozen=True)
class Trace:
    """Milliseconds by hop, and their sum."""

    hops: dict[str, float]

    @property
    def total_ms(self) -> float:
        """From the producer's stamp to the caller's."""
        return sum(self.hops.values())

    def __str__(self) -> str:
        """`visible in 38.0 ms (kafka 6.1 · ingest 3.2 · …)`."""
        parts = " · ".join(f"{hop} {ms:.1f}" for hop, ms in self.hops.items())
        return f"visible in {self.total_ms:.0f} ms ({parts})"


def trace(answer: RetrieveResponse, received_us: int | None = None) -> Trace:
    """The trace of the user's last click that the answer includes.

    received_us: when the caller got the answer, by its own clock; default: now
    """
    received_us = time.time_ns() // 1_000 if received_us is None else received_us
    user, worker = answer.freshness.user, answer.freshness.worker
    stamps = (
        user.produced_us,
        user.read_us,
        user.applied_us,
        worker.user_read_us,
        worker.embedded_us,
        worker.searched_us,
        received_us,
    )
    differences = (later - earlier for earlier, later in pairwise(stamps))
    return Trace({hop: us / 1_000 for hop, us in zip(HOPS, differences, strict=True)})
