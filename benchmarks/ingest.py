"""What a click costs and how long it takes to be applied: `make bench-ingest`, the write side in
figures.

A Kafka and a Valkey of its own in a temporary folder; ingest, load generator and every peer are
processes of their own. Costs are CPU seconds, Redis' included, from a warm start on: a busy machine
changes them little. Latencies are wall clock, all processes on the same cores. N is the number of
events of the cost runs, STOP_S the length of the outage. LONG=1: ten million events, an outage of
60 s; an hour.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.ingest_measures import POLL_S, Ingest, Running, Watch, cpu_s, load, rss_mb
from benchmarks.report import report, row
from eddyline.generations import Manifest
from eddyline.kafka.producers import now_ms
from eddyline.settings.loader import Settings
from eddyline.settings.loader import load as load_settings
from sandbox.processes import Deployment
from sandbox.servers.local_servers import local_servers, log_dir
from sandbox.servers.supervisor import Supervisor

LONG = os.environ.get("LONG") == "1"
N = int(os.environ.get("N", "10000000" if LONG else "150000"))
# The peers do the same work a shorter time: one event in one pipeline takes a millisecond.
PEER_N = min(N, 150_000)
FAUST_N = min(N, 6_000)
STOP_S = float(os.environ.get("STOP_S", "60" if LONG else "15"))
RATES = (200, 2_000)
LATENCY_S = 30.0 if LONG else 10.0
USERS = 10_000
# Every user beyond the events that only count (`min_steps_before`), so that each click takes a
# micro-step.
WARM_EVENTS = 7
LAG_MS_MAX = 100
WAIT_S = 7_200.0
Rows = list[dict[str, Any]]


def costs(settings: Settings) -> Rows:
    """Events per CPU second: the consumer against getmany, ingest against the two peers."""
    filling = load(settings, tag="cost", count=N, users=USERS)
    if N == PEER_N:
        filling.result(WAIT_S)
    watch = Watch(settings)
    while watch.sent() < PEER_N:
        time.sleep(0.2)
    cost = {}
    for name, warm, count in (
        ("raw", PEER_N // 5, PEER_N),
        ("consumer", PEER_N // 5, PEER_N),
        ("faust", FAUST_N // 5, FAUST_N),
        ("loop", PEER_N // 5, PEER_N),
    ):
        cost[name] = Running(
            settings, "benchmarks.ingest_peers", name, str(warm), str(count)
        ).result(600)
    costs = [_cost_row(name, one) for name, one in cost.items()]
    cost["ingest"], memory = _ingested(settings, watch)
    costs.append(_cost_row("ingest", cost["ingest"]))
    script = watch.script_ms()
    watch.close()
    if N != PEER_N:
        filling.result(WAIT_S)

    def us(name: str) -> float:
        one = cost[name]
        return float((one["cpu_s"] + one["redis_s"]) / one["events"] * 1e6)

    consumer_ratio = (
        cost["raw"]["cpu_s"]
        / cost["raw"]["events"]
        / (cost["consumer"]["cpu_s"] / cost["consumer"]["events"])
    )
    ratios = [
        ("consumer against aiokafka getmany, decoded", consumer_ratio, 0.6),
        ("ingest against plain Faust", us("faust") / us("ingest"), 15),
        ("ingest against an asyncio loop", us("loop") / us("ingest"), 1.5),
    ]
    rows = [row(name, value, "×", f"≥ {least}", value >= least) for name, value, least in ratios]
    p99 = script["p99"]
    rows.append(row("one script in Redis, batches of 256, p99", p99, "ms", "≤ 2", p99 <= 2))
    rows.append(row("  p50", script["p50"], "ms"))
    rows.append(row(f"memory, second half of {N:,} events", memory, "%", "≤ 5", memory <= 5))
    return rows + costs


def _ingested(settings: Settings, watch: Watch) -> tuple[dict[str, float], float]:
    """(CPU of ingest and Redis after a fifth of the events, memory growth in the later half, %)."""
    seen: dict[str, Any] = {}
    watch.reset_scripts()
    ingest = Ingest(settings)
    pid = ingest.pid

    def look(applied: int) -> None:
        if "first" not in seen and applied >= N // 5:
            seen["first"] = (applied, cpu_s(pid), watch.redis_cpu_s(), time.perf_counter())
        if "half" not in seen and applied >= N // 2:
            seen["half"] = rss_mb(pid)

    watch.until(N, look)
    events, cpu, theirs, clock = seen["first"]
    cost = {
        "events": N - events,
        "cpu_s": cpu_s(pid) - cpu,
        "redis_s": watch.redis_cpu_s() - theirs,
        "seconds": time.perf_counter() - clock,
    }
    growth = 100 * (rss_mb(pid) / seen["half"] - 1)
    ingest.stop()
    return cost, growth


def _cost_row(name: str, one: dict[str, Any]) -> dict[str, Any]:
    own, theirs = one["cpu_s"] / one["events"] * 1e6, one["redis_s"] / one["events"] * 1e6
    return row(
        f"  {name}: own CPU {own:.1f} + Redis {theirs:.1f}, together", own + theirs, "µs/event"
    )


def micro_steps(found: dict[str, float]) -> Rows:
    """The micro-step, measured by `benchmarks.ingest_micro`."""
    rows = []
    for size in (32, 256):
        mine, theirs = found[f"numpy_{size}"], found[f"torch_{size}"]
        rows.append(
            row(f"micro-step with forward, batch of {size}", mine, "µs/event", "≤ 60", mine <= 60)
        )
        rows.append(
            row(
                f"  against autograd on the whole batch of {size}",
                theirs / mine,
                "×",
                "≥ 5",
                theirs >= 5 * mine,
            )
        )
    one = found["torch_one"]
    rows.append(row("  batch of 32 against autograd event by event", one / found["numpy_32"], "×"))
    return rows


def latencies(settings: Settings, pid: int) -> Rows:
    """Produced to applied, at each rate, micro-steps and all; pid is that of ingest."""
    rows: Rows = []
    watch = Watch(settings)
    before = watch.sent()
    for rate in RATES:
        count = int(rate * LATENCY_S)
        cpu, theirs = cpu_s(pid), watch.redis_cpu_s()
        sent = load(
            settings,
            tag=f"late-{rate}",
            count=count,
            rate=rate,
            users=USERS,
            in_turn=True,
            item_prefix="f",
        ).result(600)
        before += count
        watch.until(before)
        cpu, theirs = (cpu_s(pid) - cpu) / count * 1e6, (watch.redis_cpu_s() - theirs) / count * 1e6
        # The first second is a cold start; users take turns, so each list tells of one event.
        hops = watch.stamps([n % USERS for n in range(max(rate, count - USERS), count)])
        p50, p99 = np.percentile(hops["all"], [50, 99])
        rows.append(
            row(f"produced → applied at {rate:,}/s, p50", float(p50), "ms", "≤ 5", bool(p50 <= 5))
        )
        rows.append(
            row(f"produced → applied at {rate:,}/s, p99", float(p99), "ms", "≤ 25", bool(p99 <= 25))
        )
        for hop in ("kafka", "ingest"):
            for q in (50, 99):
                rows.append(row(f"  {hop}, p{q}", float(np.percentile(hops[hop], q)), "ms"))
        rows.append(row(f"  CPU of ingest (+ {theirs:.0f} of Redis)", cpu, "µs/event"))
        rows.append(row("  CPU of the load generator", sent["cpu_s"] / count * 1e6, "µs/event"))
    watch.close()
    return rows


def catch_up(settings: Settings) -> Rows:
    """The load goes on while no ingest runs; start one, and see how fast it comes back."""
    rate = RATES[-1]
    watch = Watch(settings)
    count = int(rate * (STOP_S + 25 + STOP_S / 3))
    at = watch.applied()
    running = load(
        settings, tag="stop", count=count, rate=rate, users=USERS, in_turn=True, item_prefix="f"
    )
    while watch.sent() < at + rate * STOP_S:
        time.sleep(POLL_S)
    watch.reset_scripts()
    started = time.perf_counter()
    ingest = Ingest(settings)
    while (first := watch.applied()) == at:
        time.sleep(0.01)
    begun = time.perf_counter()
    while (behind := watch.sent() - (applied := watch.applied())) > rate * LAG_MS_MAX / 1000:
        if time.perf_counter() - begun > 10 * STOP_S:
            break
        time.sleep(POLL_S)
    took = time.perf_counter() - begun
    times = (applied - first) / rate / took
    lag_ms = 1000 * behind / rate
    script = watch.script_ms()
    p99 = script["p99"]
    running.result(600)
    watch.close()
    ingest.stop()
    return [
        row(
            f"catch-up after {STOP_S:.0f} s at {rate:,}/s", times, "× real time", "≥ 5", times >= 5
        ),
        row("  lag when it was over", lag_ms, "ms", f"< {LAG_MS_MAX}", lag_ms < LAG_MS_MAX),
        row("  from the first batch to no lag", took, "s"),
        row("  from the start of the process to the first batch", begun - started, "s"),
        row("  one script in Redis, micro-steps on, p99", p99, "ms", "≤ 2", p99 <= 2),
        row("    p50", script["p50"], "ms"),
    ]


def main() -> int:
    """Run and report; the exit code."""
    folder = Path(load_settings().data_dir) / "bench"
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="eddyline-bench-") as home:
        base = Settings(data_dir=home, worker_port=0)
        micro = Running(base, "benchmarks.ingest_micro", str(base.bundles)).result(300)
        rows = []
        with (
            Supervisor(log_dir(base)) as supervisor,
            local_servers(base, supervisor, owner="bench") as servers,
        ):
            cost, live = (
                msgspec.structs.replace(servers, namespace=name) for name in ("cost", "live")
            )
            for one in (cost, live):
                Deployment(one, supervisor).prepare(
                    Manifest(generation="1", bundle="1", dimension=64, created_ms=now_ms())
                )
            rows += costs(cost)
            rows += micro_steps(micro)
            warm = USERS * WARM_EVENTS
            load(live, tag="warm", count=warm, users=USERS, in_turn=True, item_prefix="f").result(
                300
            )
            ingest, watch = Ingest(live), Watch(live)
            watch.until(warm)
            watch.close()
            rows += latencies(live, ingest.pid)
            ingest.stop()
            rows += catch_up(live)
    return report(
        "ingest", rows, folder, events=N, users=USERS, seconds=round(time.monotonic() - begun)
    )


if __name__ == "__main__":
    sys.exit(main())
