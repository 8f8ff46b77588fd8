"""Ingest, archive, trainer, dead letters and import accept the same records of `clicks`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cli.commands import replay_file
from eddyline.archive import Archive
from eddyline.errors import Rejected
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema import events
from eddyline.schema.events import Click, Forget, Merge
from eddyline.schema.partitioning import partition_of
from eddyline.schema.records import BuiltRecord
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, LogId, Source, UserEffects
from embeddings.data import sources
from streams.archive.partition_writer import ForgottenUsers, open_partition
from streams.clicks.batch import decode, deduplicate
from streams.operations import dead_letter_replay
from streams.operations.dead_letter_replay import Letter
from streams.ports import RecordBatch

LOG = LogId("cluster", "topic")
P = 1
NOW_MS = time.time_ns() // 1_000_000
USERS_HERE = [u for u in (f"u{n}" for n in range(30)) if partition_of(u, 2) == P][:3]
STRAY = next(u for u in (f"u{n}" for n in range(30)) if partition_of(u, 2) != P)
KINDS = ("click", "click", "click", "stray", "merge", "forget", "late", "future", "broken", "null")


@dataclass(frozen=True)
class Sent:
    """One record of the log. kind: one of `KINDS`; gap: offsets since the record before."""

    kind: str
    gap: int
    user: str
    event_id: str | None
    key: bytes | None


@st.composite
def logs(draw: st.DrawFn) -> list[Sent]:
    return [
        Sent(
            draw(st.sampled_from(KINDS)),
            draw(st.sampled_from((1, 1, 1, 2, 5))),
            draw(st.sampled_from(USERS_HERE)),
            draw(st.sampled_from((None, "a", "b", "c", "d"))),
            draw(st.sampled_from((b"k", None, b"\xff"))),
        )
        for _ in range(draw(st.integers(1, 60)))
    ]


def value_of(sent: Sent, offset: int) -> bytes | None:
    if sent.kind in ("broken", "null"):
        return b'{"user_id": ""}' if sent.kind == "broken" else None
    if sent.kind == "merge":
        return events.encode(Merge(user_id=sent.user, merge_into=STRAY, at_ms=NOW_MS))
    if sent.kind == "forget":  # of a time before every click: the trainer leaves none out by it
        return events.encode(Forget(user_id=sent.user, forget_until_ms=1))
    at_ms = NOW_MS + {"future": 10**10, "late": -(10**10)}.get(sent.kind, 0)
    user = STRAY if sent.kind == "stray" else sent.user
    return events.encode(
        Click(user_id=user, item_id=f"i{offset}", at_ms=at_ms, event_id=sent.event_id)
    )


def records_of(log: Sequence[Sent]) -> list[Any]:
    offset, made = -1, []
    for sent in log:
        offset += sent.gap
        fields = {"key": sent.key, "value": value_of(sent, offset), "headers": ()}
        made.append(
            SimpleNamespace(topic=CLICKS, partition=P, offset=offset, timestamp=NOW_MS, **fields)
        )
    return made


def batches(records: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(records[n : n + size]) for n in range(0, len(records), size)]


def accepted_by_ingest(settings: Settings, records: Sequence[Any], size: int) -> list[str]:
    """Each batch is decided twice: when it is new, and as one that was applied before (`done`)."""
    store, source, window = MemoryStore(), Source(CLICKS, P), settings.dedupe_window_events
    accepted: list[str] = []
    for batch in batches(records, size):
        before = store.read_slot(f"u{P}", source)
        found = decode(settings, RecordBatch(CLICKS, P, batch, 0)).events
        done = -1 if before.fence is None else before.fence.offset
        counts, entering = deduplicate(window, found, before.accepted, done)
        last = batch[-1].offset
        effects = UserEffects(accepted=entering, window_floor=last + 1 - window)
        after = Fence(last, LOG)
        store.write_users(f"u{P}", source, before.fence, after, effects)
        if last - batch[0].offset < window:
            known = store.read_slot(f"u{P}", source).accepted
            assert deduplicate(window, found, known, last)[0] == counts
        accepted += [event.item_id for _, event in counts if isinstance(event, Click)]
    return accepted


def accepted_by_archive(settings: Settings, records: Sequence[Any], size: int) -> list[str]:
    archive = Archive(settings)
    for batch in batches(records, size):  # a restart after every batch; files end after two
        writer = open_partition(settings, archive, CLICKS, P, LOG, 0, defaultdict(ForgottenUsers))
        writer.append([r for r in records if writer.written <= r.offset <= batch[-1].offset])
        writer.complete() if batch[0] is records[0] else writer.discard()
    writer = open_partition(settings, archive, CLICKS, P, LOG, 0, defaultdict(ForgottenUsers))
    writer.append([r for r in records if r.offset >= writer.written])
    writer.complete()
    rows = [found.event for found in archive.read(CLICKS)]
    return [event.item_id for event in rows if isinstance(event, Click)]


def accepted_by_trainer(settings: Settings, records: Sequence[Any]) -> list[str]:
    clicks = [BuiltRecord("clicks", P, r.offset, r.timestamp, r.key, r.value) for r in records]
    data = sources.assemble(settings, {CLICKS: clicks, ITEMS: [], USERS: []}, cut={})
    return [click.item_id for click in data.clicks]


@hypothesis_settings(max_examples=60, deadline=None)
@given(logs(), st.integers(1, 20), st.integers(2, 12))
def test_ingest_archive_and_trainer_accept_the_same_clicks(
    log: list[Sent], size: int, window: int
) -> None:
    records = records_of(log)
    with TemporaryDirectory() as folder:
        settings = Settings(
            data_dir=folder, clicks_partitions=2, items_partitions=2, dedupe_window_events=window
        )
        accepted = accepted_by_ingest(settings, records, size)
        assert accepted_by_archive(settings, records, size) == accepted
        assert accepted_by_trainer(settings, records) == accepted


@hypothesis_settings(max_examples=60, deadline=None)
@given(logs())
def test_dead_letters_and_import_refuse_what_ingest_refuses(log: list[Sent]) -> None:
    settings = Settings(clicks_partitions=2, items_partitions=2)
    for record in records_of(log):
        refused = bool(decode(settings, RecordBatch(CLICKS, P, [record], 0)).rejected)
        letter = Letter(
            f"{CLICKS}/{P}/{record.offset}", "", "", "", record.key, record.value, 0, 0, 0
        )
        assert refused == rejects(lambda at=letter: dead_letter_replay.checked(settings, at))
        if record.value is None:
            continue
        with TemporaryDirectory() as folder:
            path = Path(folder) / "clicks.jsonl"
            path.write_bytes(record.value)
            is_click = b"item_id" in record.value
            assert (refused or not is_click) == rejects(
                lambda at=path: list(replay_file._read(settings, at, CLICKS))
            )


def rejects(call: Any) -> bool:
    try:
        call()
    except Rejected:
        return True
    return False


@pytest.mark.parametrize("field", ["merge_into", "forget_until_ms"])
def test_a_merge_or_a_forget_in_a_file_is_refused_with_its_line(tmp_path: Path, field: str) -> None:
    value = {"user_id": "a", field: "b" if field == "merge_into" else 5, "at_ms": 5}
    path = tmp_path / "clicks.jsonl"
    path.write_bytes(b"\n" + msgspec.json.encode(value))
    with pytest.raises(Rejected, match="line 2"):
        list(replay_file._read(Settings(), path, CLICKS))
