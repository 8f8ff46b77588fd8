"""Taking Kafka's present logs for the truth, after one was made anew or lost its tail.

A fence of a log that is unchanged stays, and so does its event-id window: dropping it would read that log a
second time over kept lists. A fence beyond its log's end goes back to the end. A fence of another log goes,
but that of published item vectors (`items@1`): versions in that topic are offsets of the old `items` log, so
only a new generation can go on.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from eddyline.stores import user_codec
from eddyline.stores.state_store import Fence, LogId

# Topic -> (its present log, partition -> the offset that the next record will get).
Logs = Mapping[str, tuple[LogId, Mapping[int, int]]]


@dataclass(frozen=True, slots=True)
class FenceDecision:
    """What becomes of one fence. becomes: None drops it; windows_from: ids from this offset on go, too."""

    changed: bool
    becomes: Fence | None
    windows_from: int = 0


def decide(source: str, partition: int, fence: Fence, logs: Logs) -> FenceDecision:
    """The verdict on the fence of a source (`clicks`, `items@1`, …) and partition."""
    topic = source.partition("@")[0]
    if topic not in logs:
        return FenceDecision(False, fence)
    log, ends = logs[topic]
    end = ends.get(partition, 0)
    if fence.log != log:
        return FenceDecision(False, fence) if "@" in source else FenceDecision(True, None)
    if fence.offset < end:
        return FenceDecision(False, fence)
    return FenceDecision(True, Fence(end - 1, log) if end else None, end)


def was_replaced(source: str, fence: Fence, logs: Logs) -> bool:
    """Whether this fence shows that `items` is another log than the cards were written for."""
    return source == "items" and "items" in logs and fence.log != logs["items"][0]


def metadata_is_current(partition: int, offset: int, logs: Logs, replaced: bool) -> bool:
    """Whether a card's version is still one of the `items` log. replaced: that log is another one now."""
    if "items" not in logs or partition < 0:
        return True
    return not replaced and offset < logs["items"][1].get(partition, 0)


def accept_in_redis(client: Any, ns: str, card: struct.Struct, logs: Logs) -> int:
    """Judge every fence of a namespace; how many were changed. card: the head of a card, its version.

    A user's own id may look like a key of ours, so what is scanned for is matched exactly.
    """
    changed, replaced = 0, False
    is_fence = re.compile(rf"{re.escape(ns)}fence:\{{([ui]\d+)\}}:([^:]+):(\d+)$")
    for key in client.scan_iter(match=f"{ns}fence:*", count=1_000):
        found, value = is_fence.match(key.decode()), cast("bytes | None", client.get(key))
        if found is None or value is None:
            continue
        slot, source, partition = found[1], found[2], int(found[3])
        fence = Fence.parse(value.decode())
        verdict = decide(source, partition, fence, logs)
        replaced |= was_replaced(source, fence, logs)
        if not verdict.changed:
            continue
        changed += 1
        if source == "clicks" and slot.startswith("u"):
            _cut_window(client, f"{ns}{{{slot}}}:window", verdict.windows_from)
        if verdict.becomes is None:
            client.delete(key)
        else:
            client.set(key, str(verdict.becomes))
    is_card = re.compile(rf"{re.escape(ns)}\{{i\d+\}}:c:".encode())
    for key in client.scan_iter(match=f"{ns}{{i*}}:c:*", count=1_000):
        head = cast(bytes, client.getrange(key, 0, card.size - 1))
        if is_card.match(key) and len(head) == card.size:
            partition, offset = card.unpack(head)
            if not metadata_is_current(partition, offset, logs, replaced):
                # Version −1, the item as it is: any record of the log is newer.
                client.setrange(key, 0, card.pack(-1, -1))
    return changed


def _cut_window(client: Any, key: str, first_gone: int) -> None:
    """Drop the ids that were accepted at this offset or later."""
    accepted = user_codec.accepted(cast("list[bytes]", client.lrange(key, 0, -1)))
    kept = {event_id: offset for event_id, offset in accepted.items() if offset < first_gone}
    if len(kept) == len(accepted):
        return
    with client.pipeline(transaction=True) as pipe:
        pipe.delete(key)
        if kept:
            pipe.rpush(key, user_codec.accepted_blob(kept, next(iter(kept.values()))))
        pipe.execute()
