"""The judge as a process: reads, judges, writes checkpoints and reports, follows generations."""

from __future__ import annotations

import logging
import threading
import time

import msgspec

from eddyline import generations
from eddyline.errors import BundleError, LogReplaced, Unavailable
from eddyline.generations import Generations
from eddyline.kafka import topics
from eddyline.kafka.kept import KeptKafka
from eddyline.kafka.producers import now_ms
from eddyline.kafka.topics import ARCHIVED, GENERATIONS
from eddyline.process import heartbeat
from eddyline.process.retry import Backoff, Retry
from eddyline.schema.partitioning import user_slot
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import LogId
from embeddings.bundle import bundle
from embeddings.bundle.bundle import Bundle
from evaluation.engine import Engine
from evaluation.judge import checkpoint as checkpoints
from evaluation.judge import report as reports
from evaluation.judge.blender_publisher import BlenderPublisher
from evaluation.judge.checkpoint import Checkpoint, SavedDrift
from evaluation.judge.drift import DriftWatch
from evaluation.judge.impressions import ImpressionJoin
from evaluation.judge.judge import Judge
from evaluation.judge.merging import Decoder, Place
from evaluation.judge.rates import Rates
from evaluation.judge.reader import LogReader, open_reader
from evaluation.judge.report import JudgeReport
from evaluation.judge.step_ranges import FollowedStepRanges
from streams.idle_users import IdleUsers

log = logging.getLogger(__name__)

# How often the judge looks which generation is active, and where ingest takes micro-steps.
LOOK_S = 5.0
# How often it looks whether the topics are still those of its start.
LOGS_S = 30.0
# How long groups are judged between two reads: a stop and the heartbeat wait for it.
TURN_S = 1.0
# How often the state of idle users is removed.
CLEAN_S = 3_600.0
# How long a change of the share lasts at least.
SHARE_S = 5.0
_BACKOFF_S = 0.2


class JudgeProcess:
    """One judge. Thread rule: one thread; any thread may read `report` and `share`.

    report: the newest one; None before the first
    """

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        """settings: with the address of Kafka."""
        self._settings = settings
        self._stop = stop
        self._retry = Retry(settings, stop, lambda _: self._beat())
        self._kept = KeptKafka(settings)
        self._weights = BlenderPublisher(settings)
        self._logs: dict[str, LogId] = {}
        self._steps = FollowedStepRanges({})
        self._positions: dict[Place, int] = {}
        self._judge = Judge(settings, since_ms=0)
        self._decoder = Decoder(settings, self._judge.follows, 0)
        self._started_ms = 0
        self._written_s = self._reported_s = self._looked_s = self._shared_s = 0.0
        self._cleaned_s = self._checked_s = time.monotonic()
        self.report: JudgeReport | None = None

    def run(self) -> None:
        """Judge until `stop` is set.

        Raises LogMismatch, LogReplaced, KafkaRefused, BundleError, Stopped.
        """
        try:
            self._open()
            backoff = Backoff(_BACKOFF_S, self._settings.backoff_ms_max / 1000)
            while not self._stop.is_set():
                applied = self._judge.applied
                try:
                    self._read()
                except Unavailable as error:
                    if self._judge.applied > applied:
                        backoff.reset()
                    wait_s = backoff.next_s()
                    more = {"reason": str(error), "wait_ms": int(wait_s * 1000)}
                    log.warning("reading again", extra=more)
                    self._beat()
                    self._stop.wait(wait_s)
            self._write()
        finally:
            self._kept.close()
            self._weights.close()
            for track in self._judge.tracks.values():
                track.close()

    def _open(self) -> None:
        """Load the checkpoint and the active generation."""
        settings, retry = self._settings, self._retry
        retry.wait_for("Kafka", lambda: topics.ensure_topics(settings, topics.OF_READERS))
        self._logs = dict(retry.wait_for("Kafka", lambda: topics.log_ids(settings, ARCHIVED)))
        retry.wait_for("an active generation", lambda: generations.active_generation(settings))
        found = retry.wait_for("Kafka", self._generations)
        saved = checkpoints.read(settings, self._logs)
        opened_ms, store = now_ms(), None
        if saved is None:
            since_ms = 0 if settings.judge_from == "beginning" else opened_ms
            self._judge, self._started_ms = Judge(settings, since_ms=since_ms), opened_ms
        else:
            store = self._restore(saved)
        self._decoder = Decoder(settings, self._judge.follows, self._started_ms)
        self._decoder.rejected = 0 if saved is None else saved.rejected
        self._steps.recorded = found.ranges
        self._judge.open(self._engine(self._bundle(found), store))
        self._written_s = time.monotonic()
        log.info(
            "judge starts",
            extra={
                "kafka": settings.kafka_bootstrap_servers,
                "generation": found.active,
                "checkpoint": "none" if saved is None else "loaded",
                "items": self._engine_now().index.stats().live,
            },
        )

    def _restore(self, saved: Checkpoint) -> MemoryStore:
        rates = Rates.load(saved.rates)
        judge = self._judge = Judge(self._settings, rates, since_ms=saved.since_ms)
        judge.impressions = ImpressionJoin.load(saved.impressions, judge.is_recorded)
        judge.learned = saved.learned
        judge.scored, judge.skipped, judge.applied = saved.scored, saved.skipped, saved.applied
        judge.drifts = {
            name: DriftWatch(name, one.hits, one.found, one.last)
            for name, one in saved.drifts.items()
        }
        self._positions, self._started_ms = dict(saved.positions), saved.started_ms
        return MemoryStore.load(saved.store)

    def _read(self) -> None:
        """Read and judge until `stop` is set. Raises KafkaUnavailable: call again."""
        with open_reader(self._settings, self._decoder, self._positions) as reader:
            self._positions = reader.positions
            while not self._stop.is_set():
                self._beat()
                reader.read()
                end_s = time.monotonic() + TURN_S
                while (group := reader.next()) is not None:
                    self._judge.take(group)
                    if time.monotonic() > end_s:
                        break
                self._adapt(reader)
                self._do_due(reader)

    def _adapt(self, reader: LogReader) -> None:
        """Score fewer targets while the judge is behind with what came since its start."""
        now_s, lag_s = time.monotonic(), reader.lag_s()
        limit_s, judge = self._settings.judge_lag_s_max, self._judge
        if now_s - self._shared_s < SHARE_S or reader.is_past(self._started_ms):
            return
        behind, share = lag_s > limit_s, judge.share
        if behind or (share < 1 and lag_s < limit_s / 2):
            judge.fall_behind(behind)
        if judge.share != share:
            self._shared_s = now_s
            more = {"share": judge.share, "lag_s": round(lag_s, 1)}
            if behind:
                log.warning("the judge is behind: it scores fewer targets", extra=more)
            else:
                log.info("the judge scores more targets again", extra=more)

    def _do_due(self, reader: LogReader) -> None:
        now_s, settings = time.monotonic(), self._settings
        if now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            self._follow(self._generations())
        if now_s - self._checked_s >= LOGS_S:
            self._checked_s = now_s
            self._check_logs()
        if now_s - self._reported_s >= settings.judge_report_s:
            self._reported_s = now_s
            self._report(reader)
            self._weights.publish(self._judge.learner)
        if now_s - self._cleaned_s >= CLEAN_S:
            self._cleaned_s = now_s
            self._remove_idle_users()
        if now_s - self._written_s >= settings.judge_checkpoint_s:
            self._written_s = now_s
            self._write()

    def _check_logs(self) -> None:
        """Raise LogReplaced where a topic was made anew: a restart begins anew."""
        for topic, log_id in self._logs.items():
            if self._kept[topic] != log_id:
                name = self._settings.prefixed(topic)
                raise LogReplaced(f"topic {name} was made anew: the judge begins anew")

    def _follow(self, found: Generations) -> None:
        """Judge the active generation; take the micro-steps that ingest takes."""
        if found.ranges != self._steps.recorded:
            self._steps.recorded = found.ranges
            self._engine_now().open_steps_again()
        if not found.active or found.active in self._judge.tracks:
            return
        try:
            towers = self._bundle(found)
        except BundleError as error:
            log.warning("the new generation cannot be judged yet", extra={"reason": str(error)})
            return
        self._judge.replace(self._engine(towers, self._store_without_embeddings()))
        log.info("another generation is judged", extra={"generation": found.active})

    def _remove_idle_users(self) -> None:
        """As ingest does in Redis: what idle users left has no effect, and would stay for ever."""
        self._judge.write()
        engine = self._engine_now()
        cache, lock = engine.handlers.clicks.cache, threading.Lock()
        IdleUsers(self._settings, engine.store, cache, lock).check()

    def _report(self, reader: LogReader) -> None:
        judge = self._judge
        judge.settle()
        learner = judge.learner
        last = [watch.last for watch in judge.drifts.values() if watch.last is not None]
        self.report = JudgeReport(
            at_ms=now_ms(),
            event_ms=judge.rates.newest_ms,
            generation=next(iter(judge.tracks)),
            share=judge.share,
            scored=judge.scored,
            skipped=judge.skipped,
            applied=judge.applied,
            rejected=self._decoder.rejected,
            lag_s=round(reader.lag_s(), 3),
            behind=reader.behind(),
            rates=judge.rates.rates(),
            clicks=judge.impressions.rates.rates(),
            joined=msgspec.structs.replace(judge.impressions.counts),
            drifts={name: watch.found for name, watch in judge.drifts.items()},
            last_drifts=last,
            learned=0 if learner is None else learner.blender.learned,
            blender_replaced=learner is not None and learner.guard.replaced,
        )
        try:
            reports.write(self._settings, self.report)
        except OSError as error:
            log.warning("the rates cannot be written", extra={"reason": str(error)})

    def _write(self) -> None:
        """Write a checkpoint; a failure is logged, and the last one stays."""
        judge = self._judge
        judge.write()
        learner = judge.learner
        saved = Checkpoint(
            layout=checkpoints.layout_of(self._settings),
            logs=self._logs,
            positions=dict(self._positions),
            since_ms=judge.since_ms,
            started_ms=self._started_ms,
            scored=judge.scored,
            skipped=judge.skipped,
            applied=judge.applied,
            rejected=self._decoder.rejected,
            store=self._engine_now().store.export(),
            rates=judge.rates.export(),
            impressions=judge.impressions.export(),
            learned=b"" if learner is None else learner.encode(),
            drifts={
                name: SavedDrift(hits=one.hits, found=one.found, last=one.last)
                for name, one in judge.drifts.items()
            },
        )
        try:
            checkpoints.write(self._settings, saved)
        except OSError as error:
            log.error("the checkpoint cannot be written", extra={"reason": str(error)})

    def _engine(self, towers: Bundle, store: MemoryStore | None) -> Engine:
        engine = Engine(
            self._settings,
            towers,
            self._logs,
            store=store,
            follows=self._judge.follows,
            steps=self._steps,
        )
        engine.fill_index()
        return engine

    def _store_without_embeddings(self) -> MemoryStore:
        """The state of now for another generation: users' embeddings begin anew."""
        self._judge.write()
        engine = self._engine_now()
        slots = [user_slot(p) for p in range(self._settings.clicks_partitions)]
        store = MemoryStore.load(engine.store.export())
        for _ in store.remove_embeddings(engine.bundle.generation, slots):
            pass
        return store

    def _engine_now(self) -> Engine:
        [track] = self._judge.tracks.values()
        return track.engine

    def _generations(self) -> Generations:
        return generations.read(self._settings, self._kept.latest(GENERATIONS))

    def _bundle(self, found: Generations) -> Bundle:
        """The active generation's bundle. Raises BundleError."""
        if found.active not in found.manifests:
            raise BundleError(f"generation {found.active!r} is active but not recorded")
        return bundle.recorded(self._settings, found.manifests[found.active])

    def _beat(self) -> None:
        heartbeat.beat(self._settings, "judge")
