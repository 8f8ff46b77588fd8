"""What the comparison with the second model allows, and what it does not."""

import json
from typing import Any

from tests.model import comparison
from tests.model.model import Sent, State
from tests.model.reading import Raw
from tests.model.rules import known_fields

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


def moved(item_id: str) -> dict[str, Any]:
    fields = {"user_id": "s", "item_id": item_id, "at_ms": 500, "kind": "click"}
    return {**fields, "event_id": "merge/0/1/0", "context": {"eddyline.moved": True}}


def own(raw: Raw) -> Raw | None:
    """A record of another system in Eddyline's own format, which it wraps."""
    doc = json.loads(raw.value or b"")
    return raw._replace(value=json.dumps(doc["wrapped"]).encode()) if "wrapped" in doc else raw


def differences(
    *, clicked: bool = True, forgotten: bool = True, entries: int = 1, wrapped: bool = False
) -> list[str]:
    """Of a merge that moved the entry "late", where the model expects others.

    entries: that the model expects; wrapped: the click is a record of another system
    """
    late = {"user_id": "g", "item_id": "late", "at_ms": 500, "kind": "click"}
    click = record(0, late)
    if wrapped:
        click = click._replace(value=json.dumps({"wrapped": late}).encode())
    log = [
        *([click] if clicked else []),
        record(1, {"user_id": "g", "merge_into": "s", "at_ms": 600}),
        *([record(2, FORGET)] if forgotten else []),
        record(3, moved("late"), origin="clicks/0/1", origin_ms="1001"),
    ]
    expected = {
        Sent(0, "s", known_fields(moved(f"newer {n}")), "clicks/0/1", 1_001) for n in range(entries)
    }
    return comparison.sent_differences({0: log}, State(forwarded=expected), own_of=own)


def test_a_merge_before_a_forget_may_move_what_a_longer_list_had_no_room_for() -> None:
    assert differences() == differences(entries=30) == []
    assert differences(wrapped=True) == []


def test_a_merge_moves_nothing_else_without_a_reason() -> None:
    for found in (
        differences(clicked=False),
        differences(forgotten=False),
        differences(clicked=False, forgotten=False),
        differences(entries=0),
    ):
        assert any(
            line.startswith("forwarded without a reason") and "late" in line for line in found
        )
