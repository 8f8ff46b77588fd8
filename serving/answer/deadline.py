"""The time that a call has left, checked before each of its steps."""

from __future__ import annotations

import time

from eddyline.errors import EddylineError

# gRPC gives a call without a deadline one that lies decades ahead.
NO_DEADLINE_S = 1e8


class EndsQuery(Exception):
    """Concerns the whole query: neither a recall path nor a fusion may go on after it."""


class DeadlinePassed(EddylineError, EndsQuery):
    """The deadline of the call passed; the message says before which step."""


class Deadline:
    """A point in time that a call must be answered by."""

    def __init__(self, seconds: float) -> None:
        """seconds: from now; a deadline of 0 or less has passed."""
        self._seconds = seconds
        self._at = time.monotonic() + seconds

    @classmethod
    def of_call(cls, remaining_s: float | None, default_ms: int) -> Deadline:
        """The caller's deadline, or `default_ms` if the call has none."""
        has_none = remaining_s is None or remaining_s >= NO_DEADLINE_S
        return cls(default_ms / 1000 if has_none or remaining_s is None else remaining_s)

    def left_s(self) -> float:
        """Seconds left; negative if the deadline has passed."""
        return self._at - time.monotonic()

    def half_passed(self) -> bool:
        """Whether less than half of the time is left."""
        return self.left_s() < self._seconds / 2

    def check(self, step: str) -> None:
        """Raise DeadlinePassed if the deadline passed before this step."""
        if self.left_s() <= 0:
            given_ms = max(0.0, self._seconds) * 1000
            raise DeadlinePassed(f"the deadline passed before {step}; {given_ms:.0f} ms were given")
