"""Reads the cards of an answer's items from a Redis that may be away in part."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from eddyline.errors import EddylineError
from eddyline.schema.events import Item
from eddyline.schema.partitioning import item_slot
from eddyline.stores.state_store import ItemMetadata, StateStore
from serving.answer.deadline import Deadline
from serving.answer.outages import Outages

_decoder = msgspec.json.Decoder(Item)


class CardReader:
    """Reads stored items. Thread rule: any thread."""

    def __init__(self, store: StateStore, item_slots: int, outages: Outages) -> None:
        self._store = store
        self._item_slots = item_slots
        self._outages = outages

    def read(
        self, item_ids: Sequence[str], deadline: Deadline
    ) -> tuple[dict[str, Item], list[str]]:
        """(item id -> metadata, what is missing, each `server: reason`).

        One round trip to each server; a server that is away costs the cards of its items alone.
        """
        cards: dict[str, Item] = {}
        stored, unread = self.stored(item_ids, deadline)
        missing = [f"redis: no cards: {why}" for why in dict.fromkeys(unread.values())]
        if unusable := _decode(stored, cards):
            which = f"{len(unusable)} cards cannot be read, such as {unusable[0]!r}"
            missing.append(f"redis: {which}")
        return cards, missing

    def stored(
        self, item_ids: Sequence[str], deadline: Deadline
    ) -> tuple[dict[str, ItemMetadata], dict[str, str]]:
        """(item id -> what is stored of it, item id -> why it could not be read).

        An item that is in neither is unknown to Redis, or the deadline has passed.
        """
        found: dict[str, ItemMetadata] = {}
        unread: dict[str, str] = {}
        for ids in self._by_server(item_ids):
            if deadline.left_s() <= 0:
                break
            try:
                with self._outages.guard({item_slot(i, self._item_slots) for i in ids}):
                    found |= self._store.read_item_metadata(ids, self._item_slots)
            except EddylineError as error:
                unread |= dict.fromkeys(ids, str(error))
        return found, unread

    def _by_server(self, item_ids: Sequence[str]) -> list[list[str]]:
        found: dict[str, list[str]] = {}
        for item_id in item_ids:
            server = self._store.server_of(item_slot(item_id, self._item_slots))
            found.setdefault(server, []).append(item_id)
        return list(found.values())


def _decode(stored: dict[str, ItemMetadata], cards: dict[str, Item]) -> list[str]:
    """Add to `cards` what can be decoded; deleted items have none. Returns the other ids."""
    unusable = []
    for item_id, card in stored.items():
        try:
            if card.body:
                cards[item_id] = _decoder.decode(card.body)
        except msgspec.MsgspecError:
            unusable.append(item_id)
    return unusable
