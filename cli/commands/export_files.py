"""`eddyline export`: items, profiles or clicks as a file, the way back of `eddyline import`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cli.console import console, progress_bar
from eddyline.errors import SettingsError
from eddyline.kafka import topics
from eddyline.schema.events import Click, Item, UserProfile
from eddyline.settings.loader import Settings
from embeddings.data import sources
from streams.importing import writing
from streams.importing.rows import Event

_KINDS: dict[str, type[Event]] = {
    topics.ITEMS: Item,
    topics.USERS: UserProfile,
    topics.CLICKS: Click,
}


def export(settings: Settings, what: str, path: Path, *, archive: bool | None) -> None:
    """Write what a training would read: accepted events, without those of forgotten users.

    what:    items, users or clicks
    archive: read the archive, too; None: as `train_from` says
    Raises SettingsError, KafkaUnavailable, ArchiveUnavailable.
    """
    if what not in _KINDS:
        raise SettingsError(f"export {what!r}: expected one of {', '.join(_KINDS)}")
    if path.exists():
        raise SettingsError(f"{path}: exists already")
    from_archive = settings.train_from == "archive" if archive is None else archive
    with progress_bar(console) as progress:
        tasks = {name: progress.add_task(f"reading {name}", total=None) for name in topics.SOURCES}
        read = sources.from_archive if from_archive else sources.from_kafka
        data = read(
            settings,
            on_read=lambda name, done, total: progress.update(
                tasks[name], completed=done, total=total
            ),
        )
    events: Sequence[Event] = data.clicks if what == topics.CLICKS else data.items
    if what == topics.USERS:
        events = [
            UserProfile(user_id=user, attributes=dict(found))  # type: ignore[arg-type]
            for user, found in data.profiles.items()
        ]
    writing.write(path, _KINDS[what], events)
    console.print(f"{len(events):,} {what} in {path}")
