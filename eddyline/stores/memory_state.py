"""The state of `stores.memory`, and the change of its logs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from eddyline.schema.co_visits import Visit
from eddyline.schema.erasure import Erasure
from eddyline.schema.step_ranges import StepRanges
from eddyline.schema.user_history import UserHistory
from eddyline.stores.layout import Layout
from eddyline.stores.log_reset import (
    Logs,
    decide,
    metadata_is_current,
    visits_before,
    was_replaced,
    without_mark,
)
from eddyline.stores.memory_popularity import Buckets, MemoryTrend
from eddyline.stores.state_store import Fence, ItemMetadata, ProfilePlace, Source, is_idle


@dataclass
class State:
    """All state. Keys of maps begin with the slot.

    visits: slot -> (floor, visits) of its outbox
    rows: (slot, "after" or "before", item id) -> co-visitation row, as stored in Redis
    """

    layout: Layout | None = None
    fences: dict[tuple[str, Source], Fence] = field(default_factory=dict)
    window: dict[str, dict[str, int]] = field(default_factory=dict)
    histories: dict[tuple[str, str], tuple[UserHistory, int]] = field(default_factory=dict)
    seen: dict[tuple[str, str], bytes] = field(default_factory=dict)
    embeddings: dict[tuple[str, str, str], tuple[int, bytes]] = field(default_factory=dict)
    profiles: dict[tuple[str, str], dict[str, object]] = field(default_factory=dict)
    profile_places: dict[tuple[str, str], ProfilePlace] = field(default_factory=dict)
    erasures: dict[tuple[str, str], Erasure] = field(default_factory=dict)
    step_ranges: dict[str, Mapping[str, StepRanges]] = field(default_factory=dict)
    buckets: dict[str, Buckets] = field(default_factory=dict)
    trends: dict[str, MemoryTrend] = field(default_factory=dict)
    items: dict[str, ItemMetadata] = field(default_factory=dict)
    visits: dict[str, tuple[int, list[Visit]]] = field(default_factory=dict)
    rows: dict[tuple[str, str, str], bytes] = field(default_factory=dict)


def accept_in_memory(state: State, logs: Logs) -> int:
    """See `StateStore.accept_log`."""
    changed, replaced = 0, False
    for (slot, source), fence in list(state.fences.items()):
        decision = decide(source.name, source.partition, fence, logs)
        replaced |= was_replaced(source.name, fence, logs)
        if not decision.changed:
            state.fences[slot, source] = without_mark(fence)
            continue
        changed += 1
        if source.name == "clicks" and slot in state.window:
            window = state.window[slot]
            state.window[slot] = {e: at for e, at in window.items() if at < decision.window_end}
        if source.name == "clicks" and slot in state.visits:
            floor, visits = state.visits.pop(slot)
            if kept := visits_before(visits, decision.window_end):
                state.visits[slot] = min(floor, decision.window_end), kept
        if decision.fence is None:
            del state.fences[slot, source]
        else:
            state.fences[slot, source] = decision.fence
    for key, item in state.items.items():
        if not metadata_is_current(item.partition, item.offset, logs, replaced):
            state.items[key] = replace(item, partition=-1, offset=-1)
    return changed


def remove_idle_users(state: State, slots: Collection[str], slack_ms: int) -> int:
    """See `StateStore.remove_idle_users`."""
    found = []
    for (slot, user), (history, _) in state.histories.items():
        fence = state.fences.get((slot, Source("clicks", int(slot[1:]))))
        later_ms = history.idle_after_ms + slack_ms if history.idle_after_ms else 0
        later = msgspec.structs.replace(history, idle_after_ms=later_ms)
        if slot in slots and is_idle(later, fence):
            found.append((slot, user))
    gone = set(found)
    for at in found:
        del state.histories[at]
        state.seen.pop(at, None)
    for key in [k for k in state.embeddings if (k[0], k[2]) in gone] if gone else ():
        del state.embeddings[key]
    return len(found)


def remove_deleted_items(
    state: State, slots: Collection[str], partitions: int, slack_ms: int
) -> int:
    """See `StateStore.remove_deleted_items`."""
    found, items = [], state.items
    for slot, key, item in ((k.partition(":")[0], k, i) for k, i in items.items()):
        own = [item.partition] if 0 <= item.partition < partitions else range(partitions)
        fences = (state.fences.get((slot, Source("items", p))) for p in own)
        now_ms = min(f.mark.appended_ms if f and f.mark else 0 for f in fences)
        if slot in slots and item.has_ended(now_ms - slack_ms):
            found.append(key)
    for key in found:
        del items[key]
        slot, _, item_id = key.partition(":")
        state.rows.pop((slot, "after", item_id), None)
        state.rows.pop((slot, "before", item_id), None)
    return len(found)
