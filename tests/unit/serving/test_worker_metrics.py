"""The metrics of a query worker, and that the page names all of them."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from eddyline.process import metrics
from eddyline.settings.loader import Settings
from serving.answer.impressions import Impressions
from serving.metrics import WorkerCollector, serve
from serving.proto import retrieval_pb2 as pb
from serving.rpc.backends import RetrievalBackend
from serving.rpc.retrieval_service import BUCKETS_S, RetrievalService
from serving.rpc.shard_service import ShardService
from serving.sharding import ALL
from tests.unit.serving.direct_call import retrieve

PAGE = Path(__file__).parents[3] / "docs" / "operations.md"


class Holds(RetrievalBackend):
    """Answers with one item of one path, and has figures of an index."""

    def retrieve(self, query: Any, deadline: Any, received_us: int) -> pb.RetrieveResponse:
        newest = pb.PathSummary(path="newest", candidates=7, taken=2, marginal=1, took_us=250_000)
        paths = [pb.PathSummary(path="towers"), newest]
        return pb.RetrieveResponse(paths=paths)

    def fill_stats(self, response: pb.StatsResponse) -> None:
        response.missing.append("kafka: away")
        response.rule_items["pinned"] = 8
        response.index.MergeFrom(pb.IndexSizes(live=9, fresh=2, refused=3, rebuilds=4))
        found = pb.RecallStatus(
            step="wider", samples=250, estimate=0.97, low=0.96, high=0.98, shadowed=250
        )
        response.index.recall.CopyFrom(found)
        away_ms = int((time.time() - 60) * 1000)
        response.tail.MergeFrom(pb.TailStatus(lag_records=7, rejected=1, away_since_ms=away_ms))


def text(
    service: RetrievalService,
    shard: ShardService | None = None,
    impressions: Impressions | None = None,
) -> str:
    registry = CollectorRegistry()
    registry.register(WorkerCollector(service, shard=shard, impressions=impressions))
    return generate_latest(registry).decode()


def names(found: str) -> set[str]:
    return set(
        re.findall(r"^(eddyline_worker_\w+?)(?:_bucket|_sum|_count)?[{ ]", found, re.MULTILINE)
    )


def test_the_page_names_every_metric_and_no_other() -> None:
    service = RetrievalService(Settings())
    assert "eddyline_worker_ready 0.0" in text(service)
    assert names(text(service)) == {
        "eddyline_worker_ready",
        "eddyline_worker_queries_total",
        "eddyline_worker_query_seconds",
        "eddyline_worker_missing",
        "eddyline_worker_waiting_calls",
    }
    service.serve(Holds())
    retrieve(service, "u", 1)
    impressions = Impressions(1.0)
    impressions.count(sent=5, failed=2)
    found = text(service, ShardService(ALL, 10), impressions)
    assert names(found) == set(re.findall(r"eddyline_worker_\w+", PAGE.read_text(encoding="utf-8")))
    for line in (
        "eddyline_worker_ready 1.0",
        "eddyline_worker_missing 1.0",
        'eddyline_worker_recorded_answers_total{outcome="sent"} 5.0',
        'eddyline_worker_recorded_answers_total{outcome="dropped"} 0.0',
        'eddyline_worker_recorded_answers_total{outcome="failed"} 2.0',
        'eddyline_worker_rule_items_total{rule="pinned"} 8.0',
        'eddyline_worker_path_queries_total{path="towers"} 1.0',
        'eddyline_worker_path_items_total{path="towers"} 0.0',
        'eddyline_worker_path_items_total{path="newest"} 2.0',
        'eddyline_worker_path_candidates_total{path="newest"} 7.0',
        'eddyline_worker_path_marginal_total{path="newest"} 1.0',
        'eddyline_worker_path_seconds_total{path="newest"} 0.25',
        'eddyline_worker_index_items{part="live"} 9.0',
        'eddyline_worker_index_rebuilds_total{outcome="done"} 4.0',
        "eddyline_worker_index_exact_total 3.0",
        'eddyline_worker_recall{bound="low"} 0.96',
        'eddyline_worker_recall_step{step="wider"} 1.0',
        'eddyline_worker_recall_step{step="exact"} 0.0',
        "eddyline_worker_tail_lag_records 7.0",
    ):
        assert f"{line}\n" in found
    [away] = re.findall(r"^eddyline_worker_kafka_away_seconds (\S+)", found, re.MULTILINE)
    assert 60 <= float(away) < 90


def test_a_coordinator_tells_no_counts_of_shards_that_come_and_go() -> None:
    service, registry = RetrievalService(Settings()), CollectorRegistry()
    service.serve(Holds())
    registry.register(WorkerCollector(service, own_index=False))
    assert names(generate_latest(registry).decode()) == {
        "eddyline_worker_ready",
        "eddyline_worker_queries_total",
        "eddyline_worker_query_seconds",
        "eddyline_worker_missing",
        "eddyline_worker_waiting_calls",
        "eddyline_worker_index_items",
        "eddyline_worker_rule_items_total",
    }


def test_a_recall_that_is_not_known_yet_is_not_reported() -> None:
    class Young(Holds):
        def fill_stats(self, response: pb.StatsResponse) -> None:
            response.index.recall.CopyFrom(pb.RecallStatus(step="normal"))

    service = RetrievalService(Settings())
    service.serve(Young())
    found = text(service)
    assert "eddyline_worker_recall_samples 0.0" in found and "eddyline_worker_recall{" not in found


def test_queries_are_counted_by_outcome_and_time() -> None:
    service = RetrievalService(Settings())
    with pytest.raises(RuntimeError, match="UNAVAILABLE"):
        retrieve(service, "u", 1)
    assert 'queries_total{outcome="failed"} 0.0' in text(service), (
        "a worker that is not ready has no failed query"
    )
    service.serve(Holds())
    for _ in range(3):
        retrieve(service, "u", 1)
    with pytest.raises(RuntimeError, match="INVALID_ARGUMENT"):
        retrieve(service, "", 1)
    found = text(service)
    assert (
        'queries_total{outcome="answered"} 3.0' in found
        and 'queries_total{outcome="failed"} 1.0' in found
    )
    assert "eddyline_worker_query_seconds_count 4.0" in found
    assert f'eddyline_worker_query_seconds_bucket{{le="{BUCKETS_S[-1]}"}} 4.0' in found
    counts = service.counts()
    assert sum(counts.times) == 4 and len(counts.times) == len(BUCKETS_S) + 1
    assert 0 < counts.total_s < 4
    service._count(time.perf_counter() - 2 * BUCKETS_S[-1], pb.RetrieveResponse())
    assert service.counts().times[-1] == 1


def until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
            return "eddyline_worker_ready" in answer.read().decode()
    except OSError:
        return False


def test_a_port_that_is_taken_is_tried_again_and_an_error_in_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "AGAIN_S", 0.02)
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    settings = msgspec.structs.replace(Settings(), worker_metrics_port=port - 1)
    with caplog.at_level(logging.INFO, "eddyline.process.metrics"):
        end = serve(settings, RetrievalService(settings), place=1)
        until(lambda: bool(caplog.records))
        time.sleep(0.1)
        assert [record.levelname for record in caplog.records] == ["INFO"]
        monkeypatch.setattr(metrics, "TAKEN_S", 0.0)
        until(lambda: len(caplog.records) > 1)
        time.sleep(0.1)
        assert [record.levelname for record in caplog.records] == ["INFO", "ERROR"]
        taken.close()
        until(lambda: answers(port))
        end()
    assert not answers(port)
    assert [record.levelname for record in caplog.records] == ["INFO", "ERROR", "INFO"]


@pytest.mark.parametrize("drips", [False, True])
def test_slow_connections_are_cut_off(monkeypatch: pytest.MonkeyPatch, drips: bool) -> None:
    monkeypatch.setattr(metrics, "REQUEST_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = msgspec.structs.replace(Settings(), worker_metrics_port=port)
    end = serve(settings, RetrievalService(settings))
    until(lambda: answers(port))
    before = threading.active_count()
    slow = list[socket.socket]()
    try:
        for _ in range(40):
            slow.append(socket.create_connection(("127.0.0.1", port), 2))
            # Faster ones overflow the queue of the port, and the kernel tries again after seconds.
            time.sleep(0.005)
        stop = time.monotonic() + 1.0
        while time.monotonic() < stop:
            for one in slow if drips else ():
                with suppress(OSError):
                    one.sendall(b"G")
            assert threading.active_count() - before <= 2 * metrics.CONNECTIONS_MAX
            time.sleep(0.05)
        assert answers(port)
    finally:
        for one in slow:
            one.close()
        end()


def test_no_port_serves_nothing() -> None:
    def serving() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "metrics"]

    end = serve(Settings(), RetrievalService(Settings()), place=3)
    assert serving() == []
    end()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        end = serve(
            msgspec.structs.replace(Settings(), worker_metrics_port=port),
            RetrievalService(Settings()),
        )
        assert serving() == ["metrics"]
        end()
    assert serving() == []
