"""All uses of private members of aiokafka's consumer, for every reader.

aiokafka is pinned; `tests/unit/eddyline/test_aiokafka_internals.py` fails where a member changes.
ADR 18 gives the reason of each use. `consumer` is an `AIOKafkaConsumer`; nothing here imports
aiokafka.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

AIOKAFKA_VERSION = "0.14.0"


def fetching_ended(consumer: Any) -> bool:
    """Whether the fetches ended for good: an error inside aiokafka, or a stop. Any thread.

    `getmany` returns no records from then on and raises nothing. False before the start.
    """
    fetcher = consumer._fetcher
    return fetcher is not None and fetcher.error_future.done()


def check_group(consumer: Any) -> None:
    """Raise the KafkaError that ended the work in the consumer group, if any.

    `getmany` raises it too, but a consumer without partitions does not call it. Thread rule: the
    consumer's loop.
    """
    if consumer._coordinator is not None:
        consumer._coordinator.check_errors()


def leave_at_stop(consumer: Any) -> None:
    """Let the consumer's `stop` leave the group. A static member does not: it would come back.

    Thread rule: the consumer's loop.
    """
    if consumer._coordinator is not None:
        consumer._coordinator._group_instance_id = None


async def committed(consumer: Any, partitions: Sequence[Any]) -> dict[Any, int]:
    """The offsets that the group has committed, in one request; partitions without one are absent.

    Raises KafkaError. Thread rule: the consumer's loop.
    """
    found = await consumer._coordinator.fetch_committed_offsets(partitions)
    return {at: stored.offset for at, stored in found.items() if stored.offset >= 0}


def positions(consumer: Any) -> dict[Any, int]:
    """The offset that is read next, of each assigned partition that has one.

    `AIOKafkaConsumer.position` waits for a position and for the partition. Thread rule: the
    consumer's loop.
    """
    subscription = consumer._subscription.subscription
    assignment = None if subscription is None else subscription.assignment
    if assignment is None:
        return {}
    states = {at: assignment.state_value(at) for at in assignment.tps}
    return {
        at: state.position
        for at, state in states.items()
        if state is not None and state.has_valid_position
    }


class FetchGate:
    """Holds back the next fetch of a started consumer. Thread rule: the loop of the consumer."""

    def __init__(self, consumer: Any) -> None:
        self._fetcher = consumer._fetcher
        self._held = False
        self._actions = self._fetcher._get_actions_per_node
        self._fetcher._get_actions_per_node = self._gated

    def hold(self) -> None:
        """Send no fetch from here on; call it in the step that takes records."""
        self._held = True

    def open(self) -> None:
        """Fetch."""
        if self._held:
            self._held = False
            self._fetcher._notify(self._fetcher._wait_consume_future)

    def _gated(self, assignment: Any) -> tuple[Any, ...]:
        requests, *others = self._actions(assignment)
        return ([] if self._held else requests, *others)
