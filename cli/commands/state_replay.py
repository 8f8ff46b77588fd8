"""`eddyline replay --into`: the hash of the state that a slice of Kafka's topics gives."""

from __future__ import annotations

from cli.console import console
from eddyline.settings.loader import Settings
from streams.operations import state_replay


def replay(settings: Settings, *, begin: str, end: str, into: str, batch: int) -> None:
    """Replay the slice and print its counts and hash. Raises as `state_replay.run`."""
    result = state_replay.run(settings, begin=begin, end=end, into=into, batch=batch)
    for name, outcome in result.outcomes.items():
        counts = (f"{value:,} {what}" for what, value in outcome.counts().items() if value)
        console.print(f"{name}: {', '.join(counts) or 'nothing'}")
    console.print(f"state {result.hash}")
