"""Records of another system in `clicks`: how the load makes them, and what they mean, by hand.

`clicks.toml` says the same to the product. Nothing of the product's maps is used here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

MAP = Path(__file__).parent / "clicks.toml"
# The mark of a record in Eddyline's own format.
OWN: tuple[str, bytes] = ("eddyline_format", b"1")
# Action -> (kind, weight); None: no event.
ACTIONS: dict[str, tuple[str, float] | None] = {
    "opened": ("click", 1.0),
    "seen": ("view", 1.0),
    "bought": ("purchase", 2.0),
    "hovered": None,
}
_ZONE = timezone(timedelta(hours=2))


class Foreign(NamedTuple):
    """One record of the other system."""

    user: str
    item: str
    action: str
    at_ms: int
    event_id: str | None
    visits: bool

    def value(self) -> bytes:
        """The record's value."""
        at = datetime.fromtimestamp(self.at_ms // 1_000, _ZONE)
        doc: dict[str, Any] = {
            "product": {"sku": self.item, "price": 3.5},
            "action": self.action,
            "ts": at.replace(microsecond=self.at_ms % 1_000 * 1_000).isoformat(),
        }
        doc |= {"visitor": self.user} if self.visits else {"account": {"id": self.user}}
        if self.event_id is not None:
            doc["id"] = self.event_id
        return json.dumps(doc).encode()


def in_own_format(value: bytes | None, headers: Sequence[tuple[str, Any]]) -> bytes | None:
    """The value in Eddyline's own format; None where the record has no event."""
    if any(name == OWN[0] for name, _ in headers):
        return value
    doc = json.loads(value or b"")
    meant = ACTIONS[doc["action"]]
    if meant is None:
        return None
    account = doc.get("account") or {}
    found: dict[str, Any] = {
        "user_id": account.get("id") or doc["visitor"],
        "item_id": doc["product"]["sku"],
        "at_ms": round(datetime.fromisoformat(doc["ts"]).timestamp() * 1_000),
        "kind": meant[0],
        "weight": meant[1],
    }
    if "id" in doc:
        found["event_id"] = doc["id"]
    return json.dumps(found).encode()
