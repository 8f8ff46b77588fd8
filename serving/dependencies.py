"""What a query worker and a coordinator open alike."""

from __future__ import annotations

import msgspec

from eddyline import generations
from eddyline.process.retry import Retry
from eddyline.settings.loader import Settings
from eddyline.stores import layout
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import LogId
from embeddings.bundle import bundle
from embeddings.bundle.bundle import Bundle
from serving.answer.user_reader import UserReader
from serving.recall.popular import PopularPath


def open_store(settings: Settings, retry: Retry) -> RedisStore:
    """Redis, once it answers, for calls that belong to a query. Raises StoreRefused, Stopped."""
    # Half of a query's time for Redis: where it hangs, the other half is enough to answer without it.
    timeout_ms = max(10, min(settings.redis_timeout_ms, settings.query_timeout_ms // 2))
    store = RedisStore(msgspec.structs.replace(settings, redis_timeout_ms=timeout_ms))
    retry.wait_for("Redis", store.check)
    retry.wait_for("Redis", lambda: store.claim_layout(layout.layout(settings)))
    return store


def open_generation(settings: Settings, retry: Retry) -> Bundle:
    """The active generation, once there is one. Raises BundleError, Stopped."""
    manifest = retry.wait_for(
        "Kafka and an active generation", lambda: generations.active_generation(settings)
    )
    return bundle.recorded(settings, manifest)


def user_reader(
    settings: Settings, store: RedisStore, generation: str, clicks: LogId
) -> UserReader:
    """Reads users of this generation; clicks: the log that tokens belong to."""
    return UserReader(
        store, clicks_partitions=settings.clicks_partitions, generation=generation, log=clicks
    )


def popular_path(settings: Settings, store: RedisStore) -> PopularPath:
    """The popular list, not started."""
    return PopularPath(
        store,
        slots=[f"i{n}" for n in range(settings.item_slots)],
        bucket_s=settings.popular_bucket_s,
        half_life_s=settings.popular_half_life_s,
        limit=settings.popular_limit,
        refresh_ms=settings.popular_refresh_ms,
        backoff_ms_max=settings.backoff_ms_max,
    )
