"""The product's handlers over a Kafka in memory and a `MemoryStore`, for comparison with the model.

The producers are those of ingest (`KafkaForwarder`, `KafkaDeadLetters`); only the client below them
is replaced: what it sends enters the logs at its flush, and is lost with the process before.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import numpy as np
from kafka.errors import KafkaTimeoutError

from eddyline.errors import FenceMoved, KafkaUnavailable, LogMismatch, StoreUnavailable
from eddyline.generations import Generations
from eddyline.schema import co_visits
from eddyline.schema.event_decay import decays
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import ItemMetadata, LogId, Source, is_idle
from streams.clicks.step_ranges import RecordedStepRanges
from streams.ended_generations import EndedGenerations
from streams.generation import Generation
from streams.handlers import Handlers, Outputs
from tests.applying import batch_of
from tests.decayed_events import plain_counts, stored_counts
from tests.model import comparison, model, rules
from tests.model.reading import Raw
from tests.model.towers import REFUSED_TITLE, Towers, checksum

TOPICS = ("items", "users", "clicks")
LOG = LogId("cluster", "topic")
BASE_MS = 1_700_000_000_000


class _Future:
    def __init__(self) -> None:
        self.stored = False

    def get(self, timeout: float | None = None) -> None:
        if not self.stored:
            raise KafkaTimeoutError("not stored")


class _Client:
    """Kafka's producer: queues, stores at a flush, and refuses a send as `full` says."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._queue: list[tuple[Any, ...]] = []

    def send(self, topic: str, value: bytes, **more: Any) -> _Future:
        self._rig.full_at -= 1
        if self._rig.full or not self._rig.full_at:
            self._rig.full = 0
            raise KafkaTimeoutError("the buffer is full")
        future = _Future()
        self._queue.append((future, topic, value, more))
        return future

    def flush(self, timeout: float | None = None) -> None:
        if self._rig.away:
            self._rig.away -= 1
            raise KafkaTimeoutError("Kafka does not answer")
        for future, topic, value, more in self._queue:
            future.stored = True
            if topic == "dead-letters":
                self._rig.letters[more["key"].decode()] = dict(more["headers"])["reason"].decode()
            else:
                self._rig.append(
                    topic, more["partition"], more["key"], value, tuple(more["headers"])
                )
        self._queue.clear()


class _Published:
    """Item records as compaction leaves them."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}

    def open(self, partition: int) -> None:
        """There is no other writer."""

    def publish(self, records: Mapping[int, Sequence[Any]]) -> dict[int, Any]:
        """Keep the last record of every item."""
        self.last |= {record.item_id: record for some in records.values() for record in some}
        return {}

    def close(self) -> None:
        """Nothing is open."""


class _Begins:
    """The records `begin/…` of the topic `generations`, as compaction leaves them."""

    def __init__(self) -> None:
        self.last: dict[tuple[str, int], Any] = {}

    def read(self) -> Generations:
        """All of them; no generation ends."""
        return Generations(ranges=dict(self.last))

    def write(self, ranges: Mapping[tuple[str, int], Any]) -> None:
        """Append records."""
        self.last |= ranges

    def learns(self, generation: str, raw: Raw) -> bool:
        """Whether a generation learns from a record; never where nothing is recorded."""
        found = self.last.get((generation, raw.partition))
        ranges = () if found is None else found.ranges
        return any(first <= raw.offset < end for first, end in ranges)


class Rig:
    """Logs, a store and one ingest process. Logs keep what retention removed, for the model."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.now_ms = BASE_MS
        self.logs: dict[str, dict[int, list[Raw]]] = {t: {p: [] for p in range(2)} for t in TOPICS}
        self.ends = {(t, p): 0 for t in TOPICS for p in range(2)}
        self.begins = dict(self.ends)
        self.committed = dict(self.ends)
        self.letters: dict[str, str] = {}
        # The next send fails; the n-th one does; the next flush does.
        self.full = self.full_at = self.away = 0
        self.store = MemoryStore()
        self.saved: tuple[Any, dict[tuple[str, int], int]] = (
            self.store.snapshot(),
            dict(self.ends),
        )
        self.towers = [Towers("1", [f"i{n}" for n in range(5)], 2)]
        self.published = {"1": _Published()}
        self.recorded = _Begins()
        self.live = ["1"]
        self.ended: set[str] = set()
        # From these offsets on the partitions are applied under these settings.
        self.eras: list[tuple[dict[tuple[str, int], int], Settings]] = [({}, settings)]
        self.start()

    # ---- Kafka

    def append(
        self,
        topic: str,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        headers: tuple[tuple[str, bytes | None], ...] = (),
    ) -> Raw:
        """Append a record at the rig's time."""
        offset = self.ends[topic, partition]
        self.ends[topic, partition] += 1
        raw = Raw(topic, partition, offset, self.now_ms, key, value, headers)
        self.logs[topic][partition].append(raw)
        return raw

    def retain(self, partition: int) -> None:
        """Retention removes the head of a partition of `clicks` that every copy has applied."""
        saved = self.saved[1]["clicks", partition]
        states = self.store.snapshot(), self.saved[0]
        applied = [self._done(state, partition) + 1 for state in states]
        lowest = min(saved, self.handlers.clicks.fences.lowest(partition) + 1, *applied)
        self.begins["clicks", partition] = max(self.begins["clicks", partition], lowest)

    def lose(self, partition: int, count: int) -> None:
        """A partition of `clicks` loses its last records: a new leader never had them.

        Where some of them were applied, the process must refuse the log; then they come back. They
        come back too where something was sent because of them: nothing can undo that.
        """
        at, log = ("clicks", partition), self.logs["clicks"][partition]
        tail: list[Raw] = []
        while len(tail) < count and log and not any(n == "origin" for n, _ in log[-1].headers):
            tail.insert(0, log.pop())
        end = self.ends[at]
        self.ends[at] = tail[0].offset if tail else end
        applied, saved = (
            self._done(state, partition) for state in (self.store.snapshot(), self.saved[0])
        )
        sent = self._sent_from(partition)
        if max(applied, saved, self.committed[at] - 1, sent) < self.ends[at]:
            self.open(*at)
            return
        if applied >= self.ends[at]:
            try:
                self.open(*at)
            except LogMismatch:
                pass
            else:
                raise AssertionError(f"clicks/{partition} was read on from {self.ends[at]}")
        log += tail
        self.ends[at] = end
        self.open(*at)

    def _sent_from(self, partition: int) -> int:
        """The last offset of `clicks` that was forwarded or is a dead letter, sent or queued; -1
        for none.
        """
        logs = [log for parts in self.logs.values() for log in parts.values()]
        queued = [more for client in self.clients for _, _, _, more in client._queue]
        headers = [*(raw.headers for log in logs for raw in log), *(m["headers"] for m in queued)]
        origins = [(dict(one).get("origin") or b"").decode() for one in headers]
        keys = [(m["key"] or b"").decode(errors="replace") for m in queued]
        places = [place.rpartition("/") for place in (*origins, *keys, *self.letters)]
        mine = [int(at) for where, _, at in places if where == f"clicks/{partition}"]
        return max(mine, default=-1)

    @staticmethod
    def _done(state: Any, partition: int) -> int:
        """The offset up to which any slot has everything; -1 for none."""
        fences = [
            f.offset for (_, s), f in state.fences.items() if s == Source("clicks", partition)
        ]
        return max(fences, default=-1)

    # ---- the process

    def start(self) -> None:
        """A new process; the one before is dead, and what it had queued is gone."""
        for client in getattr(self, "clients", ()):
            client._queue.clear()
        self.clients = [_Client(self)]
        clock = iter(range(10**9))
        live = [t for t in self.towers if t.generation in self.live]
        generations = [Generation(t, self.published[t.generation]) for t in live]  # type: ignore[arg-type]
        outputs = Outputs.to_kafka(self.settings, self.clients[0])  # type: ignore[arg-type]
        self.handlers = Handlers(
            self.settings,
            self.store,
            dict.fromkeys(TOPICS, LOG),
            generations,
            replace(outputs, steps=RecordedStepRanges(self.recorded)),
            # As of a process that started before the others were made.
            [t.generation for t in live],
            items_wait_s=0.0,
            clock_us=lambda: 0,
        )
        for pending in (self.handlers.clicks.popularity, self.handlers.clicks.co_visits):
            pending._clock_s = lambda: next(clock) * 0.03
        self.at: dict[tuple[str, int], int] = {}
        for topic, partition in self.ends:
            self.open(topic, partition)

    def open(self, topic: str, partition: int) -> None:
        """Read a partition again from its fences."""
        at = topic, partition
        handler = self.handlers.of(topic)
        handler.open(partition)
        bounds = {partition: (self.begins[at], self.ends[at])}
        self.at[at] = handler.fences.open(bounds, {partition: self.committed[at]})[partition]
        if partition == 0:  # in the other one the first batch does it
            handler.prepare([partition])

    def turn(self, topic: str, sizes: Mapping[int, int]) -> bool:
        """One batch each of some partitions; False where none has anything left."""
        batches = {}
        for partition, size in sizes.items():
            records = [
                r for r in self.logs[topic][partition] if r.offset >= self.at[topic, partition]
            ]
            if records:
                batches[partition] = records[:size]
        handler, read = self.handlers.of(topic), [batch_of(some) for some in batches.values()]
        for batch, result in zip(read, handler.apply(read) if read else [], strict=True):
            at = topic, batch.partition
            if isinstance(result, FenceMoved | StoreUnavailable | KafkaUnavailable):
                self.open(*at)
            elif isinstance(result, Exception):
                raise result
            else:
                self.at[at] = self.committed[at] = batch.last + 1
        return bool(batches)

    def save(self) -> None:
        """Copy Redis' files."""
        positions = {(t, p): self.handlers.of(t).fences.lowest(p) + 1 for t, p in self.ends}
        self.saved = self.store.snapshot(), positions

    def restore(self) -> None:
        """Redis comes back with the older copy; the process goes on and finds out."""
        self.store.restore(copy.deepcopy(self.saved[0]))

    def remove_idle(self) -> None:
        """Remove what idle users left; the process goes on with what it has cached."""
        for _ in self.store.remove_idle_users(["u0", "u1"], 0):
            pass

    def remove_deleted(self) -> None:
        """Remove deleted items that have ended."""
        for _ in self.store.remove_deleted_items(["i0", "i1", "i2"], 2, 0):
            pass

    def end_generation(self) -> None:
        """The first generation ends where no process uses it; its embeddings are removed."""
        if self.live == ["2"]:
            self.ended.add("1")
        self._remove_ended()

    def _remove_ended(self) -> None:
        cache, lock = self.handlers.clicks.cache, threading.Lock()
        ended = EndedGenerations(self.settings, self.store, cache, lock, self.live, print)
        for name in sorted(self.ended):
            ended._remove(name)

    def restart(self, **changed: int) -> None:
        """An orderly end, and a start, perhaps with other settings."""
        if changed:
            self.drain()
            self.settings = msgspec.structs.replace(self.settings, **changed)
            self.eras.append((dict(self.ends), self.settings))
            self.saved = self.store.snapshot(), dict(self.ends)
        self.start()

    def retrain(self, items: Sequence[str]) -> None:
        """A second generation, which the next process serves too."""
        self.towers.append(Towers("2", items, 1))
        self.published["2"] = _Published()
        self.serve(["1", "2"])

    def serve(self, names: Sequence[str]) -> None:
        """The next process has loaded these generations, as far as they exist."""
        there = [t.generation for t in self.towers if t.generation not in self.ended]
        self.live = [name for name in there if name in names] or there[-1:]
        self.start()

    def drain(self) -> None:
        """Apply everything, what ingest sends meanwhile included."""
        self.full = self.full_at = self.away = 0
        for _ in range(1_000):
            if [t for t in TOPICS if self.turn(t, {0: 7, 1: 7})]:
                continue
            for partition in range(2):
                try:
                    self.handlers.clicks.write_behind.write(partition)
                except FenceMoved:
                    self.open("clicks", partition)
            again = False
            for topic in TOPICS:
                for partition in self.handlers.of(topic).fences.find_diverged([0, 1]):
                    self.open(topic, partition)
                    again = True
            if not again and self.ended:
                for partition in range(2):
                    self.handlers.clicks.prepare([partition])
                self._remove_ended()
            if not again and not any(self.at[at] < self._last(at) for at in self.ends):
                return
        raise AssertionError("the logs do not come to their end")

    def _last(self, at: tuple[str, int]) -> int:
        records = self.logs[at[0]][at[1]]
        return records[-1].offset + 1 if records else 0

    # ---- comparison

    def expected(
        self, logs: Mapping[str, Mapping[int, Sequence[Raw]]] | None = None
    ) -> model.State:
        """What the model makes of the logs. logs: default: those of the rig."""
        generations = [
            model.Generation(
                t.generation,
                frozenset(t.rows),
                t.micro.min_steps_before,
                3,
                lambda item: item["title"] == REFUSED_TITLE,
                partial(self.recorded.learns, t.generation),
            )
            for t in self.towers
        ]
        return model.applied(self.settings, generations, logs or self.logs, self._settings_of)

    def _kept(self, buckets: Mapping[int, Any]) -> dict[int, Any]:
        """Buckets that count. A smaller `popular_buckets` holds from the slot's next count on;
        until then the slot has those of the setting before.
        """
        newest, most = max(buckets), max(s.popular_buckets for _, s in self.eras)
        left = {b: counts for b, counts in buckets.items() if b > newest - most}
        kept = {
            b: counts for b, counts in left.items() if b > newest - self.settings.popular_buckets
        }
        return kept if len(left) == len(buckets) else dict(buckets)

    def _settings_of(self, raw: Raw) -> Settings:
        at = raw.topic, raw.partition
        return [s for start, s in self.eras if start.get(at, 0) <= raw.offset][-1]

    def differences(self) -> list[str]:
        """Every difference of state and of what was sent."""
        want, have, found = self.expected(), self.store.snapshot(), list[str]()

        def same(what: str, left: Mapping[Any, Any], right: Mapping[Any, Any]) -> None:
            for key in sorted(left.keys() | right.keys(), key=str):
                if left.get(key) != right.get(key):
                    found.append(f"{what} {key}: {left.get(key)!r}, model {right.get(key)!r}")

        idle = self._idle(have)
        same(
            "history",
            {
                u: comparison.history_of(h)
                for (_, u), (h, _) in have.histories.items()
                if u not in idle
            },
            model.histories_of(want),
        )
        same("seen items", *self._seen(have, want, idle))
        for towers in self.towers:
            name = towers.generation
            mine = {
                u: (steps, int(np.frombuffer(vector, "<f4")[0]))
                for (_, g, u), (steps, vector) in have.embeddings.items()
                if g == name and u not in idle
            }
            model_ = {u: (e.counted, checksum(e.learned)) for u, e in want.embeddings[name].items()}
            same(f"embedding {name}", mine, {} if name in self.ended else model_)
            if name not in self.live:
                continue  # its items come once a process has loaded it again
            published = {i: (r.offset, r.retired) for i, r in self.published[name].last.items()}
            same(
                f"published {name}",
                published,
                {i: _shown(v) for i, v in want.published[name].items()},
            )
        for partition in range(2):
            floor = self._last(("clicks", partition)) - self.settings.dedupe_window_events
            mine_, model_ = have.window.get(f"u{partition}", {}), want.windows.get(partition, {})
            same("event id", _above(mine_, floor), _above(model_, floor))
        counts = {s: self._kept(b) for s, b in have.buckets.items() if b}
        same("counts", counts, want.counts)
        same("visits", *self._rows(have, want))
        slots = [f"i{shard}" for shard in range(self.settings.item_slots)]
        same(
            "clicked",
            {slot: stored_counts(self.store, slot, decays(self.settings)) for slot in slots},
            {slot: plain_counts(want.clicked.get(slot, {})) for slot in slots},
        )
        profiles = {u: attributes_of(p) for (_, u), p in have.profiles.items()}
        same("profile", profiles, {u: p[2] for u, p in want.profiles.items()})
        self._same_items(have, want, same)
        same("dead letter", self.letters, want.letters)
        # Compaction changes nothing of items and profiles, whenever it runs. A topic of patches
        # is not compacted.
        less = self.expected(comparison.compacted(self.logs, want.letters))
        if not self.settings.items_patches:
            same("compacted item", contents(less), contents(want))
        same(
            "compacted profile",
            {u: p[2] for u, p in less.profiles.items()},
            {u: p[2] for u, p in want.profiles.items()},
        )
        found += comparison.stray_differences(self.logs, want)
        found += [f"{at}: appended again without a reason" for at in self._again() - want.again]
        return found + comparison.sent_differences(self.logs["clicks"], want)

    def _again(self) -> set[str]:
        """The records of `items` after which ingest appended what the item has."""
        return {
            f"{raw.topic}/{raw.partition}/{after}"
            for partition in self.logs["items"].values()
            for raw in partition
            if (after := rules.appended_after(raw)) is not None
        }

    @staticmethod
    def _idle(have: Any) -> set[str]:
        """The users who are idle, removed or not."""
        return {
            u
            for (slot, u), (history, _) in have.histories.items()
            if is_idle(history, have.fences.get((slot, Source("clicks", int(slot[1:])))))
        }

    def _seen(self, have: Any, want: model.State, idle: set[str]) -> tuple[Any, Any]:
        """Seen items of both, in the form of `same`."""
        most = self.settings.seen_items_max
        mine = {u: v for (_, u), v in have.seen.items() if u not in idle}
        shown = {u: comparison.seen_of(value, most) for u, value in mine.items()}
        return shown, model.seen_items_of(want, most)

    def _rows(self, have: Any, want: model.State) -> tuple[dict[Any, str], dict[Any, str]]:
        """Co-visitation rows, in the form of `same`: what differs, and nothing."""
        kinds = comparison.DIRECTIONS
        rows = {(kind, item): co_visits.EMPTY for kind in kinds for item in want.visited}
        rows |= {(kind, item): co_visits.decode(row) for (_, kind, item), row in have.rows.items()}
        row_max, found = self.settings.co_visit_row_max, {}
        for (kind, item), row in rows.items():
            summary = co_visits.summary(row, row_max)
            if difference := comparison.row_difference(summary, want, kind, item):
                found[kind, item] = difference
        return found, {}

    @staticmethod
    def _same_items(have: Any, want: model.State, same: Any) -> None:
        """Compare item metadata. Deleted items that have ended may be there or not."""
        left = {k: i for k, i in have.items.items() if not _ended(have, k, i)}
        same(
            "item",
            {k.partition(":")[2]: (i.offset, bool(i.body)) for k, i in left.items()},
            {i: (v.offset, v.item is not None) for i, v in want.items.items()},
        )
        same(
            "item's fields",
            {k.partition(":")[2]: json.loads(i.body) for k, i in have.items.items() if i.body},
            contents(want),
        )
        same(
            "birth",
            {k.partition(":")[2]: i.born_ms for k, i in have.items.items() if i.born_ms},
            want.born,
        )
        same(
            "refused",
            {k.partition(":")[2]: r.offset for k, i in have.items.items() if (r := i.refused)},
            {i: raw.offset for i, raw in want.refused.items()},
        )


def _ended(state: Any, key: str, item: ItemMetadata) -> bool:
    """Whether a deleted item has ended at the fence of its partition."""
    fence = state.fences.get((key.partition(":")[0], Source("items", item.partition)))
    return fence is not None and fence.mark is not None and item.has_ended(fence.mark.appended_ms)


def contents(state: model.State) -> dict[str, Any]:
    """What each item is; deleted ones are absent."""
    return {i: v.item for i, v in state.items.items() if v.item is not None}


def attributes_of(profile: Any) -> Any:
    """A stored profile's attributes."""
    return dict(getattr(profile, "attributes", profile))


def _shown(version: model.Version) -> tuple[int, bool]:
    return version.offset, version.item is None or not version.item["available"]


def _above(ids: Mapping[str, int], floor: int) -> dict[str, int]:
    return {e: at for e, at in ids.items() if at >= floor}
