"""Redis hangs under load: ingest stands still in bounded memory, says so, burns no CPU, and catches
up.
"""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.ingest_measures import cpu_s, rss_mb
from sandbox.servers import free_ports
from tests.integration.test_crashes import assert_same_state, send_history

pytestmark = pytest.mark.timeout(240)
STOP_S = 4.0
PAUSED, LAG = "eddyline_ingest_paused_partitions", "eddyline_ingest_lag_records"


def metrics(port: int) -> dict[str, float]:
    """Sums over topics and partitions, by name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def quiet(found: dict[str, float]) -> bool:
    return found.get(LAG) == found[PAUSED] == 0


@pytest.mark.long
def test_a_redis_that_hangs_stops_ingest_and_nothing_else(
    own_valkey, make_live, tmp_path: Path
) -> None:
    port = free_ports.choose_ports(tmp_path, ("metrics",))["metrics"]
    live = make_live(own_valkey, with_worker=False, ingest_metrics_port=str(port))
    send_history(live)
    live.applied(60)
    pid = live.supervisor.pids()["ingest"]
    # A partition's lag is known from its first fetch on.
    live.wait_for("quiet metrics", lambda: quiet(metrics(port)), timeout_s=30)
    before = rss_mb(pid)
    own_valkey.pause("valkey")
    try:
        sent = send_history(live, times=3)
        live.wait_for("a pause in the metrics", lambda: metrics(port)[PAUSED], timeout_s=30)
        stands = metrics(port)
        assert stands["eddyline_ingest_waits_total"] > 0
        live.wait_for("the lag in the metrics", lambda: metrics(port)[LAG] > sent / 2, timeout_s=30)
        used = cpu_s(pid)
        time.sleep(STOP_S)
        assert cpu_s(pid) - used < 0.5 * STOP_S, "a busy loop"
        assert rss_mb(pid) < before + 150
    finally:
        own_valkey.resume("valkey")
    live.applied(90)
    live.wait_for("quiet metrics", lambda: quiet(metrics(port)), timeout_s=30)
    assert assert_same_state(live) > 0
