"""Whatever lies in a topic is applied, dropped as a re-send, or dead-lettered with its reason.

`make fuzz` goes on from here, guided by coverage.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from tests.fuzz.harness import Harness, mutated, seeds, towers


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(towers(tmp_path_factory.mktemp("fuzz")))


def test_good_records_of_every_kind_are_applied(harness: Harness) -> None:
    assert [harness.feed(*seed) for seed in seeds()] == ["applied"] * len(seeds())


@pytest.mark.parametrize("seed", range(8))
def test_damaged_records_end_somewhere(harness: Harness, seed: int) -> None:
    rng, ends = random.Random(seed), set()
    for _ in range(400):
        topic, key, value = rng.choice(seeds())
        if value is not None:
            value = mutated(rng, value)
        if rng.random() < 0.3 and key is not None:
            key = mutated(rng, key)
        ends.add(harness.feed(topic, key, value, rng.choice([None, b"", b"12", b"x", b"9" * 40])))
    assert {"applied", "rejected"} <= ends


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([CLICKS, ITEMS, USERS]),
    st.none() | st.binary(max_size=300),
    st.none() | st.binary(max_size=400),
)
@example(CLICKS, b"ana", b'{"user_id": "ana", "item_id": "\\ud800", "at_ms": 1}')
@example(CLICKS, b"ana", b'{"user_id": "a\\u0000", "item_id": "f", "at_ms": 1}')
@example(CLICKS, b"ana", b'{"user_id": "a\x7f", "item_id": "f", "at_ms": 1}')
@example(ITEMS, b"\xff", None)
@example(USERS, b"", None)
def test_any_bytes_end_somewhere(
    harness: Harness, topic: str, key: bytes | None, value: bytes | None
) -> None:
    assert harness.feed(topic, key, value) in ("applied", "rejected", "duplicate", "forwarded")


def test_the_harness_notices_a_record_that_gets_lost(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.outside, "put", lambda *_: None)
    with pytest.raises(AssertionError):
        harness.feed(CLICKS, b"ana", b"{")
