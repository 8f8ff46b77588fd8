"""Impressions: an id for every answer, and a queue of the answers to sampled users.

A query only appends to the queue; `serving.answer.impression_sender` sends it to the topic
`answers`. ADR 34 has the reasons.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from eddyline.schema.answers import (
    CANDIDATES_MAX,
    ITEMS_MAX,
    MISSING_CHARS_MAX,
    MISSING_MAX,
    PATHS_MAX,
    SCORE_DIGITS,
    AnsweredItem,
    Candidate,
    PathCandidates,
    RecordedAnswer,
)
from eddyline.schema.user_sample import is_sampled
from index.port import Hit
from serving.answer.fusion import Recommendation
from serving.answer.retriever import Answer, NearestQuery, Query

# The queue is limited by what it holds: 100,000 items and candidates take about 20 MB. An answer
# with ten items has 11 to 31 entries.
QUEUE_ENTRIES_MAX = 100_000


class ImpressionCounts(NamedTuple):
    """Answers to sampled users since the start.

    sent: Kafka has them; dropped: the queue was full, or the process ended; failed: Kafka did not
    confirm them
    """

    sent: int
    dropped: int
    failed: int


class _PathHits(NamedTuple):
    """The best candidates of a recall path; found and taken: see `PathCandidates`."""

    path: str
    found: int
    taken: int
    hits: Sequence[Hit]


class QueuedAnswer(NamedTuple):
    """What is kept of an answer until it is encoded; see `RecordedAnswer`. entries: its size."""

    impression_id: str
    user_id: str
    at_ms: int
    generation: str
    user_offset: int
    scene: str
    arm: str
    k: int
    session: int
    filtered: bool
    popularity_beta: float
    items: Sequence[Recommendation]
    paths: Sequence[_PathHits]
    missing: Sequence[str]
    entries: int

    def recorded(self) -> RecordedAnswer:
        """The record."""
        return RecordedAnswer(
            impression_id=self.impression_id,
            user_id=self.user_id,
            at_ms=self.at_ms,
            generation=self.generation,
            user_offset=self.user_offset,
            scene=self.scene,
            arm=self.arm,
            k=self.k,
            session=self.session,
            filtered=self.filtered,
            popularity_beta=self.popularity_beta,
            items=[
                AnsweredItem(
                    one.hit.item_id, one.path, one.path_rank, round(one.hit.score, SCORE_DIGITS)
                )
                for one in self.items
            ],
            paths=[
                PathCandidates(
                    path,
                    found,
                    taken,
                    [Candidate(hit.item_id, round(hit.score, SCORE_DIGITS)) for hit in hits],
                )
                for path, found, taken, hits in self.paths
            ],
            missing=[reason[:MISSING_CHARS_MAX] for reason in self.missing],
        )


class Impressions:
    """The impressions of one process. Thread rule: any thread.

    Make it after the process was forked: two processes with one prefix would give equal ids.
    """

    def __init__(self, share: float) -> None:
        """share: of the users whose answers are queued, 0 … 1."""
        self._share = share
        # 96 random bits: unique among processes and their restarts.
        self._prefix = secrets.token_urlsafe(12)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._queue: deque[QueuedAnswer] = deque()
        self._entries = 0
        self._sent = self._dropped = self._failed = 0

    @property
    def share(self) -> float:
        """Of the users whose answers are queued."""
        return self._share

    def next_id(self) -> str:
        """The id of an answer that is made now."""
        return f"{self._prefix}.{next(self._numbers):x}"

    def record(
        self,
        query: Query | NearestQuery,
        answer: Answer,
        generation: str,
        missing: Sequence[str] = (),
        impression_id: str = "",
    ) -> str:
        """The id of this answer; the answer is queued if it has a user who is sampled. Never waits.

        missing: what the answer had to do without, as the response has it
        impression_id: from `next_id`; "": it gets one
        """
        impression_id = impression_id or self.next_id()
        if not self._share or not isinstance(query, Query) or not query.user_id:
            return impression_id
        if is_sampled(query.user_id, self._share):
            self._put(_queued(impression_id, query, answer, generation, missing))
        return impression_id

    def take(self, most: int) -> list[QueuedAnswer]:
        """The oldest answers of the queue, at most so many; they leave it."""
        with self._lock:
            taken = [self._queue.popleft() for _ in range(min(most, len(self._queue)))]
            self._entries -= sum(answer.entries for answer in taken)
        return taken

    def drop_all(self) -> int:
        """Empty the queue; how many answers were in it."""
        with self._lock:
            dropped = len(self._queue)
            self._queue.clear()
            self._entries = 0
            self._dropped += dropped
        return dropped

    def count(self, *, sent: int, failed: int) -> None:
        """Count what became of answers that were taken."""
        with self._lock:
            self._sent += sent
            self._failed += failed

    def counts(self) -> ImpressionCounts:
        """The counters now."""
        with self._lock:
            return ImpressionCounts(self._sent, self._dropped, self._failed)

    def _put(self, answer: QueuedAnswer) -> None:
        with self._lock:
            if self._entries + answer.entries > QUEUE_ENTRIES_MAX:
                self._dropped += 1
            else:
                self._entries += answer.entries
                self._queue.append(answer)


def _queued(
    impression_id: str, query: Query, answer: Answer, generation: str, missing: Sequence[str]
) -> QueuedAnswer:
    """What is kept of the answer. Copies lists up to the record's limits, and no candidate."""
    items = answer.items[:ITEMS_MAX]
    paths = [
        _PathHits(
            one.path, len(one.candidates.hits), one.taken, one.candidates.hits[:CANDIDATES_MAX]
        )
        for one in answer.paths[:PATHS_MAX]
    ]
    return QueuedAnswer(
        impression_id,
        query.user_id,
        answer.stamps.answered_us // 1000,
        generation,
        -1 if answer.user is None else answer.user.history.offset,
        query.scene,
        query.arm or answer.arm,
        query.k,
        len(query.session),
        query.filters is not None,
        query.popularity_beta,
        items,
        paths,
        list(missing[:MISSING_MAX]),
        1 + len(items) + sum(len(path.hits) for path in paths),
    )
