"""`make bench-judge`: what the judge costs beside a live stream, and whether it says what evaluate
says.

A Kafka of its own in a temporary folder. Cost: the judge's CPU time, from /proc, at 200 clicks a
second with a sample of 5 % of the users, as a share of one core; a busy machine changes it little.
RATE, SECONDS, ITEMS, USERS and WARM are variables. Agreement: the last EVENTS events of
MovieLens-100K, which is downloaded, or of the ratings.csv and movies.csv in the folder DATA; all
users sampled, every count against that of `evaluate`. COST=0 and AGREE=0 leave a part out.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.progress import Progress

from benchmarks import item_catalogue
from benchmarks.ingest_measures import cpu_s, load, rss_mb
from benchmarks.report import report, row
from cli.commands import evaluate as evaluate_command
from cli.commands import replay_file
from eddyline import generations
from eddyline.generations import Manifest
from eddyline.kafka import topics
from eddyline.kafka.producers import now_ms
from eddyline.settings.loader import Settings
from eddyline.settings.loader import load as load_settings
from embeddings.bundle import bundle as bundles
from embeddings.evaluation.metrics import CUTS
from evaluation import offline, protocol
from evaluation.event_log import EventLog, LogBuilder
from evaluation.judge import report as reports
from evaluation.judge.report import JudgeReport
from evaluation.product import Product
from sandbox.datasets import movielens
from sandbox.servers.local_servers import local_servers, log_dir
from sandbox.servers.supervisor import Supervisor

RATE = float(os.environ.get("RATE", "200"))
SECONDS = float(os.environ.get("SECONDS", "60"))
ITEMS = int(os.environ.get("ITEMS", "10000"))
USERS = int(os.environ.get("USERS", "20000"))
EVENTS = int(os.environ.get("EVENTS", "30000"))
WARM_CLICKS = int(os.environ.get("WARM", "60000"))
SAMPLE = 0.05
CPU_MAX = 10.0
SPLIT = 0.8
WAIT_S = 1_800.0
ROWS = ("towers", "popular", "newest", "cascade")
Rows = list[dict[str, Any]]


@contextlib.contextmanager
def judging(settings: Settings, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A judge process on these servers."""
    names = ("kafka_bootstrap_servers", "namespace", "data_dir", "bundle_dir", "judge_sample")
    values = {name: getattr(settings, name) for name in names} | more
    env = {f"EDDYLINE_{name.upper()}": str(value) for name, value in values.items()}
    child = subprocess.Popen([sys.executable, "-m", "cli", "judge"], env=os.environ | env)
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(40)
        finally:
            child.kill()


def wait_applied(settings: Settings) -> JudgeReport:
    """The report once the judge has read everything that is in the topics now."""
    total = sum(sum(topics.end_offsets(settings, name).values()) for name in topics.SOURCES)
    deadline = time.monotonic() + WAIT_S
    while True:
        found = reports.read(settings)
        if found is not None and found.applied >= total:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"the judge has {found and found.applied} of {total} records")
        time.sleep(0.2)


def cost(settings: Settings) -> Rows:
    """CPU and memory of a judge whose users have histories, while clicks come."""
    settings = msgspec.structs.replace(settings, namespace="cost", judge_sample=SAMPLE)
    folder = Path(settings.data_dir) / "generations"
    item_catalogue.write(folder / "1", ITEMS, 0)
    settings = msgspec.structs.replace(settings, bundle_dir=str(folder))
    topics.ensure_topics(settings)
    manifest = Manifest(generation="1", bundle="1", dimension=item_catalogue.D, created_ms=now_ms())
    generations.publish(settings, manifest)
    items = [item_catalogue.item(n) for n in range(ITEMS)]
    replay_file.send(settings, [msgspec.structs.replace(one, at_ms=now_ms()) for one in items])
    load(settings, tag="warm", count=WARM_CLICKS, users=USERS, item_prefix="i", items=ITEMS).result(
        WAIT_S
    )
    with judging(settings) as child:
        wait_applied(settings)
        time.sleep(15)  # its first checkpoint may still be written
        filling = load(
            settings,
            tag="live",
            count=int(RATE * (SECONDS + 20)),
            rate=RATE,
            users=USERS,
            item_prefix="i",
            items=ITEMS,
        )
        time.sleep(10)
        before, began, first = cpu_s(child.pid), time.monotonic(), reports.read(settings)
        time.sleep(SECONDS)
        used, took = cpu_s(child.pid) - before, time.monotonic() - began
        last, memory = reports.read(settings), rss_mb(child.pid)
        filling.result(WAIT_S)
        final = wait_applied(settings)
    assert first is not None and last is not None
    share, scored = 100 * used / took, last.scored - first.scored
    return [
        row(
            f"CPU of the judge, {RATE:g} clicks/s",
            share,
            "% of a core",
            f"≤ {CPU_MAX:g}",
            share <= CPU_MAX,
        ),
        row("  targets scored in that time", scored, "events", "≥ 1", scored >= 1),
        row(
            "  share of the sample that was scored", 100 * last.share, "%", "= 100", last.share == 1
        ),
        row("  memory", memory, "MB"),
        row("  lag at the end", final.lag_s, "s", "≤ 5", final.lag_s <= 5),
    ]


def movielens_log(settings: Settings) -> EventLog:
    """The last EVENTS events of MovieLens-100K or of the files in DATA; every item has a time.

    Without times the path `newest` would order the items by their appends to Kafka.
    """
    if folder := os.environ.get("DATA"):
        with Progress(disable=True) as bar:
            files = [Path(folder) / "ratings.csv"], Path(folder) / "movies.csv"
            by_map = str(Path(__file__).parents[1] / "examples" / "maps" / "movielens.toml")
            whole = evaluate_command.read(settings, *files, None, by_map, bar)
        clicks = [whole.click(number) for number in range(len(whole))]
        changes, profiles = whole.changes, whole.profiles
    else:
        data = movielens.load(Path(load_settings().data_dir), lambda what, done, total: None)
        clicks, changes, profiles = data.clicks, data.items, list(data.profiles.values())
    clicks = clicks[-EVENTS:]
    begin_ms = clicks[0].at_ms - len(changes)
    timed = [
        msgspec.structs.replace(item, at_ms=item.at_ms or begin_ms + n)
        for n, item in enumerate(changes)
    ]
    builder = LogBuilder(changes=timed, profiles=list(profiles))
    for click in clicks:
        builder.add(click)
    return builder.build()


def agreement(settings: Settings) -> Rows:
    """Counts of the judge, which reads a whole log from Kafka, and of `evaluate`."""
    from embeddings.models.base import Recipe
    from embeddings.training.trainer import train

    log = movielens_log(settings)
    folder = Path(settings.data_dir) / "agree"
    data = offline.training_data(log, log.split(SPLIT))
    train(data, folder / "1", "1", recipe=Recipe(epochs=2, seed=0))
    settings = msgspec.structs.replace(
        settings,
        namespace="agree",
        judge_sample=1.0,
        bundle_dir=str(folder),
        data_dir=str(folder / "data"),
    )
    topics.ensure_topics(settings)
    bundle = bundles.load(folder / "1")
    generations.publish(
        settings,
        Manifest(generation="1", bundle="1", dimension=bundle.dimension, created_ms=now_ms()),
    )
    clicks = [log.click(number) for number in range(len(log))]
    replay_file.send(settings, [*log.changes, *log.profiles, *clicks])
    began = time.monotonic()
    with judging(settings, judge_from="beginning", judge_report_s=1):
        final = wait_applied(settings)
    took, scored = time.monotonic() - began, len(protocol.scorable(log, 0))
    product = Product(settings, bundle)
    made = [offline.ROWS[name](log, product, scored, 0) for name in ROWS]
    outcome = protocol.run(log, product, made, 0, keeps_repeats=False)
    product.close()
    rows, different = [], 0
    for name in ROWS:
        ranks = outcome.rows[name].ranks[outcome.kept]
        wanted = [len(ranks), *(int((ranks <= k).sum()) for k in CUTS)]
        [found] = [
            one for one in final.rates if (one.window, one.row, one.group) == ("total", name, "all")
        ]
        counts = [found.targets, *(round(rate * found.targets) for rate in found.hr)]
        different += sum(abs(a - b) for a, b in zip(wanted, counts, strict=True))
        rows.append(row(f"{name}: hits at 10 of the judge", counts[1], f"of {counts[0]:,}"))
        rows.append(row(f"{name}: hits at 10 of evaluate", wanted[1], f"of {wanted[0]:,}"))
    rows.append(row("counts that differ, in sum", different, "", "= 0", different == 0))
    rows.append(row("events that were scored", scored / took, "events/s"))
    return rows


def main() -> int:
    random.seed(1)
    with tempfile.TemporaryDirectory(prefix="eddyline-judge-") as scratch:
        base = Settings(data_dir=scratch, worker_port=0)
        supervisor = Supervisor(log_dir(base))
        with local_servers(base, supervisor, owner="make bench-judge") as settings:
            rows = [] if os.environ.get("COST") == "0" else cost(settings)
            if os.environ.get("AGREE") != "0":
                rows += agreement(settings)
    return report("judge", rows, Path(load_settings().data_dir) / "bench", rate=RATE, users=USERS)


if __name__ == "__main__":
    sys.exit(main())
