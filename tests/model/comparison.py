"""What real Redis and real Kafka hold against the second model: state, and every record sent.

The model decides what happened, record by record. The product's code is used for two things only:
reading what it stored, and the arithmetic of a micro-step, whose order and arguments the model
gives.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from eddyline.errors import Rejected
from eddyline.kafka import topics as kafka_topics
from eddyline.schema import co_visits, seen_items
from eddyline.schema.event_decay import decays
from eddyline.schema.events import KINDS
from eddyline.schema.item_record import decode_record
from eddyline.settings.loader import Settings
from eddyline.stores import redis_client
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Source, UserQuery
from embeddings.bundle.bundle import Bundle
from streams.dead_letters import KEY_BYTES_MAX
from tests.decayed_events import plain_counts, stored_counts
from tests.model import model, reading, rules
from tests.model.eras import Era, era_of
from tests.model.reading import Raw
from tests.oracle import Compared
from tests.topics import Topics

# The reason of a stray that does not fit with its origin, and the least bytes of such a value.
TOO_LARGE, LARGE_BYTES = "too_large", 1_000_000
# More than any bucket of popularity counts holds.
ALL = 2**31 - 1
USERS_AT_ONCE = ITEMS_AT_ONCE = 500
DIRECTIONS = ("after", "before")
_USER_KEY = re.compile(r"\{(?P<slot>u\d+)\}:(?:[hop]|seen|e:[^:]+):(?P<user>.*)", re.DOTALL)
_ERASURE_KEY = re.compile(r"\{(?P<slot>u\d+)\}:f:(?P<digest>[0-9a-f]{64})")


def raw_of(record: Any) -> Raw:
    """A record of a client."""
    headers = tuple((name, value) for name, value in record.headers)
    return Raw(
        record.topic,
        record.partition,
        record.offset,
        record.timestamp,
        record.key,
        record.value,
        headers,
    )


def logs_of(topics: Topics) -> dict[str, dict[int, list[Raw]]]:
    """The source topics in the model's form."""
    return {
        name: {
            partition: [raw_of(record) for record in records]
            for partition, records in topics.by_partition(name).items()
        }
        for name in kafka_topics.SOURCES
    }


def generation_of(towers: Bundle, eras: Sequence[Era]) -> model.Generation:
    """What of a bundle decides."""
    find = era_of(eras)
    return model.Generation(
        towers.generation,
        frozenset(towers.rows),
        towers.micro.min_steps_before,
        towers.user_tower.history_max,
        learns=lambda raw: find(raw).generation == towers.generation,
    )


def compare(
    topics: Topics,
    bundles: Sequence[Bundle],
    eras: Sequence[Era],
    optional: frozenset[str] = frozenset(),
    any_reason: bool = False,
    own_of: Callable[[Raw], Raw | None] = lambda raw: raw,
    with_strays: bool = False,
    ended: Collection[str] = (),
) -> Compared:
    """Every difference between the model and what Redis and Kafka hold.

    bundles:  of every generation of the eras
    optional: records that compaction removed, perhaps before ingest read them: what they cause to
              be sent need not be there
    own_of:   see `model.Model`
    with_strays: also records of `items` and `users` in a wrong partition, none of them too large
    ended: generations of which nothing may be left
    any_reason: a dead letter may name another reason: records may be bad in several ways
    """
    settings, find = eras[-1].settings, era_of(eras)
    logs, found = logs_of(topics), Compared()
    generations = [generation_of(towers, eras) for towers in bundles]
    want = model.applied(settings, generations, logs, lambda raw: find(raw).settings, own_of)
    _take_too_large(topics, logs["clicks"], want)
    real = RedisStore(settings)
    try:
        _users(settings, real, want, bundles, ended, found)
        window = min(era.settings.dedupe_window_events for era in eras)
        for partition, records in logs["clicks"].items():
            floor = records[-1].offset + 1 - window
            _window(real, partition, floor, want, found)
        _counts(settings, real, want, found)
        _co_visits(settings, real, want, found)
        _items(settings, real, want, found)
    finally:
        real.close()
    _published(topics, eras[-1].generation, want, found)
    _letters(topics, logs, want, optional, any_reason, found)
    found.differences += sent_differences(logs["clicks"], want, optional, own_of)
    if with_strays:
        found.differences += stray_differences(logs, want, optional)
        found.counts["model's stray of items and users"] = len(want.strays)
    found.counts["model's idle user"] = want.idle
    found.counts["model's ended item"] = len(want.ended)
    return found


def sent_differences(
    clicks: Mapping[int, Sequence[Raw]],
    want: model.State,
    optional: frozenset[str] = frozenset(),
    own_of: Callable[[Raw], Raw | None] = lambda raw: raw,
) -> list[str]:
    """Records that ingest forwarded to `clicks`, against the model.

    optional: origins of which a record need not have been sent (compaction removed them)
    own_of:   see `model.Model`
    A null record of `users` deletes the visitor's history at once, before its Forget in `clicks` is
    read. So a merge that lies before that Forget may move fewer entries, and among them late ones
    for which the longer list had no room.
    """
    forwarded, tombstones, wrong = set(), set(), []
    records = [own for part in clicks.values() for raw in part if (own := own_of(raw)) is not None]
    forgets = _forgets(records, want)
    for raw in records:
        origin = reading.header(raw, "origin")
        if origin is None:
            continue
        at, of_users = origin.decode(errors="replace"), f"{raw.topic.removesuffix('clicks')}users/"
        if not at.startswith((f"{raw.topic}/", of_users)):
            continue  # a producer's own header
        doc = _event(raw, want)
        if raw.key is None or raw.key.decode() != doc["user_id"]:
            wrong.append(f"{raw.at} has the key {raw.key!r}")
        if at.startswith(of_users):
            names = "user_id", "forget_until_ms", "keep_after_ms", "users_offset", "ends_ms"
            tombstones.add(model.Tombstone(*(doc[name] for name in names), at))
        else:
            first_ms = reading.number_header(raw, "origin_ms")
            fields = rules.known_fields(_unnumbered(doc))
            forwarded.add(model.Sent(raw.partition, doc["user_id"], fields, at, first_ms))
    by_at = {raw.at: raw for raw in records}
    expected = {
        s._replace(fields=rules.known_fields(_unnumbered(dict(s.fields)))) for s in want.forwarded
    }
    missing = [s for s in expected - forwarded if not _may_lack(by_at[s.origin], s, forgets, want)]
    counts = Counter(s.origin for s in forwarded), Counter(s.origin for s in expected)
    extra = [
        s
        for s in forwarded - expected
        if counts[0][s.origin] > counts[1][s.origin] or not _had_no_room(by_at, s, forgets, want)
    ]
    latest = {one.user_id: one.until_ms for one in sorted(tombstones, key=lambda t: t.until_ms)}
    unsent = [
        one
        for one in want.tombstones - tombstones
        if one.origin not in optional
        and not (one.origin in want.repeated and latest.get(one.user_id, -1) >= one.until_ms)
    ]
    return wrong + [
        f"{what}: {sorted(map(str, some))}"
        for what, some in (
            ("not forwarded", missing),
            ("forwarded without a reason", extra),
            ("no tombstone", unsent),
            ("a tombstone without a reason", tombstones - want.tombstones),
        )
        if some
    ]


def stray_differences(
    logs: Mapping[str, Mapping[int, Sequence[Raw]]],
    want: model.State,
    optional: frozenset[str] = frozenset(),
) -> list[str]:
    """Records of `items` and `users` that ingest forwarded to their own partition.

    A profile that an erasure covers need not be sent. optional: as for `compare`
    """
    sent = set()
    for topic in ("items", "users"):
        for raw in (raw for part in logs.get(topic, {}).values() for raw in part):
            at = (reading.header(raw, "origin") or b"").decode(errors="replace")
            again = at.rpartition("/")[0] in ("", f"{raw.topic}/{raw.partition}")
            if again and not reading.header(raw, "respelled"):
                continue  # a producer's own, or a newer state that was appended again
            first_ms = rules.first_append_ms(raw)
            sent.add(model.Stray(raw.partition, raw.key, raw.value, at, first_ms))
    erased = {user: until_ms for user, (until_ms, _, _) in want.ledger.items()}
    missing = [
        one
        for one in want.strays - sent
        if one.origin not in optional
        and (one.value is None or erased.get((one.key or b"").decode(), -1) <= one.first_ms)
    ]
    return [
        f"{what}: {sorted(map(str, some))}"
        for what, some in (
            ("not forwarded", missing),
            ("forwarded without a reason", sent - want.strays),
        )
        if some
    ]


def compacted(
    logs: Mapping[str, Mapping[int, Sequence[Raw]]], refused: Collection[str]
) -> dict[str, dict[int, list[Raw]]]:
    """The logs as compaction may leave them: of `items` and `users` the last record of each key.

    refused: coordinates of dead letters; such a record of `users` hides the one before it, whatever
             ingest does, and is left out here
    """
    found: dict[str, dict[int, list[Raw]]] = {}
    for topic, parts in logs.items():
        found[topic] = {p: list(records) for p, records in parts.items()}
        if topic != "clicks":
            for partition, records in parts.items():
                good = [raw for raw in records if topic == "items" or raw.at not in refused]
                last = {raw.key: raw.offset for raw in good}
                found[topic][partition] = [r for r in good if last[r.key] == r.offset]
    return found


def _unnumbered(doc: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an event; a moved entry without its number among those of its merge."""
    moved = (dict(doc["context"] or {}) if "context" in doc else {}).get("eddyline.moved") is True
    return {**doc, "event_id": "moved"} if moved else dict(doc)


def _event(raw: Raw, want: model.State) -> dict[str, Any]:
    """The fields of a record of `clicks`, its ids in their form. Raises reading.Refused."""
    doc = reading.document(raw.value)
    if want.one_form:
        names = [n for n in ("user_id", "item_id", "merge_into") if isinstance(doc.get(n), str)]
        doc |= {name: reading.in_nfc(doc[name]) for name in names}
    return doc


def _forgets(records: Sequence[Raw], want: model.State) -> dict[str, int]:
    """User -> the highest offset of a Forget record in the user's partition."""
    found: dict[str, int] = {}
    for raw in records:
        try:
            doc = _event(raw, want)
        except reading.Refused:
            continue
        user = doc.get("user_id")
        if "forget_until_ms" in doc and isinstance(user, str):
            found[user] = max(raw.offset, found.get(user, -1))
    return found


def _take_too_large(topics: Topics, clicks: Mapping[int, Sequence[Raw]], want: model.State) -> None:
    """Of a large stray the size with all its headers decides; a dead letter is as good."""
    large = {r.at for part in clicks.values() for r in part if len(r.value or b"") > LARGE_BYTES}
    for record in topics.records[kafka_topics.DEAD_LETTERS]:
        at = (record.key or b"").decode(errors="replace")
        if at in large and dict(record.headers).get("reason") == TOO_LARGE.encode():
            sent = {one for one in want.forwarded if one.origin == at}
            if sent:
                want.forwarded -= sent
                want.letters[at] = TOO_LARGE


def _may_lack(origin: Raw, sent: model.Sent, forgets: Mapping[str, int], want: model.State) -> bool:
    moved = dict(sent.fields)["event_id"] == "moved"
    visitor = _event(origin, want)["user_id"]
    return moved and forgets.get(visitor, -1) > origin.offset


def _had_no_room(
    by_at: Mapping[str, Raw], sent: model.Sent, forgets: Mapping[str, int], want: model.State
) -> bool:
    """Whether a merge that may lack entries moved this one, which the visitor did click."""
    origin = by_at.get(sent.origin)
    if origin is None or not _may_lack(origin, sent, forgets, want):
        return False
    visitor, entry = _event(origin, want)["user_id"], dict(sent.fields)
    same = ("item_id", "at_ms", "kind")
    for raw in by_at.values():
        if raw.partition == origin.partition and raw.offset < origin.offset:
            try:
                doc = _event(raw, want)
            except reading.Refused:
                continue
            if doc.get("user_id") == visitor and all(doc.get(n) == entry[n] for n in same):
                return True
    return False


def embeddings_of(towers: Bundle, want: model.State) -> dict[str, tuple[int, bytes]]:
    """User -> (counted events, float32[d]) as the model's steps give them."""
    of_users = want.embeddings[towers.generation]
    zero = np.zeros(towers.dimension, "<f4")
    vectors = dict.fromkeys(of_users, zero)
    longest = max((len(e.learned) for e in of_users.values()), default=0)
    for number in range(longest):
        users = [user for user, e in of_users.items() if len(e.learned) > number]
        steps = [of_users[user].learned[number] for user in users]
        forward = towers.user_tower.encode(
            towers.item_vectors,
            [tuple(towers.rows[item] for item in step.history) for step in steps],
            [{} for _ in steps],
        )
        after = towers.micro.step(
            forward,
            np.stack([vectors[user] for user in users]),
            [towers.rows[step.item_id] for step in steps],
            [step.key for step in steps],
        )
        vectors.update(zip(users, np.ascontiguousarray(after, "<f4"), strict=True))
    return {user: (e.counted, vectors[user].tobytes()) for user, e in of_users.items()}


def _users(
    settings: Settings,
    real: RedisStore,
    want: model.State,
    bundles: Sequence[Bundle],
    ended: Collection[str],
    found: Compared,
) -> None:
    names, erasures = _names(settings)
    learned = {towers.generation: embeddings_of(towers, want) for towers in bundles}
    names |= want.histories.keys() | want.profiles.keys() | want.ledger.keys()
    for of_users in learned.values():
        names |= of_users.keys()
    by_partition: dict[int, list[str]] = {}
    for user in sorted(names):
        by_partition.setdefault(reading.partition(user, settings.clicks_partitions), []).append(
            user
        )
    histories = model.histories_of(want)
    seen = model.seen_items_of(want, settings.seen_items_max)
    for partition, users in by_partition.items():
        source = Source(kafka_topics.CLICKS, partition)
        for first in range(0, len(users), USERS_AT_ONCE):
            some = users[first : first + USERS_AT_ONCE]
            query = UserQuery(f"u{partition}", source, some, [*learned], some)
            [read] = real.read_many([query])
            for user in some:
                idle = read.is_idle(user)
                mine = None if idle else read.histories.get(user)
                shown = None if mine is None else history_of(mine)
                found.same("model's history", user, shown, histories.get(user))
                beyond = b"" if idle else read.seen.get(user, b"")
                had = seen_of(beyond, settings.seen_items_max)
                found.same("model's seen items", user, had, seen.get(user, []))
                for generation, of_users in learned.items():
                    have = None if idle else read.embeddings[generation].get(user)
                    what, expected = f"model's embedding {generation}", of_users.get(user)
                    if generation in ended:
                        found.same(what, user, have, None)
                    elif (have or expected) is not None:
                        found.same(what, user, have, expected)
                profile = read.profiles.get(user)
                place = read.profile_places.get(user)
                kept = None if profile is None else (*(place or ()), dict(profile))
                found.same("model's profile", user, kept, want.profiles.get(user))
                known = read.erasures.get(user)
                ledger = (
                    None if known is None else (known.until_ms, known.users_offset, known.ends_ms)
                )
                found.same("model's erasure", user, ledger, want.ledger.get(user))
    digests = {hashlib.sha256(user.encode()).hexdigest() for user in want.ledger}
    found.same("model's erasures", "", sorted(erasures - digests), [])


def history_of(history: Any) -> tuple[Any, ...]:
    """A stored history in the form of `model.histories_of`."""
    entries = [(e.item_id, e.at_ms, KINDS[e.kind], e.weight) for e in history.entries]
    stamps = history.partition, history.offset, history.appended_ms, history.idle_after_ms
    return entries, history.at_ms, *stamps


def seen_of(stored: bytes, items_max: int) -> list[tuple[int, int, int]]:
    """Stored seen items in the form of `rules.newest_of`."""
    found = struct.iter_unpack("<QI", seen_items.canonical(stored, items_max))
    return [(stamp // 8, stamp % 8, key) for key, stamp in found]


def _names(settings: Settings) -> tuple[set[str], set[str]]:
    """Users with any state in Redis, and the digests of its erasures."""
    users, digests = set(), set()
    client = redis_client.client(settings, timeout_ms=30_000)
    try:
        for raw in client.scan_iter(match=f"{settings.key_prefix}{{u*", count=1_000):
            key = raw.decode().removeprefix(settings.key_prefix)
            if (erasure := _ERASURE_KEY.fullmatch(key)) is not None:
                digests.add(erasure["digest"])
            elif (parts := _USER_KEY.fullmatch(key)) is not None:
                users.add(parts["user"])
    finally:
        client.close()
    return users, digests


def _window(
    real: RedisStore, partition: int, floor: int, want: model.State, found: Compared
) -> None:
    read = real.read_slot(f"u{partition}", Source(kafka_topics.CLICKS, partition))
    have, expected = (
        {e: at for e, at in ids.items() if at >= floor}
        for ids in (read.accepted, want.windows.get(partition, {}))
    )
    found.same_maps("model's event id", f"u{partition}", have, expected)


def _counts(settings: Settings, real: RedisStore, want: model.State, found: Compared) -> None:
    for shard in range(settings.item_slots):
        have, expected = real.popular(f"i{shard}", ALL), want.counts.get(f"i{shard}", {})
        for bucket in have.keys() | expected.keys():
            found.same_maps(
                "model's count",
                f"i{shard}:{bucket}",
                have.get(bucket, {}),
                expected.get(bucket, {}),
            )
        found.same_maps(
            "model's events of an item",
            f"i{shard}",
            stored_counts(real, f"i{shard}", decays(settings)),
            plain_counts(want.clicked.get(f"i{shard}", {})),
        )


def _co_visits(settings: Settings, real: RedisStore, want: model.State, found: Compared) -> None:
    items, slots = sorted(want.visited), settings.item_slots
    for first in range(0, len(items), ITEMS_AT_ONCE):
        some = items[first : first + ITEMS_AT_ONCE]
        for kind, rows in zip(DIRECTIONS, real.read_co_visits(some, some, slots), strict=True):
            for item, row in zip(some, rows, strict=True):
                have = co_visits.summary(row, settings.co_visit_row_max)
                if difference := row_difference(have, want, kind, item):
                    found.differences.append(f"model's row {kind} {item}: {difference}")
                found.counts["model's row"] = found.counts.get("model's row", 0) + 1


def row_difference(have: co_visits.Summary, want: model.State, kind: str, item: str) -> str:
    """How a co-visitation row differs from the model's; "" if it does not.

    A deleted item's rows may have ended with it, and then begun anew. For clicks of users who are
    forgotten later see `model.State`.
    """
    pairs = want.visits.items()
    others = (
        {b: counts for (a, b), counts in pairs if a == item}
        if kind == "after"
        else {a: counts for (a, b), counts in pairs if b == item}
    )
    sums = tuple(map(sum, zip(*others.values(), strict=True))) or (0, 0)
    unlike = f"{have}, the model has {sums}: {others}"
    # A click is counted with at most 1 + 1/2 + … items, 3 in all.
    most = sums[0] + 3_000 * want.unsure[item] if kind == "before" or not want.unsure else 2**63
    if have.milli > most:
        return unlike
    if item in want.deleted:
        return ""
    keys = {rules.item_key(other): tuple(counts) for other, counts in others.items()}
    if item not in want.unsure:
        whole = (have.milli, have.next) == sums and have.counts in (None, keys)
        return "" if whole else unlike
    counts = keys if have.counts is None else have.counts
    less = have.milli < sums[0] or have.next < sums[1]
    less |= any(n < m for key in keys for n, m in zip(counts.get(key, (0, 0)), keys[key]))
    return unlike if less else ""


def _items(settings: Settings, real: RedisStore, want: model.State, found: Compared) -> None:
    ids = sorted(want.items.keys() | want.ended)
    cards = real.read_item_metadata(ids, settings.item_slots)
    # Those that have ended may be there still.
    cards = {
        i: c for i, c in cards.items() if not c.has_ended(want.item_log_ms.get(c.partition, 0))
    }
    have = {i: (c.partition, c.offset, _fields(c.body)) for i, c in cards.items()}
    found.same_maps("model's item", "", have, {i: tuple(v) for i, v in want.items.items()})


def _fields(body: bytes) -> dict[str, Any] | None:
    return json.loads(body) if body else None


def _published(topics: Topics, generation: str, want: model.State, found: Compared) -> None:
    last: dict[str, tuple[int, int, bool]] = {}
    for record in topics.records[kafka_topics.item_vectors(generation)]:
        if record.key is None or record.value is None:
            continue  # not from ingest
        try:
            made = decode_record(record.key, record.value)
        except Rejected:  # not from ingest
            continue
        last[made.item_id] = made.partition, made.offset, made.retired
    expected = {
        item_id: (v.partition, v.offset, v.item is None or not v.item["available"])
        for item_id, v in want.published[generation].items()
    }
    found.same_maps(f"model's item vector {generation}", "", last, expected)


def _is_letter(key: bytes, topics: Topics) -> bool:
    """Whether a key names a record of a source topic. Others may write to `dead-letters` too."""
    return any(
        key.decode(errors="replace").startswith(f"{records[0].topic}/")
        for name, records in topics.records.items()
        if name in kafka_topics.SOURCES and records
    )


def _letters(
    topics: Topics,
    logs: Mapping[str, Mapping[int, Sequence[Raw]]],
    want: model.State,
    optional: frozenset[str],
    any_reason: bool,
    found: Compared,
) -> None:
    """Every dead letter has its reason, and key and value of its record, at most so long."""
    records = {raw.at: raw for parts in logs.values() for part in parts.values() for raw in part}
    have, expected = {}, {}
    for record in topics.records[kafka_topics.DEAD_LETTERS]:
        headers = dict(record.headers)
        if "replayed" in headers or record.key is None or not _is_letter(record.key, topics):
            continue
        reason = "" if any_reason else headers["reason"].decode()
        have[record.key.decode()] = reason, headers.get("key"), record.value
    for at, reason in want.letters.items():
        if at in have or at not in optional:
            raw = records[at]
            key = raw.key and raw.key[:KEY_BYTES_MAX]
            # With the key under which it was sent on, where the broker refused that.
            if reason == TOO_LARGE and have.get(at, ("", b"", b""))[1] != key:
                key = _event(raw, want)["user_id"].encode()
            expected[at] = "" if any_reason else reason, key, raw.value or b""
    found.same_maps("model's dead letter", "", have, expected)
