"""Reads one user in one round trip from a Redis that may be away."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from eddyline.errors import EddylineError, StoreUnavailable
from eddyline.schema.partitioning import partition_of, user_slot
from eddyline.stores.state_store import LogId, StateStore, UserPlace, UserState
from serving.answer.outages import Outages


@dataclass(frozen=True, slots=True)
class AfterToken:
    """The click that the answer must include, by its coordinates.

    wait_ms: how long to wait for it from now
    waited_ms, why: how long the call has waited, and why it stopped; "" if it may have been applied
    """

    partition: int
    offset: int
    wait_ms: int
    waited_ms: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True)
class AfterStatus:
    """Whether the answer includes the click; if not, why."""

    applied: bool
    waited_ms: int
    why: str


class UserReader:
    """Reads users with their embeddings of one generation. Thread rule: any thread.

    generation: of the embeddings
    outages: what of Redis is away; shared with the other readers of a query
    """

    def __init__(
        self,
        store: StateStore,
        *,
        clicks_partitions: int,
        generation: str,
        log: LogId | None = None,
    ) -> None:
        """clicks_partitions: of the topic; a user's slot follows from it.

        log: the log that tokens belong to; state of another log lacks their clicks. None: unchecked
        """
        self._store = store
        self._log = log
        self._partitions = clicks_partitions
        self.generation = generation
        self.outages = Outages(store)

    def partition_of(self, user_id: str) -> int:
        """The partition of `clicks` that holds this user's events."""
        return partition_of(user_id, self._partitions)

    def read(self, user_id: str) -> UserState:
        """What a query needs of this user.

        Raises StoreUnavailable; at once if the server or the slot of this user is away.
        """
        partition = self.partition_of(user_id)
        slot = user_slot(partition)
        try:
            with self.outages.guard([slot]):
                return self._store.read_user(slot, partition, user_id, self.generation)
        except StoreUnavailable:
            raise
        except (EddylineError, msgspec.MsgspecError) as error:
            raise StoreUnavailable(f"the user's state cannot be used: {error}") from None

    def read_many(self, user_ids: Iterable[str]) -> dict[str, UserState | StoreUnavailable]:
        """As `read` of each of these users, or what it raises; one round trip to each server."""
        by_server: dict[str, list[UserPlace]] = {}
        for user_id in dict.fromkeys(user_ids):
            partition = self.partition_of(user_id)
            place = UserPlace(user_slot(partition), partition, user_id)
            by_server.setdefault(self._store.server_of(place.slot), []).append(place)
        found: dict[str, UserState | StoreUnavailable] = {}
        for places in by_server.values():
            try:
                with self.outages.guard({place.slot for place in places}):
                    states = self._store.read_users(places, self.generation)
            except (EddylineError, msgspec.MsgspecError):
                # A slot that is away, or a user whose state is damaged, costs that one alone.
                found |= {place.user_id: self._one(place.user_id) for place in places}
            else:
                found |= {p.user_id: state for p, state in zip(places, states, strict=True)}
        return found

    def _one(self, user_id: str) -> UserState | StoreUnavailable:
        try:
            return self.read(user_id)
        except StoreUnavailable as error:
            return error

    def of_other_log(self, state: UserState) -> bool:
        """Whether the state was written for another log than that of the tokens."""
        return state.fence is not None and self._log not in (None, state.fence.log)

    def why_not_applied(self, state: UserState, after: AfterToken) -> str:
        """Why the state does not include the click; "" if it does."""
        if self.of_other_log(state):
            return "the state was written for another log of clicks; see `eddyline accept-log`"
        reached = -1 if state.fence is None else state.fence.offset
        if reached >= after.offset:
            return ""
        applied = f"partition {after.partition} is applied up to offset {reached}"
        return f"{applied}, not {after.offset}"
