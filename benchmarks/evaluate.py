"""`eddyline evaluate` on public data sets, each in one command with fixed options.

make evaluate-ml-100k
make evaluate-ml-latest-small ARGS="--data FOLDER"

ml-100k is downloaded. The others are read from --data, the folder of the set as its source ships
it. The report is written to .eddyline/evaluate/NAME.json and .html.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eddyline.settings.loader import load
from sandbox.datasets import movielens

ROOT = Path(__file__).resolve().parents[1]
MAPS, EXAMPLES = ROOT / "benchmarks" / "maps", ROOT / "examples" / "maps"


@dataclass(frozen=True)
class DataSet:
    """One set. prepare: (folder of the set, folder to write to) -> words of the command"""

    prepare: Callable[[Path, Path], list[str]]
    repeats: str = "drop"


def ml_100k(data: Path, scratch: Path) -> list[str]:
    movielens.load(data, lambda what, done, total: None)
    folder = data / "data" / "ml-100k"
    return [
        str(folder / "ml-100k.inter"),
        *("--items", str(folder / "ml-100k.item"), "--users", str(folder / "ml-100k.user")),
        *("--map", str(MAPS / "movielens-100k-atomic.toml")),
    ]


def ml_latest_small(data: Path, scratch: Path) -> list[str]:
    files = [str(data / "ratings.csv"), "--items", str(data / "movies.csv")]
    return [*files, "--map", str(EXAMPLES / "movielens.toml")]


def movietweetings(data: Path, scratch: Path) -> list[str]:
    """Films of the first file are live from the start, others from their day in the feed on."""
    items = scratch / "items.jsonl"
    with items.open("w", encoding="utf-8") as out:
        for line in (data / "movies_first.dat").read_text(encoding="utf-8").splitlines():
            movie_id, title, genres = line.split("::")
            first = {"movie_id": movie_id, "title": title, "genres": genres, "ts": 0}
            out.write(json.dumps(first) + "\n")
        with gzip.open(data / "item_changes.jsonl.gz", "rt", encoding="utf-8") as feed:
            shutil.copyfileobj(feed, out)
    files = [str(data / "ratings.dat.gz"), "--items", str(items)]
    return [*files, "--map", str(MAPS / "movietweetings-feed.toml")]


def online_retail(data: Path, scratch: Path) -> list[str]:
    return [str(data / "online_retail.csv.gz"), "--map", str(EXAMPLES / "online-retail.toml")]


SETS = {
    "ml-100k": DataSet(ml_100k),
    "ml-latest-small": DataSet(ml_latest_small),
    "movietweetings": DataSet(movietweetings),
    "online-retail": DataSet(online_retail, repeats="keep"),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make evaluate-NAME", description=__doc__)
    parser.add_argument("name", choices=sorted(SETS))
    parser.add_argument("--data", type=Path, help="the folder of the set; default: the data folder")
    arguments, more = parser.parse_known_args(argv)  # other options are those of the command
    chosen, settings = SETS[arguments.name], load()
    out = Path(settings.data_dir) / "evaluate"
    scratch = out / arguments.name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    data = arguments.data or Path(settings.data_dir)
    try:
        words = chosen.prepare(data, scratch)
    except FileNotFoundError as error:
        print(f"{error.filename} is missing: name the folder of {arguments.name} by --data")
        return 2
    reports = [out / f"{arguments.name}.{suffix}" for suffix in ("json", "html")]
    for path in reports:
        path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "cli", "evaluate", *words, "--repeats", chosen.repeats]
    command += ["--json", str(reports[0]), "--html", str(reports[1]), *more]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    shutil.rmtree(scratch, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
