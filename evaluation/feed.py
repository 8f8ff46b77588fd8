"""A log that is applied to a product, moment by moment."""

from __future__ import annotations

from bisect import bisect_left

from evaluation.event_log import EventLog
from evaluation.product import Product


class Feed:
    """Applies events, and the items and profiles from before them. Thread rule: one thread."""

    def __init__(self, log: EventLog, product: Product) -> None:
        self._log, self._product = log, product
        self._item_times = [item.at_ms for item in log.changes]
        self._profile_times = [profile.at_ms for profile in log.profiles]
        self._changed = self._profiled = 0

    def changes_items(self, now_ms: int) -> bool:
        """Whether `advance` is going to change items."""
        return bisect_left(self._item_times, now_ms) > self._changed

    def advance(self, now_ms: int) -> None:
        """Apply items and profiles from strictly before."""
        log = self._log
        if (end := bisect_left(self._item_times, now_ms)) > self._changed:
            self._product.apply_items(log.changes[self._changed : end])
            self._changed = end
        if (end := bisect_left(self._profile_times, now_ms)) > self._profiled:
            self._product.apply_profiles(log.profiles[self._profiled : end])
            self._profiled = end

    def apply(self, begin: int, end: int) -> None:
        """Apply events."""
        self._product.apply_events([self._log.click(number) for number in range(begin, end)])
