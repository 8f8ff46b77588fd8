"""The slot map of a cluster, and the hash slot of a command."""

from __future__ import annotations

import pytest
from redis import exceptions

from eddyline.stores.cluster_slots import named, parse_slots, slot_of

A, B, C = ("a", 1), ("b", 2), ("c", 3)
ROWS = [[0, 8_191, [b"a", 1, b"id"], [b"c", 3, b"id"]], [8_192, 16_383, [b"b", 2, b"id"]]]


def test_the_map_names_every_slot() -> None:
    found = parse_slots(ROWS, A)
    assert [found.owner(slot) for slot in (0, 8_191, 8_192, 16_383)] == [A, A, B, B]
    assert (found.primaries, found.replicas, found.uncovered) == ((A, B), (C,), 0)
    part = parse_slots([[1, 1, [b"?", 5, b"id"]], [3, 4, [None, 6, b"id"]]], ("here", 9))
    assert part.primaries == (("here", 5), ("here", 6)) and part.uncovered == 16_381
    with pytest.raises(exceptions.ClusterDownError, match="hash slot 2 is served by no node"):
        part.owner(2)
    assert named(("::1", 3)) == "[::1]:3"


def test_a_key_is_found_in_every_command_that_is_used() -> None:
    slot = slot_of(("GET", "ns:{u3}:h:ana"))
    for args in (
        ("MGET", "fence:{u3}:clicks:3", "x"),
        ("EVAL", "text", 2, b"{u3}", "{u3}b"),
        ("set", "{u3}"),
    ):
        assert slot_of(args) == slot
    assert [slot_of((name,)) for name in ("INFO", "ping", "CLUSTER SLOTS")] == [None] * 3
