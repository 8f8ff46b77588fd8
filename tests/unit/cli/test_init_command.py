"""`eddyline init`: five answers become settings and maps; nothing is overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.commands import servers
from cli.main import app
from eddyline.errors import EddylineError, SettingsError
from eddyline.settings.loader import Settings, load


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, Any]]:
    monkeypatch.chdir(tmp_path)
    for name in ("KAFKA_BOOTSTRAP_SERVERS", "REDIS_URL", "EDDYLINE_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "my films.csv").write_text("movieId,title\n1,Heat\n", encoding="utf-8")
    found: list[tuple[Settings, Any]] = []
    monkeypatch.setattr(servers, "up", lambda made, processes: found.append((made, processes)))
    return found


def run(*words: str, answers: str = "", error: type[EddylineError] | None = None) -> str:
    result = CliRunner().invoke(app, ["init", *words], input=answers)
    if error is None:
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output
    assert isinstance(result.exception, error), (result.output, result.exception)
    return str(result.exception)


def test_five_answers_become_settings_maps_and_a_system(
    started: list[tuple[Settings, Any]], tmp_path: Path
) -> None:
    answers = ["k:9092", "redis://r:1/0", "data", "'my films.csv'", "yes"]
    printed = run(answers="".join(f"{one}\n" for one in answers))
    assert "my films.csv: items, by the map my films.csv.map.toml" in printed
    assert printed.rstrip().endswith("then: eddyline import 'my films.csv' --train")
    found = load({}, folder=tmp_path)
    assert (found.kafka_bootstrap_servers, found.redis_url) == ("k:9092", "redis://r:1/0")
    assert started == [(found, ["ingest", "worker"])]
    assert (tmp_path / "eddyline.toml").stat().st_mode & 0o077 == 0
    assert (tmp_path / "my films.csv.map.toml").exists()


def test_without_questions_and_without_a_start(
    started: list[tuple[Settings, Any]], tmp_path: Path
) -> None:
    printed = run("--yes", "--no-start")
    assert "then: eddyline up --with ingest,worker" in printed and not started
    assert (tmp_path / "eddyline.toml").read_text(encoding="utf-8") == 'data_dir = ".eddyline"\n'


def test_nothing_is_overwritten_and_wrong_answers_leave_nothing(
    started: list[tuple[Settings, Any]], tmp_path: Path
) -> None:
    assert "No such file" in run("--yes", "--files", "none.csv", error=EddylineError)
    assert "No closing quotation" in run("--yes", "--files", "'a", error=SettingsError)
    assert not (tmp_path / "eddyline.toml").exists()
    run("--yes", "--no-start")
    assert "exists already" in run("--yes", error=SettingsError)
    assert not started
