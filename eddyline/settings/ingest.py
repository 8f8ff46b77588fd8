"""Settings of ingest, archive and training."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from eddyline.errors import SettingsError
from eddyline.settings.field import within


class IngestSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of records: users' histories, popularity, the archive, training data."""

    chunk_records_max: Annotated[int, within(1, 5_000)] = 256
    """The most records of one batch; of one partition, clicks go 48 at a time at most."""
    items_fence_s: Annotated[int, within(0, 43_200)] = 3_600
    """Item records are written in a transaction at the start of a partition and at this interval;
    between them the epoch refuses a producer that lost its partition. 0: every batch in its own
    transaction, which is slower."""
    dedupe_window_events: Annotated[int, within(2, 10_000_000)] = 65_536
    """A re-sent `event_id` is dropped if its first record is at most this many offsets back in the
    partition."""
    far_future_ms_max: Annotated[int, within(0, 86_400_000)] = 300_000
    """A record is rejected if its `at_ms` is more than this after the broker's time stamp."""
    at_ms_min: Annotated[int, within(0, 253_402_300_799_999)] = 631_152_000_000
    """A record is rejected if its `at_ms` is below this, by default the start of 1990: it may be in
    seconds. Where `at_ms` is left out or 0, a click gets the broker's time stamp."""
    user_ids_refused: str = "null,undefined,none,nan,anonymous"
    """User ids that mean no one, separated by commas, in upper or lower case. Their clicks and
    profiles are rejected."""
    id_form: Literal["nfc", "as_is"] = "nfc"
    """The form of user and item ids, categories, tags and names of attributes. `nfc`: spellings
    that differ by Unicode's normal form or by outer blanks are one. `as_is`: every spelling is an
    id of its own. Set it for all processes. Fixed when state is first written."""
    forgotten_kept_d: Annotated[int, within(1, 36_500)] = 400
    """For so many days after a user was forgotten, events from before that arrive later are
    dropped. At least as long as dead letters and clicks are kept, and the oldest copies of
    Redis."""
    items_patches: bool = False
    """Whether a record of `items` is a patch: absent fields keep their last accepted value, null
    removes one. The topic must then not be compacted, nor lose records by age. Set it for all
    processes; a map says `patches = true` instead."""
    refuse_emptied_items: bool = True
    """Whether a record of an item without title, or without any category, is rejected where the
    item has some: it is most likely a part of the item. One that makes the item unavailable
    applies, and the item keeps both."""
    hide_refused_items: bool = False
    """Whether an item with a refused record that is newer than its state is in no answer until a
    newer record is accepted. Holds for records that are refused from then on."""
    deleted_items_kept_s: Annotated[int, within(0, 3_153_600_000)] = 2_592_000
    """For so long after an item was deleted, older changes of it that are forwarded or replayed are
    dropped (broker's time). The default, 30 days, is that of Kafka's delete records and of dead
    letters. A change holds for items that are deleted from then on; 0 is for ever."""
    item_vector_dimension: Annotated[int, within(0, 4_096)] = 0
    """Length of the dense features that an item may carry in `vector`; 0 rejects them."""

    # Foreign formats: docs/feeds
    clicks_map: str = ""
    """The map of `clicks`: a TOML file or a preset (`debezium`, `segment`, …). Empty: the records
    are in Eddyline's own format."""
    items_map: str = ""
    """The map of `items`."""
    users_map: str = ""
    """The map of `users`."""

    # Users' histories
    history_length_max: Annotated[int, within(1, 1_000)] = 100
    """The most events kept for a user."""
    history_cache_entries_max: Annotated[int, within(0, 100_000_000)] = 400_000
    """The most events that an ingest process caches, to read Redis less; about 150 bytes each."""
    history_age_s_max: Annotated[int, within(0, 3_153_600_000)] = 0
    """Events this much older than a user's newest one leave the user's history (event time); 0 is
    no limit."""
    lateness_s_max: Annotated[int, within(0, 3_153_600_000)] = 604_800
    """An event this much older than the user's newest one is too late for the user's history (event
    time); 0 is no limit."""
    seen_items_max: Annotated[int, within(0, 3_000)] = 1_000
    """The most items kept for a user beyond the history, so that answers do not show them again:
    the newest of those that left the history or came too late for it, one for each item and kind of
    event, 12 bytes each. Set it for all processes; 0 keeps none."""
    user_idle_s_max: Annotated[int, within(0, 3_153_600_000)] = 34_560_000
    """A user without a new event for longer loses history and embeddings (broker's time). The
    default, 400 days, keeps a customer who comes once a year. A change applies to each user from
    the user's next event on; 0 is never."""

    # Popularity
    weight_view: Annotated[float, within(0, 100)] = 0.5
    """How much a `view` counts for popularity."""
    weight_click: Annotated[float, within(0, 100)] = 1.0
    """How much a `click` counts."""
    weight_like: Annotated[float, within(0, 100)] = 2.0
    """How much a `like` counts."""
    weight_cart: Annotated[float, within(0, 100)] = 3.0
    """How much a `cart` counts."""
    weight_purchase: Annotated[float, within(0, 100)] = 5.0
    """How much a `purchase` counts."""
    dwell_ms_full: Annotated[int, within(0, 86_400_000)] = 0
    """A shorter `dwell_ms` in a click's context reduces its weight in proportion; 0 ignores dwell
    time."""
    popular_bucket_s: Annotated[int, within(1, 31_536_000)] = 86_400
    """Width of one bucket of the popularity counts, in event time. Fixed when state is first
    written."""
    popular_buckets: Annotated[int, within(1, 1_000)] = 28
    """Buckets of popularity counts kept; older clicks no longer count."""
    popular_items_max: Annotated[int, within(1, 100_000_000)] = 1_000_000
    """The most items counted in one popularity bucket; those with the lowest counts are dropped
    first."""
    popular_half_life_s: Annotated[int, within(1, 315_360_000)] = 604_800
    """After this time a click counts half for popularity."""
    popular_fast_half_life_events: Annotated[int, within(1, 10**15)] = 1_000
    """After so many events of all items an event counts half for the fast popularity by events.
    Every event that counts for popularity weighs 1 there. Set it for all processes; sums of a new
    half-life begin at 0."""
    popular_slow_half_life_events: Annotated[int, within(1, 10**15)] = 10_000
    """The same for the slow popularity by events."""

    path_state: Literal["used", "all"] = "used"
    """What ingest keeps for the recall paths: `used`: the state of those in `recall_paths`; `all`:
    of the others too, so that they have data once they are used. Set it, and `recall_paths`, for
    all processes; a state begins with the events after it was switched on."""

    # Co-visitation
    co_visit_items: Annotated[int, within(0, 100)] = 5
    """With how many older items of the user's history a click is counted in the co-visitation
    rows, an item at distance d as 1/d of a visit; 0 keeps no rows."""
    co_visit_row_max: Annotated[int, within(2, 2_000)] = 200
    """A co-visitation row of so many entries, of 16 bytes each, is compacted: the half with the
    most visits stays."""
    co_visit_idle_s_max: Annotated[int, within(0, 3_153_600_000)] = 34_560_000
    """A co-visitation row without a visit for longer ends (Redis' clock), up to a sixteenth
    later; 0 is never. The default is 400 days."""

    # Archive and training
    archive_url: str = ""
    """Folder or object store (fsspec URL) of the archive. Empty: `archive` in `data_dir`."""
    archive_file_offsets: Annotated[int, within(1, 100_000_000)] = 262_144
    """A file of the archive ends at the hour, or at a multiple of this many offsets."""
    train_from: Literal["kafka", "archive"] = "kafka"
    """What a training reads: the topics, or the archive and then the part of the topics after its
    end."""

    # Generations
    generations_kept: Annotated[int, within(3, 1_000)] = 3
    """The newest published generations that stay; a new one ends the older ones, never the active
    one. At least three, so that a rollback by two is possible."""
    generation_grace_s: Annotated[int, within(0, 31_536_000)] = 86_400
    """How long running processes may go on using a generation after its end. Five minutes later its
    embeddings, item vectors and bundle are removed."""

    # Metrics
    ingest_metrics_port: Annotated[int, within(0, 65_535)] = 0
    """Port of an ingest process's Prometheus metrics; 0 serves none."""


def check(settings: IngestSettings) -> None:
    """Raise SettingsError if the window of deduplication is shorter than two batches."""
    if settings.dedupe_window_events < 2 * settings.chunk_records_max:
        raise SettingsError(
            f"dedupe_window_events = {settings.dedupe_window_events}: must be at least twice "
            f"chunk_records_max = {settings.chunk_records_max}, for one slot may be a batch behind "
            "another"
        )
