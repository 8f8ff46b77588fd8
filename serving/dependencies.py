"""The dependencies that a query worker and a coordinator share: store, bundle, retriever."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import msgspec

from eddyline import generations
from eddyline.generations import Manifest
from eddyline.kafka import topics
from eddyline.kafka.log_ends import LogEnds
from eddyline.process.retry import Retry
from eddyline.settings.loader import Settings
from eddyline.stores import layout
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import LogId, StateStore
from embeddings.bundle import bundle
from embeddings.bundle.bundle import Bundle
from embeddings.towers.base import UserEncoder
from index.port import IndexReader
from serving.answer.blend import Blend
from serving.answer.blend_weights import CurrentBlender
from serving.answer.blender_watch import BlenderWatch
from serving.answer.click_ends import ClickEnds
from serving.answer.click_waits import ClickWaits
from serving.answer.retriever import Retriever
from serving.answer.seen import SeenPolicy
from serving.answer.user_reader import UserReader
from serving.recall import registry
from serving.recall.base import RecallContext
from serving.recall.popularity import Popularity
from serving.rules.answer_rules import AnswerRules
from serving.rules.editorial import Known
from serving.rules.editorial_watch import RulesWatch


def open_store(settings: Settings, retry: Retry) -> RedisStore:
    """Redis, once it answers, for calls that belong to a query. Raises StoreRefused, Stopped."""
    # Half of a query's time for Redis: if it hangs, the other half is enough to answer without it.
    timeout_ms = max(10, min(settings.redis_timeout_ms, settings.query_timeout_ms // 2))
    store = RedisStore(msgspec.structs.replace(settings, redis_timeout_ms=timeout_ms))
    retry.wait_for("Redis", store.check)
    retry.wait_for("Redis", lambda: store.claim_layout(layout.layout(settings)))
    return store


def open_bundle(settings: Settings, retry: Retry) -> Bundle:
    """The bundle of the active generation, once there is one. Raises BundleError, Stopped."""
    return bundle.recorded(settings, active_manifest(settings, retry))


def active_manifest(settings: Settings, retry: Retry) -> Manifest:
    """The manifest of the active generation, once there is one. Raises BundleError, Stopped."""
    return retry.wait_for(
        "Kafka and an active generation", lambda: generations.active_generation(settings)
    )


def start_retriever(
    settings: Settings,
    store: StateStore,
    *,
    generation: str,
    tower: UserEncoder,
    clicks: LogId,
    closing: ExitStack,
    index: IndexReader | None = None,
) -> Retriever:
    """The retriever of one generation; its popular list refreshes until `closing` closes.

    clicks: the log that read-your-click tokens belong to
    index:  knows which popular items are live; None: other processes hold the items
    """
    waits = ClickWaits(
        store,
        log_id=clicks,
        ends=ClickEnds(LogEnds(settings, topics.CLICKS)),
        calls_max=settings.waiting_calls_max,
        # They may all be resumed together, and must leave room for queries that did not wait.
        threads=max(1, settings.worker_threads // 4),
    )
    closing.callback(waits.close)
    popularity = Popularity(settings, store, index)
    paths = registry.make_paths(RecallContext(settings, store, tower, popularity, closing))
    # The first refresh reads the lists by events too, as the paths follow them by now.
    popularity.start()
    closing.callback(popularity.close)
    blender = CurrentBlender(settings.recall_path_names)
    if settings.fusion == Blend.name:
        watch = BlenderWatch(settings, blender)
        watch.start()
        closing.callback(watch.close)
    editorial = None
    if settings.rules_file:
        rules = RulesWatch(Path(settings.rules_file), Known.of(settings))
        rules.start()
        closing.callback(rules.close)
        editorial = rules.current
    return Retriever(
        store=store,
        users=UserReader(
            store, clicks_partitions=settings.clicks_partitions, generation=generation, log=clicks
        ),
        popularity=popularity,
        paths=paths,
        item_slots=settings.item_slots,
        rules=AnswerRules.of(settings, paths, popularity, editorial, blender),
        seen=SeenPolicy(settings),
        waits=waits,
    )
