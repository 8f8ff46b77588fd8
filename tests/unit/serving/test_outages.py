"""What of Redis is away: a server with all its slots, or one slot of it."""

from __future__ import annotations

from typing import Any

import pytest

from eddyline.errors import SlotUnavailable, StoreUnavailable
from eddyline.stores.memory import MemoryStore
from serving.answer import outages as module
from serving.answer.outages import Outages


class OneServer(MemoryStore):
    """Slots u1 and u2 are on one server, u3 on another."""

    def server_of(self, slot: str) -> str:
        return "b" if slot == "u3" else "a"


@pytest.mark.parametrize(
    ("error", "away"), [(SlotUnavailable, {"u1"}), (StoreUnavailable, {"u1", "u2"})]
)
def test_only_what_does_not_answer_is_left_out(
    monkeypatch: pytest.MonkeyPatch, error: Any, away: set[str]
) -> None:
    monkeypatch.setattr(module, "PROBE_S", 60.0)
    outages = Outages(OneServer())

    def call(slot: str, fails: bool = False) -> bool:
        """Whether the call was made."""
        made = False
        try:
            with outages.guard([slot]):
                made = True
                if fails:
                    raise error("it is away")
        except StoreUnavailable:
            pass
        return made

    assert call("u1", fails=True)
    assert {slot for slot in ("u1", "u2", "u3") if not call(slot)} == away
