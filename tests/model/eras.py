"""Eras of a run: from which offsets on ingest applied records under which settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from eddyline.settings.loader import Settings
from tests.model.reading import Raw


@dataclass(frozen=True)
class Era:
    """settings and generation of the ingest processes.

    starts: topic without prefix -> partition -> its first offset of this era; absent: 0
    """

    settings: Settings
    generation: str = "1"
    starts: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    def start(self, topic: str, partition: int) -> int:
        """The partition's first offset of this era."""
        return self.starts.get(topic, {}).get(partition, 0)


def era_of(eras: Sequence[Era]) -> Callable[[Raw], Era]:
    """The era of a record: the last one that starts at or before it."""

    def find(raw: Raw) -> Era:
        name = raw.topic.removeprefix(eras[0].settings.prefixed(""))
        return [e for e in eras if e.start(name, raw.partition) <= raw.offset][-1]

    return find


def end_of(eras: Sequence[Era], number: int, topic: str, partition: int) -> int:
    """The offset after the last one of an era; beyond every offset for the last era."""
    following = eras[number + 1 : number + 2]
    return following[0].start(topic, partition) if following else 2**63 - 1
