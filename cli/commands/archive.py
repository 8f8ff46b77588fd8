"""`eddyline archive forget`: erase a user's events from the archive's files."""

from __future__ import annotations

from cli.console import console
from eddyline.archive import EVERYTHING, Archive, ArchiveUnavailable
from eddyline.schema import events
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from streams.archive import erasure


def forget(settings: Settings, user_id: str) -> None:
    """Rewrite the files that have rows of this user and print how many. Each file is replaced in
    one step.

    Raises Rejected for an invalid id, and ArchiveUnavailable if a file cannot be read or written:
    run the command again then.
    """
    user_id = events.id_in_form("user_id", user_id, settings.id_form)
    try:
        archive = Archive(settings)
        partition = partition_of(user_id, settings.clicks_partitions)
        files, rows = erasure.forget(archive, {user_id: EVERYTHING}, partition)
    except OSError as error:
        raise ArchiveUnavailable(
            f"archive at {settings.archive_url or 'data_dir'}: {error}"
        ) from None
    console.print(f"{rows:,} rows removed, {files:,} files of {archive.url} rewritten")
    console.print(
        "Events that are only in Kafka so far are left out once the user's null record in `users` "
        "is archived."
    )
