"""The judge's whole state in one file, so that it goes on where it stood.

Offsets, stores and rates are of one moment: nothing is counted twice or left out after a crash.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import msgspec

from eddyline.process import files
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId
from evaluation.judge.drift import Drift
from evaluation.judge.judge import keeps_all_lists
from evaluation.judge.merging import Place

log = logging.getLogger(__name__)

_VERSION = 2
_DIGEST_BYTES = 32


class SavedDrift(msgspec.Struct, frozen=True, kw_only=True):
    """See `DriftWatch`."""

    hits: bytes
    found: int
    last: Drift | None


class Checkpoint(msgspec.Struct, kw_only=True):
    """All that a judge needs to go on.

    version:   of this format
    layout:    the settings that the state depends on, see `layout_of`
    logs:      topic -> the log that the offsets belong to
    positions: the offset after the last record of each partition
    since_ms:  see `Judge`; started_ms: see `Decoder`
    scored, skipped, applied, rejected: counts since the first start
    store:     `MemoryStore.export`; rates: `Rates.export`; drifts: by generation
    impressions: `ImpressionJoin.export`; learned: `BlendLearner.encode`, empty for none
    """

    layout: str
    version: int = _VERSION
    logs: dict[str, LogId]
    positions: dict[Place, int]
    since_ms: int
    started_ms: int
    scored: int
    skipped: int
    applied: int
    rejected: int
    store: bytes
    rates: bytes
    impressions: bytes
    drifts: dict[str, SavedDrift]
    learned: bytes = b""


def path_of(settings: Settings) -> Path:
    """The file of the checkpoint."""
    return Path(settings.data_dir) / "judge" / "checkpoint"


def layout_of(settings: Settings) -> str:
    """What a checkpoint must have been written with to be used."""
    names = (
        "namespace",
        "clicks_partitions",
        "items_partitions",
        "item_slots",
        "popular_bucket_s",
        "judge_sample",
        "judge_repeats",
    )
    said = ", ".join(f"{name}={getattr(settings, name)}" for name in names)
    return f"{said}, lists of all users" if keeps_all_lists(settings) else said


def write(settings: Settings, checkpoint: Checkpoint) -> None:
    """Replace the file in one step. Raises OSError."""
    content = msgspec.msgpack.encode(checkpoint)
    files.write_atomically(path_of(settings), hashlib.sha256(content).digest() + content)


def read(settings: Settings, logs: dict[str, LogId]) -> Checkpoint | None:
    """The checkpoint; None where there is none that can be used, which is logged.

    logs: the topics' logs now
    """
    path = path_of(settings)
    raw = files.read_if_exists(path)
    if raw is None:
        return None
    content, why = raw[_DIGEST_BYTES:], ""
    if hashlib.sha256(content).digest() != raw[:_DIGEST_BYTES]:
        why = "it is damaged"
    else:
        try:
            found = msgspec.msgpack.decode(content, type=Checkpoint)
        except msgspec.MsgspecError:
            why = "it has another format"
        else:
            if found.version != _VERSION:
                why = f"it has version {found.version}"
            elif found.layout != layout_of(settings):
                why = f"it was written with {found.layout}"
            elif found.logs != logs:
                why = "the topics were made anew"
    if not why:
        return found
    log.warning(
        "the checkpoint is not used: all is read from the beginning, and what is appended from now "
        "on is scored",
        extra={"path": str(path), "reason": why},
    )
    return None
