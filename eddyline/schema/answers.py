"""Wire format of `answers`: answers of query workers to sampled users, as JSON.

A click that carries an answer's `impression_id` names the answer that led to it. Every answer has
such an id; only those of sampled users are recorded. Unknown fields are ignored: an older reader
accepts records of a newer worker.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from eddyline.errors import Rejected
from eddyline.schema.events import AtMs, Id, check_id, decode_json, quote

# What a record keeps of an answer, from the top. So a record with ids of the greatest length is
# smaller than 1 MiB, which is the most that Kafka accepts by default.
ITEMS_MAX = 500
CANDIDATES_MAX = 100
PATHS_MAX = 12
MISSING_MAX = 16
MISSING_CHARS_MAX = 200
# Decimals of a score.
SCORE_DIGITS = 6
# The caller's words for where an answer is shown, and for its arm of an experiment.
LABEL_BYTES_MAX = 64

_Offset = Annotated[int, Meta(ge=-1, le=2**63 - 1)]
_Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class AnsweredItem(msgspec.Struct, frozen=True, gc=False):
    """One item of an answer; its place in the list is its position.

    path, path_rank: the recall path that it comes from, and its rank there, from 1
    score:           comparable within one path only
    """

    item_id: Id
    path: str
    path_rank: _Count
    score: float


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """One candidate of a recall path; its place in the list is its rank."""

    item_id: Id
    score: float


class PathCandidates(msgspec.Struct, frozen=True):
    """What one recall path returned.

    found: how many candidates; taken: how many of them are in the answer
    items: the best `CANDIDATES_MAX` of them, best first
    """

    path: str
    found: _Count
    taken: _Count
    items: Annotated[list[Candidate], Meta(max_length=CANDIDATES_MAX)]


class RecordedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer to a sampled user.

    at_ms:       the worker's clock, milliseconds since 1970 UTC
    user_offset: offset in `clicks` of the last event that the answer knows of the user; -1: none
    scene, arm:  the caller's labels of the request; "" for none
    k:           how many items were requested
    session:     how many events of the visit the request had, which are not stored
    filtered:    whether the request had filters
    items:       the first `ITEMS_MAX` items, best first
    paths:       in the order in which they were called; at most `PATHS_MAX`
    missing:     what the answer had to do without, each `server: reason`
    """

    impression_id: Id
    user_id: Id
    at_ms: AtMs
    generation: str
    user_offset: _Offset = -1
    scene: str = ""
    arm: str = ""
    k: _Count
    session: _Count = 0
    filtered: bool = False
    popularity_beta: float = 0.0
    items: Annotated[list[AnsweredItem], Meta(max_length=ITEMS_MAX)]
    paths: Annotated[list[PathCandidates], Meta(max_length=PATHS_MAX)] = []
    missing: Annotated[list[str], Meta(max_length=MISSING_MAX)] = []


_decoder = msgspec.json.Decoder(RecordedAnswer)
_encoder = msgspec.json.Encoder()


def encode_answer(answer: RecordedAnswer) -> bytes:
    """The record's value: JSON, defaults included."""
    return _encoder.encode(answer)


def decode_answer(value: bytes | None, *, key: str | None) -> RecordedAnswer:
    """Decode a record of `answers`. The key must be the user id. Raises Rejected."""
    answer = decode_json(_decoder, value)
    check_id("user_id", answer.user_id)
    check_id("impression_id", answer.impression_id)
    if key != answer.user_id:
        raise Rejected(
            "wrong_key", "user_id", f"{quote(answer.user_id)} under the key {quote(key)}"
        )
    return answer
