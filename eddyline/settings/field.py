"""How a setting is declared: `name: Annotated[type, about(text, low, high)] = default`."""

from __future__ import annotations

from typing import Any

from msgspec import Meta


def about(text: str, low: float | None = None, high: float | None = None, **limits: Any) -> Meta:
    """What a setting does, the limits of a number, both included, and those of a text.

    limits: `pattern`, `min_length`, `max_length` of a text
    """
    return Meta(description=text, ge=low, le=high, **limits)
