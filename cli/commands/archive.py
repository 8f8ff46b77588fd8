"""`eddyline archive forget`: a user's events out of the archive's files."""

from __future__ import annotations

from cli.console import console
from eddyline.archive import EVERYTHING, Archive, ArchiveUnavailable
from eddyline.schema import events
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from streams.archive import file_placement


def forget(settings: Settings, user_id: str) -> None:
    """Rewrite the files that have rows of this user and say how many. A file is replaced at once, or stays.

    Raises Rejected for what can be no user's id, ArchiveUnavailable where a file cannot be read or written;
    then the command can be given again.
    """
    events.check_id("user_id", user_id)
    try:
        archive = Archive(settings)
        partition = partition_of(user_id, settings.clicks_partitions)
        done, rows = file_placement.forget(archive, {user_id: EVERYTHING}, partition)
    except OSError as error:
        raise ArchiveUnavailable(
            f"archive at {settings.archive_url or 'data_dir'}: {error}"
        ) from None
    console.print(f"{rows:,} rows removed, {done:,} files of {archive.url} rewritten")
    console.print(
        "Events that are still in Kafka alone follow when his null record in `users` is archived."
    )
