"""`eddyline evaluate` on small files: what is read, printed and written, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from cli.commands import evaluate as command
from cli.main import app
from eddyline.errors import EddylineError, SettingsError
from eddyline.schema.events import Click, Item, UserProfile
from eddyline.settings.loader import Settings
from embeddings.data.examples import TrainingData
from evaluation.event_log import EventLog
from tests.unit.evaluation.small import BASE_MS, ITEMS, make_bundle, make_items

ROWS = "random,popular-7d,popular,towers-frozen,towers,cascade"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    make_bundle(folder, make_items())
    return folder / "1"


def run(*words: str, error: type[EddylineError] | None = None) -> str:
    """What was printed, or the error."""
    result = CliRunner().invoke(app, ["evaluate", *words])
    if error is None:
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output
    assert isinstance(result.exception, error), (result.output, result.exception)
    return str(result.exception)


def write_events(path: Path, n: int = 150, columns: str = "") -> Path:
    """Ratings of a few users, one row of them malformed."""
    rng, lines = np.random.default_rng(2), [f"userId,movieId,rating,timestamp{columns}"]
    for at in range(n):
        more = f",Film {rng.integers(99)},{at % 4 + 1}" if columns else ""
        item, rating = rng.integers(ITEMS - 4), rng.choice([1.0, 3.0, 5.0])
        lines.append(f"u{rng.integers(5)},i{item},{rating},{BASE_MS // 1000 + 60 * at}{more}")
    lines.append(f",i1,3.0,{BASE_MS // 1000}{',x,1' if columns else ''}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_items(path: Path) -> Path:
    lines = [json.dumps({"item_id": f"i{n}", "title": f"Film {n}"}) for n in range(ITEMS)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Page(HTMLParser):
    """What a page refers to and shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.cells: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_files_become_a_table_json_and_one_page(tmp_path: Path, bundle: Path) -> None:
    events = write_events(tmp_path / "ratings.csv")
    items = write_items(tmp_path / "items.jsonl")
    out, html = tmp_path / "out.json", tmp_path / "out.html"
    words = [str(events), "--items", str(items), "--bundle", str(bundle), "--rows", ROWS]
    printed = run(*words, "--json", str(out), "--html", str(html), "--split", "0.6")
    assert "1 rows left out: ratings.csv: missing_field user_id" in printed
    assert "log 150, before the split 90, scored " in printed
    [report] = json.loads(out.read_text(encoding="utf-8"))
    names = [row["name"] for row in report["rows"]]
    assert names == [
        "random",
        "popular-7d",
        "popular",
        "towers-frozen",
        "towers-frozen-nostep",
        "towers",
        "towers-nostep",
        "cascade",
    ]
    events_of = report["events"]
    assert (
        events_of["scored"] + events_of["repeats left out"] == 60 - events_of["dislikes left out"]
    )
    assert events_of["dislikes left out"] > 5 and not report["rejected"]
    hits = report["rows"][-1]["metrics"]["hr_10"]
    assert hits["low"] <= hits["value"] <= hits["high"] and hits["value"] > 0.1
    line = next(line for line in printed.splitlines() if line.startswith("cascade"))
    assert line.split()[1:3] == [f"{hits['value']:.4f}", f"{hits['low']:.4f}–{hits['high']:.4f}"]
    text = html.read_text(encoding="utf-8")
    page = Page(text)
    assert page.links == [] and "script" not in page.tags and "url(" not in text
    assert f"{hits['value']:.4f} ({hits['low']:.4f}–{hits['high']:.4f})" in page.cells
    pictures = text.split("<svg")[1:]
    assert len(pictures) == 2
    for picture in pictures:
        ElementTree.fromstring("<svg" + picture.partition("</svg>")[0] + "</svg>")
        assert "nan" not in picture.partition("</svg>")[0].lower()
    assert run(*words, "--json", str(out), error=SettingsError) == f"--json {out}: exists already"


def test_a_table_of_events_that_describes_items_gives_their_first_row(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(
        "InvoiceNo,CustomerID,StockCode,Description,UnitPrice,InvoiceDate\n"
        "1,u1,a,Early,1.5,2020-01-01 10:00\n"
        "2,u1,b,Other,2.5,2020-01-02 10:00\n"
        "3,u2,a,Late,9.5,2020-01-03 10:00\n",
        encoding="utf-8",
    )
    with command._bar() as bar:
        log = command.read(Settings(), [path], None, None, "", bar)
    assert [(item.item_id, item.title) for item in log.changes] == [("a", "Early"), ("b", "Other")]
    assert [item.at_ms for item in log.changes] == log.at_ms[:2].tolist()


def test_two_configurations_are_compared_event_by_event(tmp_path: Path, bundle: Path) -> None:
    events, files = write_events(tmp_path / "ratings.csv"), []
    for name, length in (("long", 50), ("short", 1)):
        file = tmp_path / f"{name}.toml"
        file.write_text(f"history_length_max = {length}\n", encoding="utf-8")
        files.append(str(file))
    items = write_items(tmp_path / "items.jsonl")
    words = [str(events), "--items", str(items), "--bundle", str(bundle), "--rows", "towers,random"]
    out = tmp_path / "out.json"
    words += ["--repeats", "keep", "--split", "0.4", "--json", str(out)]
    printed = run(*words, "--compare", *files)
    assert "ratings.csv, long.toml: log 150" in printed
    left, right = json.loads(out.read_text(encoding="utf-8"))
    by_name = {one["left"].rpartition(" ")[2]: one["hr_10"] for one in left["differences"][-3:]}
    for row in ("towers", "random"):
        values = [
            next(one for one in report["rows"] if one["name"] == row)["metrics"]["hr_10"]["value"]
            for report in (left, right)
        ]
        assert by_name[row]["value"] == pytest.approx(values[0] - values[1])
    assert by_name["towers"]["low"] < by_name["towers"]["high"]
    assert by_name["random"] == {"value": 0, "low": 0, "high": 0}


def test_the_first_query_that_differs_is_shown(tmp_path: Path, bundle: Path) -> None:
    events, files = write_events(tmp_path / "ratings.csv"), []
    for name, length in (("long", 50), ("short", 1)):
        file = tmp_path / f"{name}.toml"
        file.write_text(f"history_length_max = {length}\n", encoding="utf-8")
        files.append(str(file))
    items = write_items(tmp_path / "items.jsonl")
    words = [str(events), "--items", str(items), "--bundle", str(bundle), "--split", "0.1"]
    out = tmp_path / "out.json"
    printed = run(*words, "--json", str(out), "--diff", *files)
    found = json.loads(out.read_text(encoding="utf-8"))["first_difference"]
    line = next(line for line in printed.splitlines() if line.startswith("query "))
    assert line.startswith(f"query {found['query']}, before event {found['event']} of the sorted ")
    assert f"user {found['user_id']} at 2020-09-13T" in line and f"({found['at_ms']})" in line
    table = printed.splitlines()[printed.splitlines().index(line) + 1 :]
    assert table[0].split() == ["long.toml", "short.toml"] and len(table) == 11
    marked = table[found["first_position"]]
    left, right = (
        found[side][found["first_position"] - 1]["item_id"] for side in ("left", "right")
    )
    assert marked.startswith("→") and left in marked and right in marked and left != right
    printed = run(*words, "--diff", files[0], files[0])
    assert "queries: long.toml and long.toml answer all of them alike" in printed


def test_topics_and_archive_give_the_same_log_as_files(bundle: Path) -> None:
    clicks = [
        Click(user_id="u", item_id=f"i{n % 7}", at_ms=BASE_MS + n, event_id=f"e{n}")
        for n in range(20)
    ]
    data = TrainingData([Item(item_id="i1")], {"u": {"age": 3}}, clicks)
    log: EventLog = command._log_of(Settings(), data)
    assert [log.click(n) for n in range(20)] == clicks
    assert log.profiles == [UserProfile(user_id="u", attributes={"age": 3})]
    assert log.changes == [Item(item_id="i1")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (lambda f: [], "one of them"),
        (lambda f: [f, "--archive"], "one of them"),
        (lambda f: [f, "--repeats", "some"], "expected drop or keep"),
        (lambda f: [f, "--split", "1"], "must be between 0 and 1"),
        (lambda f: [f, "--split", "0"], "must be between 0 and 1"),
        (lambda f: [f, "--rows", "towers,ours"], "--rows ours: expected some of random"),
        (lambda f: [f, "--compare", f, f, "--diff", f, f], "--compare and --diff: name one"),
        (lambda f: [f, "--html", f"{f}.x", "--diff", f, f], "--html: --diff makes no page"),
        (lambda f: [f, "--json", f"{f}/x.json"], "ratings.csv': cannot be written: "),
        (lambda f: [f, "--html", "/proc/x.html"], "--html = '/proc': cannot be written: "),
        (lambda f: [f, "--json", f], "ratings.csv: exists already"),
        (lambda f: [f, "--json", f"{f}.x", "--html", f"{f}.x"], "is the file of --json too"),
        (lambda f: [f, "--bundle", f"{f}.none"], "ratings.csv.none/manifest.json: is missing"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_read(
    tmp_path: Path, words: Callable[[str], list[str]], message: str
) -> None:
    path = write_events(tmp_path / "ratings.csv", 5)
    assert message in run(*words(str(path)), error=EddylineError)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_a_seed_out_of_bounds_is_refused(tmp_path: Path, seed: str) -> None:
    path = write_events(tmp_path / "ratings.csv", 5)
    result = CliRunner().invoke(app, ["evaluate", str(path), "--seed", seed])
    assert result.exit_code == 2 and "'--seed'" in result.output
    assert [*tmp_path.iterdir()] == [path]


def test_the_largest_seed_is_used(tmp_path: Path, bundle: Path) -> None:
    path = write_events(tmp_path / "ratings.csv")
    run(str(path), "--bundle", str(bundle), "--rows", "random", "--seed", str(2**32 - 1))


@pytest.mark.parametrize(
    ("option", "line", "becomes"),
    [("--items", {"item_id": "i1", "at_ms": 10**13}, "an item"), ("--users", {}, "a profile")],
)
def test_a_named_file_that_gives_nothing_is_refused(
    tmp_path: Path, bundle: Path, option: str, line: dict[str, object], becomes: str
) -> None:
    """Otherwise the items would be live from their first event on, as without a file."""
    path, other = write_events(tmp_path / "ratings.csv"), tmp_path / "other.jsonl"
    other.write_text(json.dumps({"user_id": "", **line}) + "\n", encoding="utf-8")
    topic = {"--items": "items", "--users": "users"}[option]
    beside = tmp_path / "other.jsonl.map.toml"
    beside.write_text(f'[{topic}]\npreset = "eddyline"\n', encoding="utf-8")
    words = [str(path), option, str(other), "--bundle", str(bundle)]
    assert run(*words, error=SettingsError) == f"{other}: no row becomes {becomes}"


def test_a_missing_file_of_items_is_seen_before_the_events_are_read(tmp_path: Path) -> None:
    path = write_events(tmp_path / "ratings.csv")
    with command._bar() as bar, pytest.raises(EddylineError, match=r"none\.jsonl"):
        command.read(Settings(), [path], tmp_path / "none.jsonl", None, "", bar)
    assert not bar.tasks


@pytest.mark.parametrize(
    ("times", "kind", "message"),
    [
        (0, "click", "--split 0.8: none of the 20 events is before it"),
        (1_000, "dislike", "--split 0.8: of the 20 events 4 are after it, and none"),
    ],
)
def test_a_log_with_nothing_to_score_is_refused_before_a_training(
    tmp_path: Path, times: int, kind: str, message: str
) -> None:
    path = tmp_path / "events.jsonl"
    with path.open("w", encoding="utf-8") as out:
        for n in range(20):
            event = {"user_id": "u", "item_id": f"i{n}", "at_ms": BASE_MS + times * n}
            out.write(json.dumps({**event, "kind": kind if n > 15 else "click"}) + "\n")
    assert run(str(path), error=SettingsError).startswith(message)


def test_settings_that_change_the_reading_cannot_be_compared(tmp_path: Path) -> None:
    path, files = write_events(tmp_path / "ratings.csv", 5), []
    for name, dwell_ms in (("a", 0), ("b", 1_000)):
        files.append(tmp_path / f"{name}.toml")
        files[-1].write_text(f"dwell_ms_full = {dwell_ms}\n", encoding="utf-8")
    found = run(str(path), "--compare", *map(str, files), error=SettingsError)
    assert "--compare: dwell_ms_full is 0 in a.toml and 1000 in b.toml" in found


def test_a_bundle_is_trained_on_what_lies_before_the_split(tmp_path: Path) -> None:
    """The same log and seed give the same bytes; another seed gives other towers."""
    events, reports = write_events(tmp_path / "ratings.csv"), []
    for number, seed in enumerate(("3", "3", "4")):
        out = tmp_path / f"{number}.json"
        words = ["--epochs", "1", "--rows", "towers", "--repeats", "keep", "--seed", seed]
        printed = run(str(events), *words, "--json", str(out))
        assert "target not live" in printed and "towers-nostep" in printed
        report = json.loads(out.read_text(encoding="utf-8"))[0]
        reports.append([report["rows"][0]["metrics"]["mrr"]["value"], out.read_bytes()])
    assert reports[0] == reports[1]
    assert reports[0][0] != reports[2][0]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_a_training_and_leaves_nothing_behind(
    tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    """Without a traceback, as of a key in the terminal; a service manager sends SIGTERM."""
    events, scratch = write_events(tmp_path / "ratings.csv", 4_000), tmp_path / "scratch"
    scratch.mkdir()
    command_line = [sys.executable, "-m", "cli", "evaluate", str(events), "--epochs", "1000"]
    with subprocess.Popen(
        command_line,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        # A runner in the background may ignore the signal, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            deadline_s = time.monotonic() + 120
            while not [*scratch.glob("eddyline-evaluate-towers-*")]:
                assert process.poll() is None and time.monotonic() < deadline_s
                time.sleep(0.05)
            process.send_signal(sent)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code and "Traceback" not in output, output
    assert [*scratch.glob("eddyline-*")] == []
