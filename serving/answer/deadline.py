"""The time a call has left, looked at before each of its steps."""

from __future__ import annotations

import time

from eddyline.errors import EddylineError

# A call without a deadline shows up with one that lies decades ahead.
NO_DEADLINE_S = 1e8


class DeadlinePassed(EddylineError):
    """The deadline of the call passed; the message says before which step."""


class Deadline:
    """A point in time that a call must be answered by."""

    def __init__(self, seconds: float) -> None:
        """seconds: from now on; 0 or less has passed already."""
        self._seconds = seconds
        self._at = time.monotonic() + seconds

    @classmethod
    def of_call(cls, remaining_s: float | None, default_ms: int) -> Deadline:
        """The caller's own deadline, or `default_ms` where he brought none."""
        given = remaining_s is not None and remaining_s < NO_DEADLINE_S
        return cls(remaining_s if given and remaining_s is not None else default_ms / 1000)

    def left_s(self) -> float:
        """Seconds left, below 0 where it has passed."""
        return self._at - time.monotonic()

    def check(self, step: str) -> None:
        """Raise DeadlinePassed where it has passed before this step."""
        if self.left_s() <= 0:
            given = f"{max(0.0, self._seconds) * 1000:.0f} ms were given"
            raise DeadlinePassed(f"the deadline passed before {step}; {given}")
