"""What the comparison with the second model allows, and what it does not."""

import json
from typing import Any

from tests.model import comparison
from tests.model.model import State
from tests.model.reading import Raw

FORGET = {
    "user_id": "g",
    "forget_until_ms": 900,
    "keep_after_ms": 2_000,
    "users_offset": 1,
    "ends_ms": 9_000,
}


def record(offset: int, doc: dict[str, Any], **headers: str) -> Raw:
    found = tuple((name, text.encode()) for name, text in headers.items())
    value = json.dumps(doc).encode()
    return Raw("clicks", 0, offset, 1_000 + offset, doc["user_id"].encode(), value, found)


def differences(*, clicked: bool, forgotten: bool) -> list[str]:
    """Of a merge that moved an entry which the model does not expect."""
    late = {"user_id": "g", "item_id": "late", "at_ms": 500, "kind": "click"}
    moved = {**late, "user_id": "s", "event_id": "merge/0/1/0", "context": {"eddyline.moved": True}}
    log = [
        *([record(0, late)] if clicked else []),
        record(1, {"user_id": "g", "merge_into": "s", "at_ms": 600}),
        *([record(2, FORGET)] if forgotten else []),
        record(3, moved, origin="clicks/0/1", origin_ms="1001"),
    ]
    return comparison.sent_differences({0: log}, State())


def test_a_merge_before_a_forget_may_move_what_a_whole_list_had_no_room_for() -> None:
    assert differences(clicked=True, forgotten=True) == []


def test_a_merge_moves_nothing_else_without_a_reason() -> None:
    for clicked, forgotten in ((True, False), (False, True), (False, False)):
        [found] = differences(clicked=clicked, forgotten=forgotten)
        assert found.startswith("forwarded without a reason") and "late" in found
