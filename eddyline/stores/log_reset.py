"""Adopting Kafka's present logs after a topic was recreated or lost its tail.

* The log is the same and reaches the fence: the fence and its event-id window stay. Dropping them
  would apply the log a second time to the stored histories. The fence loses its mark: the log is
  accepted although another record may have that offset.
* The log is the same but ends before the fence: the fence moves back to the last record.
* The log is another one: the fence is dropped. Exception: the fence of published item vectors
  (`items@1`) stays, because versions in that topic are offsets of the old `items` log; only a new
  generation helps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from eddyline.schema.co_visits import Visit
from eddyline.stores import item_codec, outbox, user_codec
from eddyline.stores.fence import CO_VISITS
from eddyline.stores.state_store import Fence, LogId

# Topic -> (its present log, partition -> end offset).
Logs = Mapping[str, tuple[LogId, Mapping[int, int]]]


@dataclass(frozen=True, slots=True)
class FenceDecision:
    """The new state of one fence.

    fence:      the new fence; None drops it
    window_end: ids accepted at this offset or later leave the event-id window, visits the outbox
    """

    changed: bool
    fence: Fence | None
    window_end: int = 0


def decide(source: str, partition: int, fence: Fence, logs: Logs) -> FenceDecision:
    """The decision on the fence of a source (`clicks`, `co-visits`, `items@1`, …) and partition."""
    topic = "clicks" if source == CO_VISITS else source.partition("@")[0]
    if topic not in logs:
        return FenceDecision(False, fence)
    log, ends = logs[topic]
    end = ends.get(partition, 0)
    if fence.log != log:
        return FenceDecision(False, fence) if "@" in source else FenceDecision(True, None)
    if fence.offset < end:
        return FenceDecision(False, fence)
    return FenceDecision(True, Fence(end - 1, log) if end else None, end)


def without_mark(fence: Fence) -> Fence:
    """The same fence, which is not compared with the log any more."""
    return replace(fence, mark=None)


def was_replaced(source: str, fence: Fence, logs: Logs) -> bool:
    """Whether this fence shows that item metadata was written from another `items` log."""
    return source == "items" and "items" in logs and fence.log != logs["items"][0]


def metadata_is_current(partition: int, offset: int, logs: Logs, replaced: bool) -> bool:
    """Whether a metadata version is in the `items` log. replaced: the log is another one now."""
    if "items" not in logs or partition < 0:
        return True
    return not replaced and offset < logs["items"][1].get(partition, 0)


def accept_in_redis(client: Any, ns: str, logs: Logs) -> int:
    """Apply `decide` to every fence of a namespace; returns how many fences changed.

    Scanned keys are matched exactly: a user id may look like one of our keys.
    """
    changed, replaced = 0, False
    is_fence = re.compile(rf"{re.escape(ns)}fence:\{{([ui]\d+)\}}:([^:]+):(\d+)$")
    for key in client.scan_iter(match=f"{ns}fence:*", count=1_000):
        found, value = is_fence.match(key.decode()), cast("bytes | None", client.get(key))
        if found is None or value is None:
            continue
        slot, source, partition = found[1], found[2], int(found[3])
        fence = Fence.parse(value.decode())
        decision = decide(source, partition, fence, logs)
        replaced |= was_replaced(source, fence, logs)
        if not decision.changed:
            if fence.mark is not None:  # another record may have its offset
                client.set(key, str(without_mark(fence)))
            continue
        changed += 1
        if source == "clicks" and slot.startswith("u"):
            _cut_window(client, f"{ns}{{{slot}}}:window", fence.offset, decision.window_end)
            _cut_outbox(client, f"{ns}{{{slot}}}:visits", fence.offset, decision.window_end)
        if decision.fence is None:
            client.delete(key)
        else:
            client.set(key, str(decision.fence))
    is_item = re.compile(rf"{re.escape(ns)}\{{i\d+\}}:c:".encode())
    for key in client.scan_iter(match=f"{ns}{{i*}}:c:*", count=1_000):
        head = cast(bytes, client.getrange(key, 0, item_codec.VERSION.size - 1))
        if is_item.match(key) and len(head) == item_codec.VERSION.size:
            partition, offset = item_codec.VERSION.unpack(head)
            if not metadata_is_current(partition, offset, logs, replaced):
                # Version -1: any record of the log is newer. The item itself stays.
                client.setrange(key, 0, item_codec.VERSION.pack(-1, -1))
    return changed


def _cut_window(client: Any, key: str, done: int, end: int) -> None:
    """Remove the ids accepted at offset `end` or later. done: the fence's offset so far."""
    blobs = cast("list[bytes]", client.lrange(key, 0, -1))
    accepted = user_codec.decode_accepted(blobs, done)
    kept = {event_id: offset for event_id, offset in accepted.items() if offset < end}
    with client.pipeline(transaction=True) as pipe:
        pipe.delete(key)
        if kept:
            pipe.rpush(key, user_codec.encode_accepted(kept, next(iter(kept.values()))))
        pipe.execute()


def _cut_outbox(client: Any, key: str, done: int, end: int) -> None:
    """Remove the visits at offset `end` or later. done: the fence's offset so far."""
    found, floor = outbox.decode(cast("list[bytes]", client.lrange(key, 0, -1)), done)
    kept = visits_before(found, end)
    with client.pipeline(transaction=True) as pipe:
        pipe.delete(key)
        if kept:
            pipe.rpush(key, outbox.encode(kept, min(floor, end)))
        pipe.execute()


def visits_before(visits: Sequence[Visit], end: int) -> list[Visit]:
    """The visits of an outbox below offset `end`."""
    return [visit for visit in visits if visit[0] < end]
