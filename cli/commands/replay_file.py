"""`eddyline replay FILE`: send a file of events, with their recorded gaps or faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from kafka.errors import KafkaError

from cli.console import console, progress_bar
from eddyline.errors import Rejected, SettingsError
from eddyline.kafka import clients, producers, topics
from eddyline.kafka.producers import now_ms
from eddyline.schema import item_changes, validation
from eddyline.schema.events import Click, Item, ItemPatch, UserProfile, shifted_to_now
from eddyline.settings.loader import Settings

Event = Click | Item | UserProfile
# Records in flight at most: bounds the producer's memory and keeps Ctrl-C quick.
IN_FLIGHT_MAX = 5_000


def replay_file(
    settings: Settings, file: Path, *, speed: float, topic: str, shift_to_now: bool
) -> None:
    """Send a file of JSON lines; checks every line before it sends the first one.

    speed: 1 keeps the gaps between the events' times, 10 is ten times faster, 0 has no gaps
    Raises Rejected with the line's number if the codec refuses a line, SettingsError.
    """
    if topic not in topics.SOURCES:
        raise SettingsError(f"--topic {topic!r}: expected one of {', '.join(topics.SOURCES)}")
    validation.check_may_send(settings, topic)
    if not speed >= 0:
        raise SettingsError(f"--speed {speed}: must be 0 or above")
    if shift_to_now:  # the times of the file do not count
        any_time = msgspec.structs.replace(settings, at_ms_min=0)
        records = list(_read(any_time, file, topic, zero_is_a_time=True))
        records = shifted_to_now(records, now_ms())
        if (first_ms := min((r.at_ms for r in records), default=now_ms())) < settings.at_ms_min:
            detail = f"the first event would be at {first_ms}, before at_ms_min"
            raise Rejected("too_early", "at_ms", detail)
    else:
        records = list(_read(settings, file, topic))
    with progress_bar(console) as progress:
        task = progress.add_task(f"replaying {file.name}", total=len(records))
        took_s = send(
            settings, records, speed=speed, on_sent=lambda n: progress.update(task, completed=n)
        )
    console.print(f"{len(records):,} records in {took_s:.1f} s into {settings.prefixed(topic)}")


def send(
    settings: Settings,
    records: Iterable[Event],
    *,
    speed: float = 0,
    on_sent: Callable[[int], None] = lambda _: None,
) -> float:
    """Send events in order and return once the broker has them all; returns the seconds it took.

    on_sent: called now and then with the number of events sent
    Raises KafkaUnavailable if one could not be delivered in `kafka_timeout_ms`, and Rejected with
    the number of the first one that is too large for the topic.
    """
    producer = producers.make_producer(
        settings, linger_ms=5 if speed == 0 else 0, batch_size=131_072
    )
    started, first_ms, n = time.monotonic(), None, 0
    sent: list[tuple[int, Event, Any]] = []
    try:
        for n, record in enumerate(records, 1):
            if speed:
                first_ms = record.at_ms if first_ms is None else first_ms
                due = started + (record.at_ms - first_ms) / 1000 / speed
                if due > (now := time.monotonic()):
                    on_sent(n - 1)
                    time.sleep(due - now)
            sent.append((n, record, producers.send(producer, settings, record)))
            if n % IN_FLIGHT_MAX == 0:
                producers.confirm(settings, "record", sent)
                sent.clear()
                on_sent(n)
        producer.flush(timeout=max(10.0, settings.kafka_timeout_ms / 1000))
        producers.confirm(settings, "record", sent)
        on_sent(n)
    except KafkaError as error:
        raise clients.translate_error(settings, error, "not every record was delivered") from None
    finally:
        producer.close(timeout=settings.kafka_timeout_ms / 1000)
    return time.monotonic() - started


def _read(
    settings: Settings, file: Path, topic: str, *, zero_is_a_time: bool = False
) -> Iterator[Event]:
    """The records of a file. zero_is_a_time: `at_ms` 0 is the first moment, not a missing time."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    id_field = "item_id" if topic == topics.ITEMS else "user_id"
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            key = None
            if topic != topics.CLICKS:
                key = str(msgspec.json.decode(line).get(id_field)).encode()
            event, _ = validation.unsent(settings, topic, key, line)
            if isinstance(event, ItemPatch):
                event = item_changes.patched(None, event)  # a line is a whole item
        except (msgspec.DecodeError, AttributeError, UnicodeError) as error:
            raise Rejected("malformed_json", f"line {number}", str(error)) from None
        except Rejected as error:
            raise Rejected(error.reason, f"line {number}: {error.field}", error.detail) from None
        if not isinstance(event, Event):
            raise Rejected("other_event", f"line {number}", "is a merge or a forget, not a click")
        if zero_is_a_time and msgspec.json.decode(line).get("at_ms") == 0:
            event = msgspec.structs.replace(event, at_ms=0)
        yield event
