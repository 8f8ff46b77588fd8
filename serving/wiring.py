"""What a query worker and a coordinator open alike."""

from __future__ import annotations

import msgspec

from eddyline import start
from eddyline.ports import LogId
from eddyline.settings import Settings
from eddyline.start import Patience
from eddyline.stores.redis import RedisStore
from embeddings import bundle
from embeddings.bundle import Bundle
from serving.paths.popular import PopularPath
from serving.users import UserReader


def open_store(settings: Settings, patience: Patience) -> RedisStore:
    """Redis, once it answers, for calls that belong to a query. Raises StoreRefused, Stopped."""
    # Half of a query's time for Redis: where it hangs, the other half is enough to answer without it.
    timeout_ms = max(10, min(settings.redis_timeout_ms, settings.query_timeout_ms // 2))
    store = RedisStore(msgspec.structs.replace(settings, redis_timeout_ms=timeout_ms))
    patience.until("Redis", store.check)
    patience.until("Redis", lambda: store.claim_layout(start.layout(settings)))
    return store


def open_generation(settings: Settings, patience: Patience) -> Bundle:
    """The active generation, once there is one. Raises BundleError, Stopped."""
    manifest = patience.until("Kafka and an active generation", lambda: start.active_generation(settings))
    return bundle.recorded(settings, manifest)


def user_reader(settings: Settings, store: RedisStore, generation: str, clicks: LogId) -> UserReader:
    """Reads users of this generation; clicks: the log that tokens belong to."""
    return UserReader(store, clicks_partitions=settings.clicks_partitions, generation=generation, log=clicks)


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
