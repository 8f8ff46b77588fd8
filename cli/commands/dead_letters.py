"""`eddyline dead-letters`. Bytes of refused records are escaped before they are printed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cli.console import console
from eddyline.errors import EddylineError, SettingsError
from eddyline.settings.loader import Settings
from streams.operations import batch_skips, dead_letter_replay

# The shown part of one value, unless --all.
SHOWN_BYTES = 4_096


def show_list(settings: Settings, *, reason: str, limit: int) -> None:
    """Print the newest letters, then the count of each reason."""
    found = dead_letter_replay.summary(settings, reason=reason, limit=limit)
    width = max((len(letter.at) for letter in found.letters), default=0)
    for letter in found.letters:
        reason = letter.reason + (" (replayed)" if letter.at in found.replayed else "")
        head = f"{letter.at:<{width}}  {_age(letter.timestamp_ms):>6}  {reason}"
        line = f"{head}: {letter.field or 'record'}: {letter.detail}"
        console.print(printable(line.encode(), 500))
    for name, count in found.reasons.most_common():
        console.print(f"{count:,} × {printable(name.encode(), 80)}")
    console.print(
        f"{found.reasons.total():,} dead letters, {found.replayed_count:,} of them replayed"
    )
    if found.skipped:
        console.print(f"{found.skipped:,} older records were not scanned")


def show_one(settings: Settings, at: str, *, whole: bool) -> None:
    """Print one letter: its reason, key and bytes, unprintable ones escaped."""
    letter, replayed = dead_letter_replay.find(settings, at)
    limit = len(letter.value or b"") if whole else SHOWN_BYTES
    for name, value in (
        ("record", letter.at),
        ("reason", letter.reason),
        ("field", letter.field or "(the whole record)"),
        ("detail", letter.detail),
        ("received", f"{letter.timestamp_ms} ms, {_age(letter.timestamp_ms)} ago"),
        ("replayed", "yes" if replayed else "no"),
    ):
        console.print(f"{name:<9}{printable(value.encode(), 1_000)}")
    console.print(f"{'key':<9}{_bytes(letter.key, 1_000)}")
    console.print(f"{'value':<9}{_bytes(letter.value, limit)}")


def replay(settings: Settings, at: str, *, reason: str, limit: int) -> None:
    """Replay one letter or those of a reason, and print the result of each.

    Raises EddylineError if letters were found and none was sent.
    """
    if bool(at) == bool(reason):
        raise SettingsError("name one record (topic/partition/offset) or --reason, not both")
    report = dead_letter_replay.replay(settings, at=at, reason=reason, limit=limit)
    for letter, why in report.not_sent.items():
        console.print(f"stays: {printable(letter.encode(), 300)}: {printable(why.encode(), 300)}")
    console.print(f"{len(report.sent):,} replayed, {len(report.not_sent):,} stay")
    if report.not_sent and not report.sent:
        raise EddylineError("nothing was replayed")


def skip(settings: Settings, coordinates: Sequence[str], *, to: int | None) -> None:
    """Give up batches that cannot be read, one after the other; an error ends the command."""
    if to is not None and len(coordinates) != 1:
        raise SettingsError("--to names the last offset of one batch: name one batch")
    for at in coordinates:
        given_up = batch_skips.skip(settings, at, to=to)
        console.print(
            f"{printable(at.encode(), 300)}: offsets {given_up.first} to {given_up.last} are "
            "skipped; their bytes are a dead letter"
        )


def printable(data: bytes, limit: int) -> str:
    r"""Bytes as text that cannot steer a terminal, cut to `limit` bytes.

    >>> printable(b"a\x1b[2Jb\xff", 99)
    'a\\x1b[2Jb\\xff'
    """
    text = data[:limit].decode("utf-8", "backslashreplace")
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return safe + (f"… ({len(data) - limit:,} bytes more)" if len(data) > limit else "")


def _bytes(data: bytes | None, limit: int) -> str:
    return "(null)" if data is None else f"{printable(data, limit)}   [{len(data):,} bytes]"


def _age(since_ms: int) -> str:
    seconds = max(0, time.time_ns() // 1_000_000 - since_ms) // 1000
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
