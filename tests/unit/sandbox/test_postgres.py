"""PostgreSQL's programs, table and user."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from eddyline.errors import LocalServerError
from eddyline.schema.events import Item
from sandbox.servers import postgres
from sandbox.servers.postgres import Postgres


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(postgres, "WHEEL", "no_such_module")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LocalServerError, match=r"install eddyline\[cdc\]"):
        postgres.programs()
    (tmp_path / "initdb").touch(mode=0o755)
    assert postgres.programs() == tmp_path


def test_a_table_has_a_column_for_each_attribute() -> None:
    items = [
        Item(item_id="a", title="It's", categories=["x"], attributes={"price": 1.5, "size": 4}),
        Item(item_id="b", attributes={"price": 2, "size": "L", "colours": ["red"]}),
    ]
    made, filled = postgres.table_of(items, 'odd"name').split(";\n")[:2]
    assert made.startswith('create table if not exists "odd""name" ("item_id" text primary key')
    for column in ('"price" numeric', '"size" text', '"colours" text[]'):
        assert column in made
    rows = json.loads(filled.split("$eddyline$")[1])
    assert rows[0]["title"] == "It's" and rows[1]["colours"] == ["red"]
    assert rows[0]["available"] is True


def test_a_title_cannot_end_the_text() -> None:
    with pytest.raises(ValueError, match="ends the text"):
        postgres.table_of([Item(item_id="a", title="$eddyline$; drop table items")], "items")


def test_an_attribute_cannot_replace_a_column() -> None:
    text = postgres.table_of([Item(item_id="a", title="T", attributes={"title": 7})], "items")
    assert '"title" text' in text and json.loads(text.split("$eddyline$")[1])[0]["title"] == "T"


def test_the_message_of_a_server_that_is_away_names_psql(tmp_path: Path) -> None:
    psql_that(tmp_path, "echo 'connection refused' >&2\nexit 2")
    with pytest.raises(LocalServerError, match="psql: connection refused"):
        Postgres(tmp_path, 1).sql("select 1")


def psql_that(folder: Path, does: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "psql").write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
    (folder / "psql").chmod(0o755)


def test_the_environment_names_no_other_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    psql_that(tmp_path, "env | grep ^PG || true")
    for name, value in (("PGHOSTADDR", "203.0.113.1"), ("PGSSLMODE", "require")):
        monkeypatch.setenv(name, value)
    assert Postgres(tmp_path, 1).sql("select 1") == ""


def test_a_probe_does_not_hold_up_the_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    psql_that(tmp_path / "bin", "exec sleep 60")
    (tmp_path / "postgres" / "data").mkdir(parents=True)
    monkeypatch.setattr(postgres, "programs", lambda: tmp_path / "bin")
    child, _ = postgres.prepare(tmp_path, 1)
    began = time.monotonic()
    with pytest.raises(LocalServerError, match="timed out"):
        child.ready()
    assert time.monotonic() - began < 30


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs it as another user")
def test_a_folder_that_the_other_user_cannot_reach_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "initdb").write_text("#!/bin/sh\n", encoding="utf-8")
    (closed / "initdb").chmod(0o755)
    monkeypatch.setattr(postgres, "programs", lambda: closed)
    with pytest.raises(LocalServerError, match="the user nobody cannot reach"):
        postgres.prepare(tmp_path, 1)
    assert not (tmp_path / "postgres" / "data").exists()
