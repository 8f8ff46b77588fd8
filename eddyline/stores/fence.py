"""Fences: how far a slot has applied a source, and in which log; see `stores.state_store`."""

from __future__ import annotations

from dataclasses import dataclass, field

# The source of the co-visitation rows: `clicks`, by way of the outbox in the user slot.
CO_VISITS = "co-visits"


@dataclass(frozen=True, slots=True)
class LogId:
    """Which log an offset belongs to: Kafka's cluster id and the topic's id."""

    cluster_id: str
    topic_id: str

    def __str__(self) -> str:
        """The stored form: `cluster id|topic id`."""
        return f"{self.cluster_id}|{self.topic_id}"


@dataclass(frozen=True, slots=True)
class Mark:
    """The last record that was applied at or below a fence: shows whether the log still has it.

    appended_ms: the broker's time stamp; or a later time up to which no delete is missing
    checksum:    see `streams.resuming.mark_of`
    """

    offset: int
    appended_ms: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Fence:
    """Records of the partition up to and including `offset` are applied.

    mark: None in a fence of an older version, and where no record was applied
    """

    offset: int
    log: LogId
    mark: Mark | None = field(default=None, compare=False)

    def __str__(self) -> str:
        """The stored form: `offset|cluster id|topic id`, and the mark: `|offset,ms,checksum`."""
        text = f"{self.offset}|{self.log}"
        if (mark := self.mark) is None:
            return text
        return f"{text}|{mark.offset},{mark.appended_ms},{mark.checksum}"

    @classmethod
    def parse(cls, text: str) -> Fence:
        """The reverse of `str()`."""
        offset, cluster_id, topic_id, *more = text.split("|")
        mark = Mark(*map(int, more[0].split(","))) if more else None
        return cls(int(offset), LogId(cluster_id, topic_id), mark)


@dataclass(frozen=True, slots=True)
class Source:
    """One partition of a source: ("clicks", 3), ("items", 0) or ("items@1", 0)."""

    name: str
    partition: int
