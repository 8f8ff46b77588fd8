"""One batch of `items`: its changes are decided one after the other, in the order of the log."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import msgspec

from eddyline.errors import FenceMoved, Rejected, Unavailable
from eddyline.schema import item_changes
from eddyline.schema.events import Item, ItemPatch
from eddyline.stores.state_store import ItemMetadata
from streams.items.metadata import ItemChange
from streams.items.order import KeyOrder
from streams.ports import Outcome, PartitionLost, RecordBatch

# (position in `ItemBatch.decoded`, the item after this change) -> why no generation places it.
Place = Callable[[int, Item | None], Rejected | None]


@dataclass(frozen=True, slots=True)
class Rules:
    """What `ItemBatch.decide` does by the settings.

    hide:    an item with a newer refused record is in no answer
    restore: what an item has is appended again after a record that says less
    emptied: a record that would empty title or categories is refused
    """

    hide: bool
    restore: bool
    emptied: bool


@dataclass(slots=True)
class ItemBatch:
    """One batch while it is applied.

    decoded:     all changes, in the order of the log, each with its item id
    applied:     up to this offset the metadata has all changes
    stored:      what items had before the batch, as far as it was looked up
    unplaced:    positions in `decoded` of changes for which no generation has a vector
    refused:     positions of changes that the item's state or all generations refuse
    order:       which forwarded changes count
    decided:     what holds of them: (position in `decoded`, item id, change); of a refused record
                 its effect on the metadata
    changes:     item id -> its last one of these
    unpublished: by generation: item id -> its last accepted change, if not published yet
    error:       the error that ended the batch; `outcome` is meaningless then
    """

    batch: RecordBatch
    applied: int = -1
    decoded: list[tuple[str, ItemChange]] = field(default_factory=list)
    stored: dict[str, ItemMetadata] = field(default_factory=dict)
    unplaced: set[int] = field(default_factory=set)
    refused: dict[int, Rejected] = field(default_factory=dict)
    order: KeyOrder = field(default_factory=KeyOrder)
    decided: list[tuple[int, str, ItemChange]] = field(default_factory=list)
    changes: dict[str, ItemChange] = field(default_factory=dict)
    unpublished: list[dict[str, ItemChange]] = field(default_factory=list)
    outcome: Outcome = field(default_factory=Outcome)
    error: Exception | None = None

    @contextmanager
    def guard(self) -> Iterator[None]:
        """An error that a retry or a second reading resolves ends this batch only."""
        try:
            yield
        except (FenceMoved, Unavailable, PartitionLost) as error:
            self.error = error

    def look_ups(self, rules: Rules) -> Collection[str]:
        """The items whose stored metadata decides on a change of theirs."""
        return dict.fromkeys(
            item_id
            for number, (item_id, change) in enumerate(self.decoded)
            if change.forwarded
            or change.rejected is not None
            or number in self.unplaced
            or change.patch is not None
            or (change.item is not None and not change.item.at_ms)
            or (rules.emptied and item_changes.may_empty(change.item))
        )

    def decide(self, rules: Rules, place: Place = lambda *_: None) -> None:
        """Decide on all changes, by `stored` and `place`; the result replaces an earlier one."""
        self.order, self.decided, self.refused = KeyOrder(self.stored), [], {}
        outcome = self.outcome
        outcome.applied = outcome.outdated = outcome.repeated = 0
        for number, (item_id, change) in enumerate(self.decoded):
            if not self.order.counts(item_id, change):
                outcome.outdated += change.rejected is None
                continue
            one: ItemChange | None
            try:
                one = self._accepted(number, item_id, change, rules, place)
                outcome.applied += one is not None
                outcome.repeated += one is None
            except Rejected as rejected:
                if change.rejected is None:
                    self.refused[number] = rejected
                one = self._refused(item_id, change, rejected, rules)
            if one is not None:
                self.decided.append((number, item_id, one))
        self.changes = {item_id: change for _, item_id, change in self.decided}

    def _accepted(
        self, number: int, item_id: str, change: ItemChange, rules: Rules, place: Place
    ) -> ItemChange | None:
        """The change as it holds; None for a patch before the stored state. Raises Rejected."""
        if change.rejected is not None:
            raise change.rejected
        sent = change.item
        if change.patch is not None:
            if (patched := self._patched(item_id, change, change.patch)) is None:
                return None
            change = patched
        elif rules.emptied and sent is not None and item_changes.may_empty(sent):
            newest, stored = self.order.newest(item_id), self.stored.get(item_id)
            # Where the metadata is ahead of what is published it was decided before.
            if newest is not None and not (stored is not None and stored.includes(change.record)):
                item = item_changes.whole(_item(newest), sent)
                change = change if item is sent else replace(change, item=item)
        if (rejected := place(number, change.item)) is not None:
            raise rejected
        newest = self.order.newest(item_id)
        if change.forwarded and newest is not None and newest.refused is not None:
            change = change.keep_refused(newest.refused)
        stored = self.stored.get(item_id)
        ahead = change.patch is not None and stored is not None and stored.includes(change.record)
        # Where the stored state was published, patches before it made none: it knows its birth.
        change = change.born(stored if ahead else newest)
        self.order.accepted(item_id, change)
        if rules.restore and sent is not None and change.item is not sent:
            self.order.append(item_id, change)
        return change

    def _patched(self, item_id: str, change: ItemChange, patch: ItemPatch) -> ItemChange | None:
        """The change with the item that the patch makes.

        Where the metadata is ahead of what is published it has the state after this patch, or after
        a later one, which follows in the log: then this patch makes none. So where the item was
        deleted since, and has ended: the delete follows. Raises Rejected.
        """
        before, stored = self.order.newest(item_id), self.stored.get(item_id)
        if stored is not None and stored.includes(change.record):
            if stored.offset != change.offset or (item := _item(stored)) is None:
                return None
        else:
            try:
                item = item_changes.patched(None if before is None else _item(before), patch)
            except Rejected:
                if change.offset <= self.applied:
                    return None
                raise
        return replace(change, item=item, at_ms=item.at_ms)

    def _refused(
        self, item_id: str, change: ItemChange, rejected: Rejected, rules: Rules
    ) -> ItemChange | None:
        """What a refused record changes: nothing of an item that is not there."""
        before = self.order.newest(item_id)
        if before is None or before.deleted:
            return None
        stored = self.stored.get(item_id)
        if stored is not None and (known := stored.refused) and known.includes(change.record):
            hide = known.hidden  # decided before, perhaps under another setting
        else:
            hide = rules.hide or (before.refused is not None and before.refused.hidden)
        change = change.refuse(rejected, replace(before, refused=None), hide)
        self.order.refused(item_id, change)
        if rules.restore:
            self.order.append(item_id, change)
        return change


def _item(metadata: ItemMetadata) -> Item | None:
    """The item; None if it is deleted."""
    return None if metadata.deleted else msgspec.json.decode(metadata.body, type=Item)
