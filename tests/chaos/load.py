"""The load of a chaos run: clicks, items and profiles at a steady rate, some of them invalid.

Every record is drawn from the seed. The event ids that the broker acknowledged are kept: all of
them have to be in the topic at the end; the oracle checks their effects.

The groups of users make the state a function of each topic alone: shoppers click items of the
generation and have no profile; members have profiles and click unknown items; leavers have
profiles, are forgotten, and click nothing; visitors and returners have no profile, click, are
forgotten or merged, and click again, with device clocks that are behind or ahead. A profile counts
in a micro-step, and between two topics there is no order.

With `items_patches`, a change of an item is a patch (`tests.chaos.patches`), and some changes say
that they were appended seconds ago, as those of a replay do.

Clicks come through producers of every codec: kafka-python without one, librdkafka with each. Some
are records of another system, which the topic's map reads (`tests.chaos.foreign`).
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import msgspec
from confluent_kafka import Producer
from kafka import KafkaProducer

from eddyline.kafka import producers, topics
from eddyline.schema import events
from eddyline.schema.events import Click, Item, Merge, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from tests.chaos import foreign, patches

log = logging.getLogger(__name__)

SHOPPERS, VISITORS, MEMBERS, LEAVERS, RETURNERS = 300, 60, 40, 20, 30
UNKNOWN_ITEMS = 40
CODECS = ("gzip", "snappy", "lz4", "zstd")
# Clock errors of a visitor's device, within the tolerance for the far future.
CLOCKS_MS = (0, 0, 0, 2_000, -2_000, 30_000, -30_000, 240_000, -240_000)
# Longer than deleted items are kept.
LATE_MS_MAX = 30_000
# Clicks of one transaction.
TRANSACTION = 10
TRANSACTION_MS = 10_000
# Re-sends repeat one of this many last events: far inside the window of every partition.
RECENT_MAX = 2_000
TICK_S = 0.02
# After a stall the load catches up at most this much at once.
BEHIND_S_MAX = 2.0
KINDS = ("click", "click", "click", "view", "view", "like", "cart", "purchase", "dislike")
MALFORMED = (
    b"{",
    b"[]",
    b"null",
    b'{"user_id": "s1"}',
    b'{"user_id": "", "item_id": "f1", "at_ms": 1}',
    b'{"user_id": "s1", "item_id": "f1", "at_ms": 1}',
)


class Load:
    """A thread that sends until it is stopped.

    sent:  records given to the producer, by kind
    acked: event ids that the broker has acknowledged
    """

    def __init__(
        self,
        settings: Settings,
        catalogue: Sequence[Item],
        *,
        rate: float,
        seed: int,
        lateness_s: int,
    ) -> None:
        self.sent: Counter[str] = Counter()
        self.acked: set[str] = set()
        self.failed: Counter[str] = Counter()
        self._settings = settings
        self._items = list(catalogue)
        self._rate = rate
        self._rng = random.Random(f"load-{seed}")
        self._lateness_s = lateness_s
        self._bursts: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._recent: deque[Click] = deque(maxlen=RECENT_MAX)
        self._number = 0
        self._stop = threading.Event()
        self._producer: Any = None
        self._codecs: list[Any] = []
        self._transactional: Any = None
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def start(self) -> None:
        """Start sending."""
        self._thread.start()

    def burst(self, kind: str, count: int) -> None:
        """Send so many `duplicates`, `reordered`, `strays` or `transactions` at once."""
        self._bursts.put((kind, count))

    def stop(self, timeout_s: float = 60) -> None:
        """Stop sending; returns once the broker has every record. Raises TimeoutError."""
        self._stop.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the load did not end in {timeout_s:.0f} s")

    # ---- the thread

    def _run(self) -> None:
        begun, made = time.monotonic(), 0
        while not self._stop.is_set():
            try:
                if self._producer is None:
                    self._open_producers()
                due = int((time.monotonic() - begun) * self._rate)
                if due - made > BEHIND_S_MAX * self._rate:
                    made = due - int(BEHIND_S_MAX * self._rate)
                for _ in range(due - made):
                    made += 1
                    self._send_one()
                while not self._bursts.empty():
                    kind, count = self._bursts.get()
                    if kind == "transactions":
                        self._transactions(count)
                        continue
                    for _ in range(count):
                        getattr(self, f"_{kind}")()
            except Exception as error:  # a dead broker broke the producer: go on with a new one
                self.failed[type(error).__name__] += 1
                log.info("the load opens a new producer: %r", error)
                self._close_producer(timeout_s=0)
                self._stop.wait(0.2)
            self._stop.wait(TICK_S)
        self._close_producer(timeout_s=30)

    def _open_producers(self) -> None:
        self._producer = producers.make_producer(self._settings, linger_ms=5)
        if not self._codecs:  # librdkafka finds a new broker by itself
            common = {
                "bootstrap.servers": self._settings.kafka_bootstrap_servers,
                "enable.idempotence": True,
                "linger.ms": 20,
                "partitioner": "murmur2_random",
            }
            self._codecs = [
                Producer({**common, "compression.type": codec}, logger=log) for codec in CODECS
            ]

    def _close_producer(self, timeout_s: float) -> None:
        self._close_transactional()
        for one in self._codecs:
            one.flush(timeout_s) if timeout_s else one.poll(0)
        producer, self._producer = self._producer, None
        if producer is None:
            return
        try:
            if timeout_s:
                producer.flush(timeout=timeout_s)
            producer.close(timeout=timeout_s or 1)
        except Exception as error:
            self.failed[type(error).__name__] += 1

    def _send_one(self) -> None:
        dice = self._rng.random()
        if dice < 0.90:
            self._shopper()
        elif dice < 0.925:
            self._duplicates()
        elif dice < 0.945:
            self._reordered()
        elif dice < 0.960:
            self._click(f"m{self._below(MEMBERS)}", f"new-{self._below(UNKNOWN_ITEMS)}")
        elif dice < 0.985:
            self._catalogue()
        elif dice < 0.990:
            self._profile()
        elif dice < 0.993:
            self._forget()
        elif dice < 0.996:
            self._merge()
        elif dice < 0.998:
            self._strays()
        else:
            self._malformed()

    def _below(self, n: int) -> int:
        """A number below n, small ones more often."""
        return int(n * self._rng.random() ** 2)

    def _shopper(self) -> None:
        dice, back_ms = self._rng.random(), 0
        user = f"s{self._below(SHOPPERS)}"
        if dice < 0.2:
            user = f"g{self._below(VISITORS)}" if dice < 0.1 else f"r{self._below(RETURNERS)}"
            back_ms = self._rng.choice(CLOCKS_MS)
        # One in a hundred has no event id: ingest uses its coordinates.
        self._click(user, self._item(), back_ms, anonymous=self._rng.random() < 0.01)

    def _item(self) -> str:
        return self._items[self._below(len(self._items))].item_id

    def _new_click(self, user: str, item: str, back_ms: int = 0, anonymous: bool = False) -> Click:
        self._number += 1
        return Click(
            user_id=user,
            item_id=item,
            at_ms=time.time_ns() // 1_000_000 - back_ms,
            kind=self._rng.choice(KINDS),
            weight=self._rng.choice((1.0, 0.5, 2.0)),
            event_id=None if anonymous else f"e{self._number}",
        )

    def _click(self, user: str, item: str, back_ms: int = 0, anonymous: bool = False) -> None:
        click = self._new_click(user, item, back_ms, anonymous)
        if self._rng.random() < 0.5:
            self._send_compressed(click)
        else:
            sent = producers.send_click(self._producer, self._settings, click)
            self._send("clicks", sent, click.event_id)
        if not anonymous:
            self._recent.append(click)

    def _send_compressed(self, click: Click) -> None:
        def done(error: Any, _: Any) -> None:
            if error is not None:
                self.failed["librdkafka"] += 1
            elif click.event_id is not None:
                self.acked.add(click.event_id)

        producer = self._rng.choice(self._codecs)
        topic, value = self._settings.prefixed(topics.CLICKS), events.encode(click)
        headers = [foreign.OWN]
        if self._rng.random() < 0.3:
            value, headers = self._foreign(click), []
        producer.produce(topic, value, click.user_id, on_delivery=done, headers=headers)
        producer.poll(0)
        self.sent["compressed" if headers else "of another format"] += 1

    def _foreign(self, click: Click) -> bytes:
        """A record of another system, of the same user, item, time and event id."""
        action = self._rng.choice([*foreign.ACTIONS])
        visits = click.user_id.startswith("g")
        return foreign.Foreign(
            click.user_id, click.item_id, action, click.at_ms, click.event_id, visits
        ).value()

    def _transactions(self, count: int) -> None:
        """So many clicks in transactions; every other transaction is aborted."""
        try:
            for first in range(0, count, TRANSACTION):
                self._transaction(commits=first // TRANSACTION % 2 == 0)
        except Exception as error:  # the coordinator aborts what stays open
            self.failed[f"transaction {type(error).__name__}"] += 1
            self._close_transactional()

    def _transaction(self, commits: bool) -> None:
        if self._transactional is None:
            self._transactional = producers.make_producer(
                self._settings,
                transactional_id=self._settings.prefixed("load"),
                transaction_timeout_ms=TRANSACTION_MS,
            )
            producers.in_time(self._settings, self._transactional.init_transactions)
        producer: KafkaProducer = self._transactional
        producer.begin_transaction()
        clicks = [
            self._new_click(f"s{self._below(SHOPPERS)}", self._item()) for _ in range(TRANSACTION)
        ]
        for click in clicks:
            producers.send_click(producer, self._settings, click)
        if not commits:
            producer.flush(timeout=self._settings.kafka_timeout_ms / 1000)
            producers.in_time(self._settings, producer.abort_transaction)
            self.sent["aborted"] += len(clicks)
            return
        producers.in_time(self._settings, producer.commit_transaction)
        self.sent["in transactions"] += len(clicks)
        self.acked.update(click.event_id for click in clicks if click.event_id is not None)

    def _close_transactional(self) -> None:
        producer, self._transactional = self._transactional, None
        if producer is not None:
            try:
                producer.close(timeout=1)
            except Exception as error:
                self.failed[type(error).__name__] += 1
                # kafka-python leaves a producer open that could not flush, and waits again later.
                producer._sender.force_close()
                producer._closed = True

    def _duplicates(self) -> None:
        if self._recent:
            click = self._recent[self._rng.randrange(len(self._recent))]
            self._send(
                "duplicates",
                producers.send_click(self._producer, self._settings, click),
                click.event_id,
            )

    def _reordered(self) -> None:
        back_ms = int(self._rng.random() * 2 * self._lateness_s * 1_000)
        self.sent["reordered"] += 1
        returns = self._rng.random() < 0.1
        user = f"r{self._below(RETURNERS)}" if returns else f"s{self._below(SHOPPERS)}"
        self._click(user, self._item(), back_ms)

    def _strays(self) -> None:
        """A click without a key; a click, an item, a profile or a delete in a wrong partition."""
        if self._rng.random() < 0.4:
            self._stray_state()
            return
        click = self._new_click(
            f"s{self._below(SHOPPERS)}", self._item(), anonymous=self._rng.random() < 0.2
        )
        topic, value = self._settings.prefixed(topics.CLICKS), events.encode(click)
        headers = [foreign.OWN]
        if self._rng.random() < 0.3:
            value, headers = self._foreign(click), []
        if self._rng.random() < 0.5:
            sent = self._producer.send(topic, value, headers=headers)
        else:
            partitions = self._settings.clicks_partitions
            wrong = (partition_of(click.user_id, partitions) + 1) % partitions
            key = click.user_id.encode()
            sent = self._producer.send(topic, value, key=key, partition=wrong, headers=headers)
        self._send("strays", sent, click.event_id)

    def _stray_state(self) -> None:
        """A change of an item or a member's profile in a wrong partition, one in four a delete."""
        deletes = self._rng.random() < 0.25
        self._number += 1
        if self._rng.random() < 0.5:
            name, partitions = topics.ITEMS, self._settings.items_partitions
            item = self._items[self._below(len(self._items))]
            key = item.item_id
            value = self._changed(msgspec.structs.replace(item, title=f"stray {self._number}"))
        else:
            name, partitions = topics.USERS, self._settings.clicks_partitions
            key = f"m{self._below(MEMBERS)}"
            value = events.encode(UserProfile(user_id=key, attributes={"n": self._number}))
        wrong = (partition_of(key, partitions) + 1) % partitions
        sent = self._producer.send(
            self._settings.prefixed(name),
            None if deletes else value,
            key=key.encode(),
            partition=wrong,
        )
        self._send(f"stray {name}", sent)

    def _merge(self) -> None:
        dice = self._rng.random()
        merge = Merge(
            user_id=f"g{self._below(VISITORS)}",
            merge_into=f"r{self._below(RETURNERS)}" if dice < 0.3 else f"s{self._below(SHOPPERS)}",
            at_ms=time.time_ns() // 1_000_000,
        )
        self._send("merges", producers.send_merge(self._producer, self._settings, merge))

    def _malformed(self) -> None:
        topic, value = self._rng.choice(topics.SOURCES), self._rng.choice(MALFORMED)
        name = self._settings.prefixed(topic)
        sent = self._producer.send(name, value, key=b"x1", headers=[foreign.OWN])
        self._send("malformed", sent)

    def _catalogue(self) -> None:
        number = self._below(len(self._items))
        item, dice = self._items[number], self._rng.random()
        if dice < 0.3:
            self._send(
                "deletes", producers.send_delete(self._producer, self._settings, item.item_id)
            )
            return
        # A compacted topic may lose the newer state before ingest finds the late change outdated.
        if dice < 0.4 and self._settings.items_patches:
            self._late_item(item, deletes=dice < 0.32)
            return
        changed = msgspec.structs.replace(
            item,
            title=f"{item.title} {self._number}",
            available=dice < 0.9,
            tags=[*item.tags, f"t{self._below(9)}"],
            at_ms=time.time_ns() // 1_000_000,
        )
        if not self._settings.items_patches:
            self._send("items", producers.send_item(self._producer, self._settings, changed))
            return
        topic, key = self._settings.prefixed(topics.ITEMS), item.item_id.encode()
        self._send("patches", self._producer.send(topic, self._changed(item), key=key))

    def _changed(self, item: Item) -> bytes:
        """The value of a change of this item."""
        if not self._settings.items_patches:
            return events.encode(item)
        self._number += 1
        return patches.draw(self._rng, item, self._number, time.time_ns() // 1_000_000)

    def _late_item(self, item: Item, deletes: bool) -> None:
        """A change that was first appended up to `LATE_MS_MAX` ago, as a replay sends it."""
        topic, partitions = self._settings.prefixed(topics.ITEMS), self._settings.items_partitions
        place = partition_of(item.item_id, partitions)
        first_ms = time.time_ns() // 1_000_000 - int(self._rng.random() * LATE_MS_MAX)
        self._number += 1
        sent = self._producer.send(
            topic,
            None if deletes else self._changed(msgspec.structs.replace(item, title="late")),
            key=item.item_id.encode(),
            partition=place,
            headers=[
                ("origin", f"{topic}/{place}/0".encode()),
                (events.ORIGIN_MS, str(first_ms).encode()),
            ],
        )
        self._send("late items", sent)

    def _forget(self) -> None:
        """A user without a profile, who clicks again."""
        group, many = self._rng.choice((("r", RETURNERS), ("g", VISITORS)))
        user = f"{group}{self._below(many)}"
        self._send("forgotten", producers.send_forget(self._producer, self._settings, user))

    def _profile(self) -> None:
        leaver = self._rng.random() < 0.5
        user = f"l{self._below(LEAVERS)}" if leaver else f"m{self._below(MEMBERS)}"
        if leaver and self._rng.random() < 0.4:
            self._send("forgotten", producers.send_forget(self._producer, self._settings, user))
            return
        self._number += 1
        profile = UserProfile(user_id=user, attributes={"age": self._below(90), "n": self._number})
        self._send("profiles", producers.send_profile(self._producer, self._settings, profile))

    def _send(self, what: str, future: Any, event_id: str | None = None) -> None:
        self.sent[what] += 1
        future.add_errback(lambda error: self.failed.update([type(error).__name__]))
        if event_id is not None:
            future.add_callback(lambda _: self.acked.add(event_id))
