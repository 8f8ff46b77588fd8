"""`make chaos`: real servers and processes, faults by a seed, and an oracle that compares
everything.

make chaos                                  60 faults, three minutes of them
make chaos ARGS="--faults 200 --seed 7"     the long run; the same seed gives the same plan again
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sandbox.datasets import synthetic
from sandbox.servers import kafka_jars, valkey
from tests.chaos import drive, scene
from tests.chaos.schedule import KINDS, plan

console = Console(soft_wrap=True, highlight=False)
LIBRARIES = ("faust-streaming", "aiokafka", "kafka-python", "redis", "grpcio", "numpy")
SHOWN = 20


def main() -> int:
    """Run and report; 0 where nothing differs."""
    options = arguments()
    logging.basicConfig(level=logging.ERROR)
    # Kafka's clients log every attempt while the broker is away, on purpose.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    begun = time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="eddyline-chaos-"))
    console.print(
        f"seed {options.seed}, {options.faults} faults, {options.rate:g} records a second, items "
        f"are {options.items}; data in {home}"
    )
    dataset = synthetic.generate(items=300, users=120, clicks=6_000, seed=7)
    generations = home / "generations"
    gap_s = (options.gap * 2 / 3, options.gap * 4 / 3)
    faults = plan(options.seed, options.faults, gap_s, options.ingests)
    retrainings = sum(fault.kind == "retraining" for fault in faults)
    names = [str(1 + number) for number in range(1 + retrainings)]
    manifests = [scene.small_generation(generations, dataset, name) for name in names]
    result = drive.run(
        home / "run",
        generations,
        manifests,
        dataset,
        seed=options.seed,
        count=options.faults,
        gap_s=gap_s,
        rate=options.rate,
        ingests=options.ingests,
        patches=options.items == "patches",
        on_progress=console.print,
    )
    result.seconds["whole run"] = time.monotonic() - begun
    show(result)
    summary = report(result, options)
    Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    Path(options.json).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {options.json}")
    if result.differences:
        console.print(
            f"[bold]{len(result.differences)} DIFFERENCES[/], seed {options.seed}; data kept in "
            f"{home}"
        )
        for fault, met in result.met:
            console.print(f"{fault}  → {met or 'nothing met'}")
        for line in result.differences[:SHOWN]:
            console.print(f"  {line}", markup=False)
        return 1
    console.print("nothing differs")
    if not options.keep:
        shutil.rmtree(home, ignore_errors=True)
    return 0


def arguments() -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(prog="make chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=60, help="how many faults fall")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()) % 100_000, help="draws faults and load"
    )
    parser.add_argument(
        "--gap", type=float, default=3.0, help="seconds between faults, in the mean"
    )
    parser.add_argument("--rate", type=float, default=200.0, help="records sent a second")
    parser.add_argument("--ingests", type=int, default=2, help="ingest processes")
    parser.add_argument(
        "--items", choices=("whole", "patches"), help="records of `items`; drawn by the seed"
    )
    parser.add_argument("--keep", action="store_true", help="keep the data folder")
    parser.add_argument("--json", default=".eddyline/chaos/last.json", help="where the result goes")
    options = parser.parse_args()
    options.items = options.items or ("patches" if options.seed % 2 else "whole")
    for name in ("faults", "gap", "rate", "ingests"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} {getattr(options, name)}: must be above 0")
    return options


def show(result: drive.Result) -> None:
    """Print the tables."""
    faults = Table(
        "fault", "what it is", "fell", "met something", title=f"faults, seed {result.seed}"
    )
    for kind, (count, met) in result.by_kind().items():
        faults.add_row(kind, KINDS[kind], str(count), str(met))
    compared = Table("compared", "how many", title="the oracle")
    for what, count in sorted(result.counts.items()):
        compared.add_row(what, f"{count:,}")
    console.print(faults, compared)
    for name in ("sent", "failed_sends", "answers", "restarts", "records"):
        console.print(f"{name.replace('_', ' ')}: {dict(getattr(result, name))}")
    console.print(
        "seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in result.seconds.items())
    )


def report(result: drive.Result, options: argparse.Namespace) -> dict[str, Any]:
    """The result as JSON."""
    servers = {
        "broker": f"Apache Kafka {kafka_jars.VERSION}",
        "store": valkey.program()[1],
        "python": platform.python_version(),
    }
    return {
        "seed": result.seed,
        "faults": options.faults,
        "rate": options.rate,
        "items": options.items,
        "ingests": options.ingests,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": servers | {name: version(name) for name in LIBRARIES},
        "by_kind": result.by_kind(),
        "compared": result.counts,
        "sent": dict(result.sent),
        "failed_sends": dict(result.failed_sends),
        "answers": dict(result.answers),
        "restarts": result.restarts,
        "records": result.records,
        "seconds": {name: round(value, 1) for name, value in result.seconds.items()},
        "differences": result.differences[:1_000],
        "met": [[str(fault), met] for fault, met in result.met],
    }


if __name__ == "__main__":
    sys.exit(main())
