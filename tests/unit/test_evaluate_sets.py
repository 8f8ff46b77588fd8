"""The data sets of `make evaluate-NAME`: small files of their layouts become the right logs."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from benchmarks import evaluate as sets
from cli.commands import evaluate as command
from eddyline.settings.loader import Settings
from evaluation.event_log import EventLog
from sandbox.datasets import movielens


def read(name: str, data: Path, scratch: Path) -> EventLog:
    """The log, as the command with these words reads it."""
    words = sets.SETS[name].prepare(data, scratch)
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options.keys() <= {"--items", "--users", "--map"}
    paths = [Path(options[key]) if key in options else None for key in ("--items", "--users")]
    with command._bar() as bar:
        return command.read(Settings(), [Path(words[0])], *paths, options["--map"], bar)


def test_films_of_movietweetings_are_live_from_their_day_in_the_feed_on(tmp_path: Path) -> None:
    (tmp_path / "movies_first.dat").write_text("0000001::One (1999)::Drama|War\n", encoding="utf-8")
    with gzip.open(tmp_path / "ratings.dat.gz", "wt", encoding="utf-8") as out:
        out.write("7::0000002::9::1376953600\n7::0000001::2::1376953519\n")
    with gzip.open(tmp_path / "item_changes.jsonl.gz", "wt", encoding="utf-8") as out:
        out.write(
            '{"ts": 1376953519, "commit": "f", "op": "add", "movie_id": "0000002", '
            '"title": "Two (2013)", "genres": "Comedy"}\n'
        )
    log = read("movietweetings", tmp_path, tmp_path)
    assert [(i.item_id, i.title, i.categories, i.at_ms) for i in log.changes] == [
        ("0000001", "One (1999)", ["Drama", "War"], 0),
        ("0000002", "Two (2013)", ["Comedy"], 1_376_953_519_000),
    ]
    clicks = [log.click(n) for n in range(2)]
    assert [(c.user_id, c.item_id, c.kind, c.at_ms // 1000) for c in clicks] == [
        ("7", "0000001", "dislike", 1_376_953_519),
        ("7", "0000002", "like", 1_376_953_600),
    ]


def test_movielens_100k_is_read_with_films_and_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / "ml-100k"
    folder.mkdir(parents=True)
    texts = {
        "inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "196\t242\t3\t881250949\n",
        "item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "242\tKolya\t1996\tComedy Drama\n",
        "user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "196\t49\tM\twriter\t55105\n",
    }
    for suffix, text in texts.items():
        (folder / f"ml-100k.{suffix}").write_text(text, encoding="utf-8")
    monkeypatch.setattr(movielens, "load", lambda data, on_progress: None)
    log = read("ml-100k", tmp_path, tmp_path)
    [click, item, profile] = log.click(0), log.changes[0], log.profiles[0]
    assert (click.user_id, click.item_id, click.at_ms) == ("196", "242", 881_250_949_000)
    assert (item.item_id, item.categories, item.attributes) == (
        "242",
        ["Comedy", "Drama"],
        {"year": 1996},
    )
    assert profile.attributes == {"age": 49, "gender": "M", "occupation": "writer"}


def test_orders_of_online_retail_describe_their_items(tmp_path: Path) -> None:
    rows = (
        "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
        "536365,85123A,HOLDER,6,2010-12-01 08:26:00,2.55,17850.0,United Kingdom\n"
        "536366,71053,LANTERN,6,2010-12-01 08:28:00,3.39,,United Kingdom\n"
        "C536367,85123A,HOLDER 2,-1,2010-12-01 08:30:00,2.55,17850.0,United Kingdom\n"
    )
    with gzip.open(tmp_path / "online_retail.csv.gz", "wt", encoding="utf-8") as out:
        out.write(rows)
    log = read("online-retail", tmp_path, tmp_path)
    assert len(log) == 1 and log.click(0).kind == "purchase"
    assert [(item.item_id, item.title, item.at_ms) for item in log.changes] == [
        ("85123A", "HOLDER", log.click(0).at_ms)
    ]
    assert sets.SETS["online-retail"].repeats == "keep"


def test_a_missing_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDDYLINE_DATA_DIR", str(tmp_path / "out"))
    assert sets.main(["movietweetings", "--data", str(tmp_path / "none")]) == 2
    assert "name the folder of movietweetings by --data" in capsys.readouterr().out
