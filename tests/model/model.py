"""A second, independent model: what the logs say, in plain dictionaries, one record at a time.

It has no batches, fences, caches, retries and codecs, and imports nothing of the product. The input
is the raw records of each partition; the output is the state, and every record that ingest must
have sent: strays and moved clicks to other partitions, tombstones, dead letters, item records.
The rules are those of docs/adr: 1 and 5 (windows, lists, merges), 3 (micro-steps), 17 (forgetting),
29 (idle users), 32 (deleted items), 35 (co-visits) and 39 (seen items).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.model import reading
from tests.model.reading import Raw, Refused
from tests.model.rules import (
    MINUTE_MS,
    appended_after,
    brought,
    carried,
    first_append_ms,
    idle_after_ms,
    item_ends_ms,
    item_key,
    known_fields,
    liked_items,
    newest_of,
    pairs_of,
    plausible,
    strength,
)


class Entry(NamedTuple):
    """One line of a user's history."""

    item_id: str
    at_ms: int
    kind: str
    weight: float


@dataclass
class History:
    """A user's history, newest first, and the last record that changed it.

    idle_after_ms: the user ends with a record that was appended later; 0: never
    beyond: (key of the item, number of the kind) -> latest minute of an event that is not listed
    """

    entries: list[Entry] = field(default_factory=list)
    newest_ms: int = 0
    last: Raw | None = None
    idle_after_ms: int = 0
    beyond: dict[tuple[int, int], int] = field(default_factory=dict)


class Learned(NamedTuple):
    """One micro-step: the item, the items of the history (newest first), the seed of the draw."""

    item_id: str
    history: tuple[str, ...]
    key: str


@dataclass
class Embedding:
    """counted: events; learned: the steps taken, in order."""

    counted: int = 0
    learned: list[Learned] = field(default_factory=list)


@dataclass(frozen=True)
class Generation:
    """What of a generation decides: its items, counts, and which items its tower refuses.

    learns: whether this generation was live for a record of `clicks`
    """

    name: str
    items: frozenset[str]
    min_steps_before: int
    history_max: int
    refuses: Callable[[Mapping[str, Any]], bool] = lambda item: False
    learns: Callable[[Raw], bool] = lambda raw: True


class Sent(NamedTuple):
    """A record that ingest forwards.

    fields: of the event; origin: the record it comes from; first_ms: that one's first append
    """

    partition: int
    user_id: str
    fields: tuple[tuple[str, Any], ...]
    origin: str
    first_ms: int | None


class Tombstone(NamedTuple):
    """A record of `clicks` that ingest writes for a null record of `users`, its origin."""

    user_id: str
    until_ms: int
    keep_after_ms: int
    users_offset: int
    ends_ms: int
    origin: str


class Stray(NamedTuple):
    """A record of `items` or `users` that ingest forwards as it is."""

    partition: int
    key: bytes | None
    value: bytes | None
    origin: str
    first_ms: int


class Version(NamedTuple):
    """An item's last change. item: its fields; None where it is deleted."""

    partition: int
    offset: int
    item: dict[str, Any] | None


@dataclass
class State:
    """All that the logs say; see the module.

    clicked:    item slot -> item -> events that count for popularity
    item_times: first append of each item's last change
    again:      records of `items` after which ingest may append what the item has
    item_ends:  deleted item -> a record of `items` that was appended later finds no item; 0: never
    ended:      deleted items that have ended at the end of their partition
    refused:    item -> the last refused record, if it is newer than what the item has
    hidden:     items of these that are in no answer
    born:       item without a time -> first append of its first record
    repeated:   forwarded null records: a tombstone of that time or later is enough
    ends_ms:    append time of the last record of each partition of `clicks`
    item_log_ms: that of each partition of `items`
    visits:     (earlier item, later item) -> [thousandths of visits, next visits], but for the
                clicks of users before they are forgotten
    unsure:     item -> how many of those clicks it has. They may be in no pair, or in others: the
                null record of `users` deletes the history at once, before its Forget is read
    visited:    the items that any click names
    deleted:    items with a null record
    idle:       how often a user became idle and came back, or is idle at the end
    one_form:   whether spellings of an id are one
    """

    histories: dict[str, History] = field(default_factory=dict)
    embeddings: dict[str, dict[str, Embedding]] = field(default_factory=dict)
    windows: dict[int, dict[str, int]] = field(default_factory=dict)
    counts: dict[str, dict[int, dict[str, int]]] = field(default_factory=dict)
    clicked: dict[str, dict[str, int]] = field(default_factory=dict)
    profiles: dict[str, tuple[int, int, dict[str, Any]]] = field(default_factory=dict)
    ledger: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    items: dict[str, Version] = field(default_factory=dict)
    published: dict[str, dict[str, Version]] = field(default_factory=dict)
    item_times: dict[str, int] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)
    item_ends: dict[str, int] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    refused: dict[str, Raw] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    born: dict[str, int] = field(default_factory=dict)
    forwarded: set[Sent] = field(default_factory=set)
    strays: set[Stray] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)
    tombstones: set[Tombstone] = field(default_factory=set)
    letters: dict[str, str] = field(default_factory=dict)
    ends_ms: dict[int, int] = field(default_factory=dict)
    item_log_ms: dict[int, int] = field(default_factory=dict)
    visits: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    unsure: Counter[str] = field(default_factory=Counter)
    visited: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    idle: int = 0
    one_form: bool = True


class Model:
    """Applies logs. settings_of: the settings under which a record of `clicks` is applied.

    own_of:      a record of `clicks` in Eddyline's own format; None where it has no event
    settings:    those of users and items (but `hide_refused_items`), and of `clicks` where
                 `settings_of` is absent
    prefix:      of the topics' names in coordinates
    """

    def __init__(
        self,
        settings: Any,
        generations: Sequence[Generation],
        settings_of: Callable[[Raw], Any] | None = None,
        own_of: Callable[[Raw], Raw | None] = lambda raw: raw,
    ) -> None:
        self.state = State(one_form=plausible(settings).one_form)
        self.own_of = own_of
        self.settings = settings
        self.generations = generations
        self.settings_of = settings_of or (lambda raw: settings)
        for generation in generations:
            self.state.embeddings[generation.name] = {}
            self.state.published[generation.name] = {}

    # ---- users and items

    def users(self, records: Sequence[Raw]) -> None:
        """Apply one partition of `users`, from its beginning."""
        s, state = self.settings, self.state
        for raw in records:
            try:
                user, found = reading.profile(raw, s.far_future_ms_max, plausible(s))
            except Refused as refused:
                state.letters[raw.at] = refused.args[0]
                continue
            if not reading.has_place(raw, user, s.clicks_partitions):
                self._stray(raw, user, s.clicks_partitions)
                continue
            origin_ms = reading.number_header(raw, "origin_ms")
            offset, at_ms = (raw.offset, raw.timestamp) if origin_ms is None else (-1, origin_ms)
            if found is None:
                state.tombstones.add(tombstone_of(raw, user, s))
                if offset < 0:
                    state.repeated.add(raw.at)
            before = state.profiles.get(user)
            if before is not None and offset < 0 and at_ms < before[1]:
                continue  # forwarded or replayed, and older than the profile
            if offset < 0 and (after := appended_after(raw)) is not None:
                if before is not None and at_ms == before[1] and before[0] > after:
                    continue  # appended again, and older than the profile
                offset = after
            if found is None:
                state.profiles.pop(user, None)
            else:
                state.profiles[user] = (offset, at_ms, found)

    def items(self, records: Sequence[Raw]) -> None:
        """Apply one partition of `items`, from its beginning."""
        s, state = self.settings, self.state
        for raw in records:
            state.item_log_ms[raw.partition] = raw.timestamp
            read = reading.patch if s.items_patches else reading.item
            try:
                item_id, found = read(
                    raw, s.far_future_ms_max, s.item_vector_dimension, plausible(s)
                )
            except Refused as refused:
                self._refuse_item(raw, refused.args[0])
                continue
            if not reading.has_place(raw, item_id, s.items_partitions):
                self._stray(raw, item_id, s.items_partitions)
                continue
            if self._outdated(raw, item_id):
                state.again.add(raw.at)
                continue
            known = state.items.get(item_id)
            before = (known.item if known is not None else None) or {}
            if s.items_patches and found is not None:
                if not before and not any(found.get(n) for n in reading.BEGINS):
                    state.letters[raw.at] = "no_base"
                    continue
                found = reading.patched(before, found)
            elif s.refuse_emptied_items and found is not None and before:
                lost = {n: before[n] for n in ("title", "categories") if before.get(n)}
                lost = {name: value for name, value in lost.items() if not found[name]}
                if lost and found["available"]:
                    state.letters[raw.at] = "would_empty"
                    self._mark(raw, item_id)
                    continue
                if lost:
                    state.again.add(raw.at)
                found |= lost
            version = Version(raw.partition, raw.offset, found)
            shown = found is not None and found["available"]
            taken = [g for g in self.generations if not (shown and g.refuses(found or {}))]
            if taken:
                self._end_refused(raw, item_id, found)
            for generation in taken:
                self._publish(generation, item_id, version)
            if len(taken) < len(self.generations):
                state.letters[raw.at] = "bad_vector"
            if taken:
                state.items[item_id] = version
                state.item_times[item_id] = first_append_ms(raw)
                if found is None:
                    state.item_ends[item_id] = item_ends_ms(raw, self.settings_of(raw))
                    state.deleted.add(item_id)
                if found is None or found["at_ms"]:
                    state.born.pop(item_id, None)
                else:
                    state.born.setdefault(item_id, first_append_ms(raw))
            else:
                self._mark(raw, item_id)

    def _stray(self, raw: Raw, own: str, partitions: int) -> None:
        """A record that is sent on to the partition of its id, under that id."""
        place = reading.partition(own, partitions)
        found = Stray(place, own.encode(), raw.value, raw.at, first_append_ms(raw))
        self.state.strays.add(found)

    def _outdated(self, raw: Raw, item_id: str) -> bool:
        """Whether a record that was appended before is older than what the item has."""
        origin_ms = reading.number_header(raw, "origin_ms")
        if origin_ms is None or (version := self.state.items.get(item_id)) is None:
            return False
        if version.item is None and 0 < self.state.item_ends[item_id] < raw.timestamp:
            return False
        at_ms, after = self.state.item_times[item_id], appended_after(raw)
        if origin_ms == at_ms and after is not None:
            return version.partition == raw.partition and version.offset > after
        return origin_ms < at_ms

    def _refuse_item(self, raw: Raw, reason: str) -> None:
        """A dead letter; in its own partition the record of a key marks its item."""
        item_id = reading.item_of_key(raw, plausible(self.settings))
        if item_id is not None:
            if not reading.has_place(raw, item_id, self.settings.items_partitions):
                self._stray(raw, item_id, self.settings.items_partitions)
                return
            if self._outdated(raw, item_id):
                self.state.again.add(raw.at)
            else:
                self._mark(raw, item_id)
        self.state.letters[raw.at] = reason

    def _mark(self, raw: Raw, item_id: str) -> None:
        version = self.state.items.get(item_id)
        if version is None or version.item is None:
            return
        self.state.refused[item_id] = raw
        self.state.again.add(raw.at)
        if self.settings_of(raw).hide_refused_items or item_id in self.state.hidden:
            self.state.hidden.add(item_id)
            for generation in self.generations:
                self._publish(generation, item_id, Version(raw.partition, raw.offset, None))

    def _publish(self, generation: Generation, item_id: str, version: Version) -> None:
        """A generation's item record; a hidden item is retired."""
        shown = None if item_id in self.state.hidden else version.item
        self.state.published[generation.name][item_id] = version._replace(item=shown)

    def _end_refused(self, raw: Raw, item_id: str, found: Any) -> None:
        """An accepted record ends the mark; one that is older than the refused record does not."""
        refused = self.state.refused.get(item_id)
        if refused is None:
            return
        origin_ms = reading.number_header(raw, "origin_ms")
        again = reading.header(raw, "origin") == refused.at.encode()
        older = origin_ms is not None and first_append_ms(raw) < first_append_ms(refused)
        if found is None or not (again or older):
            del self.state.refused[item_id]
            self.state.hidden.discard(item_id)

    # ---- clicks

    def clicks(self, records: Sequence[Raw]) -> None:
        """Apply one partition of `clicks`, from its beginning."""
        self._find_forgets(records)
        for raw in records:
            s, state = self.settings_of(raw), self.state
            state.ends_ms[raw.partition] = raw.timestamp
            own_raw = self.own_of(raw)
            if own_raw is None:
                continue
            raw = own_raw
            try:
                event = reading.user_event(raw, s.far_future_ms_max, plausible(s))
            except Refused as refused:
                state.letters[raw.at] = refused.args[0]
                continue
            own = reading.partition(event["user_id"], s.clicks_partitions)
            if own != raw.partition:
                self._forward_stray(raw, event, own)
            elif not self._resent(raw, event, s):
                self._apply(raw, event, s)

    def finish(self) -> State:
        """What depends on whole logs: what has ended leaves, tombstones end profiles."""
        for item_id, version in list(self.state.items.items()):
            last_ms = self.state.item_log_ms[version.partition]
            if version.item is None and 0 < self.state.item_ends[item_id] < last_ms:
                del self.state.items[item_id]
                self.state.ended.add(item_id)
        for user, history in list(self.state.histories.items()):
            if history.last is not None:
                self._end_idle(user, self.state.ends_ms[history.last.partition])
        for buckets in self.state.counts.values():
            newest = max(buckets)
            for bucket in [b for b in buckets if b <= newest - self.settings.popular_buckets]:
                del buckets[bucket]
        for user, (until_ms, users_offset, _) in self.state.ledger.items():
            offset, at_ms, _ = self.state.profiles.get(user, (2**63, 2**63, {}))
            if offset < users_offset and at_ms <= until_ms - (offset < 0):
                del self.state.profiles[user]
        return self.state

    def _find_forgets(self, records: Sequence[Raw]) -> None:
        """Note the offset of each user's last Forget."""
        self.forgets: dict[str, int] = {}
        for raw in filter(None, map(self.own_of, records)):
            s = self.settings_of(raw)
            with suppress(Refused):
                event = reading.user_event(raw, s.far_future_ms_max, plausible(s))
                if event["type"] == "forget":
                    self.forgets[event["user_id"]] = raw.offset

    def _forward_stray(self, raw: Raw, event: Mapping[str, Any], own: int) -> None:
        doc = reading.document(raw.value)
        if event["type"] == "click" and event["event_id"] is None:
            doc["event_id"] = raw.at
        if event["type"] != "forget":
            doc["at_ms"] = event["at_ms"]  # also where it was left out
        names = [name for name in ("user_id", "item_id", "merge_into") if name in event]
        doc |= {name: event[name] for name in names}
        fields, first_ms = known_fields(doc), first_append_ms(raw)
        self.state.forwarded.add(Sent(own, event["user_id"], fields, raw.at, first_ms))

    def _resent(self, raw: Raw, event: Mapping[str, Any], s: Any) -> bool:
        event_id = event["event_id"]
        if event_id is None:
            return False
        window = self.state.windows.setdefault(raw.partition, {})
        before = window.get(event_id)
        if before is not None and raw.offset - before <= s.dedupe_window_events:
            return True
        window[event_id] = raw.offset
        return False

    def _apply(self, raw: Raw, event: dict[str, Any], s: Any) -> None:
        if event["type"] == "forget":
            self._forget(raw, event, s)
            return
        moved = event["type"] == "click" and (event["context"] or {}).get("eddyline.moved") is True
        if event["type"] == "click" and not moved:
            self._count(event, s)
        if self._forgotten(raw, event):
            return
        self._end_idle(event["user_id"], raw.timestamp)
        if event["type"] == "merge":
            self._merge(raw, event, s)
        else:
            self._click(raw, event, moved, s)

    def _forgotten(self, raw: Raw, event: Mapping[str, Any]) -> bool:
        until_ms, _, ends_ms = self.state.ledger.get(event["user_id"], (-1, -1, -1))
        origin_ms = reading.number_header(raw, "origin_ms")
        earlier = event["at_ms"] <= until_ms or (origin_ms is not None and origin_ms <= until_ms)
        return raw.timestamp <= ends_ms and earlier

    def _end_idle(self, user: str, now_ms: int) -> None:
        history = self.state.histories.get(user)
        if history is not None and 0 < history.idle_after_ms < now_ms:
            del self.state.histories[user]
            self._empty_embeddings(user)
            self.state.idle += 1

    def _forget(self, raw: Raw, event: Mapping[str, Any], s: Any) -> None:
        state, user = self.state, event["user_id"]
        new = (event["until_ms"], event["users_offset"], event["ends_ms"])
        old = state.ledger.get(user)
        if old is not None and raw.timestamp <= old[2]:
            if new[:2] <= old[:2]:
                return
            new = (max(new[0], old[0]), max(new[1], old[1]), max(new[2], old[2]))
        state.ledger[user] = new
        self._end_idle(user, raw.timestamp)
        self._empty_embeddings(user)
        history = state.histories.pop(user, History())
        bound_ms = event["keep_after_ms"]
        kept = [entry for entry in history.entries if entry.at_ms > bound_ms]
        if kept:
            later = {name: m for name, m in history.beyond.items() if m * MINUTE_MS > bound_ms}
            idle_ms = idle_after_ms(raw, s)
            state.histories[user] = History(kept, history.newest_ms, raw, idle_ms, later)

    def _merge(self, raw: Raw, event: Mapping[str, Any], s: Any) -> None:
        into, history = event["merge_into"], self.state.histories.pop(event["user_id"], History())
        self._empty_embeddings(event["user_id"])
        own = reading.partition(into, s.clicks_partitions)
        oldest_first = history.entries[::-1]
        for number, entry in enumerate(oldest_first):
            equal = oldest_first[:number].count(entry)
            last = number == len(oldest_first) - 1
            fields: dict[str, Any] = {
                "user_id": into,
                **entry._asdict(),
                "event_id": f"merge/{raw.partition}/{raw.offset}/{number}",
                "context": {"eddyline.moved": True}
                | ({"eddyline.equal": equal} if equal else {})
                | (carried(newest_of(history.beyond, s.seen_items_max)) if last else {}),
            }
            first_ms = first_append_ms(raw)
            self.state.forwarded.add(Sent(own, into, known_fields(fields), raw.at, first_ms))

    def _click(self, raw: Raw, event: Mapping[str, Any], moved: bool, s: Any) -> None:
        user = event["user_id"]
        history = self.state.histories.setdefault(user, History())
        entry = Entry(event["item_id"], event["at_ms"], event["kind"], strength(event, s))
        oldest_ms = history.newest_ms - 1_000 * s.lateness_s_max if s.lateness_s_max else -1
        late = not moved and entry.at_ms < oldest_ms
        if not moved and not late and entry.kind != "dislike":
            self._learn(raw, event, history.entries)
        before, history.newest_ms = history.newest_ms, max(history.newest_ms, entry.at_ms)
        history.last, history.idle_after_ms = raw, idle_after_ms(raw, s)
        equal = (event["context"] or {}).get("eddyline.equal", 0) if moved else 0
        if moved and s.seen_items_max:
            until_ms, _, ends_ms = self.state.ledger.get(user, (-1, -1, -1))
            for name, minute in brought(event["context"]):
                if minute * MINUTE_MS > until_ms or raw.timestamp > ends_ms:
                    history.beyond[name] = max(minute, history.beyond.get(name, 0))
        if late:
            note(history.beyond, [entry], s)
        if late or (moved and history.entries.count(entry) > equal):
            return
        place = sum(other.at_ms > entry.at_ms for other in history.entries)
        history.entries.insert(place, entry)
        gone = history.entries[s.history_length_max :]
        del history.entries[s.history_length_max :]
        if s.history_age_s_max:
            limit = max(before, entry.at_ms) - 1_000 * s.history_age_s_max
            gone += [other for other in history.entries if other.at_ms < limit]
            history.entries = [other for other in history.entries if other.at_ms >= limit]
        note(history.beyond, gone, s)
        self.state.visited.add(entry.item_id)
        if not moved and entry.kind != "dislike" and place < len(history.entries):
            if raw.offset < self.forgets.get(user, -1):
                self.state.unsure[entry.item_id] += 1
                return
            for other, distance in pairs_of(history.entries, place, s.co_visit_items):
                counts = self.state.visits.setdefault((other, entry.item_id), [0, 0])
                counts[0] += round(1_000 / distance)
                counts[1] += distance == 1

    def _learn(self, raw: Raw, event: Mapping[str, Any], entries: Sequence[Entry]) -> None:
        for generation in self.generations:
            if event["item_id"] not in generation.items or not generation.learns(raw):
                continue
            users = self.state.embeddings[generation.name]
            embedding = users.setdefault(event["user_id"], Embedding())
            if embedding.counted >= generation.min_steps_before:
                key = event["event_id"] or f"{raw.partition}/{raw.offset}"
                liked = [i for i in liked_items(entries) if i in generation.items]
                history = tuple(liked[: generation.history_max])
                embedding.learned.append(Learned(event["item_id"], history, key))
            embedding.counted += 1

    def _empty_embeddings(self, user: str) -> None:
        for users in self.state.embeddings.values():
            users.pop(user, None)

    def _count(self, event: Mapping[str, Any], s: Any) -> None:
        thousandths = round(1_000 * strength(event, s) * s.kind_weights[event["kind"]])
        if thousandths:
            slots = s.item_slots
            slot = f"i{reading.partition(event['item_id'], slots)}" if slots > 1 else "i0"
            buckets = self.state.counts.setdefault(slot, {})
            bucket = buckets.setdefault(event["at_ms"] // (1_000 * s.popular_bucket_s), {})
            bucket[event["item_id"]] = bucket.get(event["item_id"], 0) + thousandths
            clicked = self.state.clicked.setdefault(slot, {})
            clicked[event["item_id"]] = clicked.get(event["item_id"], 0) + 1


def tombstone_of(raw: Raw, user: str, s: Any) -> Tombstone:
    """What ingest writes to `clicks` for a null record of `users`."""
    until_ms = first_append_ms(raw)
    keep_after_ms = min(until_ms + s.far_future_ms_max, reading.LAST_MS)
    ends_ms = until_ms + s.forgotten_kept_d * 86_400_000
    return Tombstone(user, until_ms, keep_after_ms, raw.offset, ends_ms, raw.at)


def note(beyond: dict[tuple[int, int], int], entries: Sequence[Entry], s: Any) -> None:
    """Events that are not in the list, for `History.beyond`."""
    for entry in entries if s.seen_items_max else ():
        name = item_key(entry.item_id), reading.KINDS.index(entry.kind)
        beyond[name] = max(entry.at_ms // MINUTE_MS, beyond.get(name, 0))


def seen_items_of(state: State, items_max: int) -> dict[str, list[tuple[int, int, int]]]:
    """User -> `newest_of` what the user had beyond the list, where there is any."""
    found = {user: newest_of(h.beyond, items_max) for user, h in state.histories.items()}
    return {user: newest for user, newest in found.items() if newest}


def histories_of(state: State) -> dict[str, tuple[Any, ...]]:
    """User -> (entries, newest_ms, partition, offset, append time, idle_after_ms)."""
    return {
        user: (
            [tuple(entry) for entry in h.entries],
            h.newest_ms,
            h.last.partition,
            h.last.offset,
            h.last.timestamp,
            h.idle_after_ms,
        )
        for user, h in state.histories.items()
        if h.last is not None
    }


def applied(
    settings: Any,
    generations: Sequence[Generation],
    logs: Mapping[str, Mapping[int, Sequence[Raw]]],
    settings_of: Callable[[Raw], Any] | None = None,
    own_of: Callable[[Raw], Raw | None] = lambda raw: raw,
) -> State:
    """The state that whole logs give. logs: topic without prefix -> partition -> records."""
    model = Model(settings, generations, settings_of, own_of)
    for apply, topic in ((model.items, "items"), (model.users, "users"), (model.clicks, "clicks")):
        for partition in sorted(logs.get(topic, {})):
            apply(logs[topic][partition])
    return model.finish()
