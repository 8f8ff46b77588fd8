"""The heartbeat: a process that beats is alive, one that stopped is not."""

import os
import time
from pathlib import Path

import pytest

from eddyline.process import heartbeat
from eddyline.settings.loader import Settings


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("EDDYLINE_DATA_DIR", str(tmp_path / "data"))
    return Settings(data_dir=str(tmp_path / "data"))


def test_a_process_without_a_heartbeat_is_not_alive(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert heartbeat.last_beat_s(settings, "ingest") is None
    assert heartbeat.main(["ingest"]) == 1
    assert "no heartbeat" in capsys.readouterr().err


def test_a_beat_counts_for_its_own_kind_of_process(settings: Settings) -> None:
    heartbeat.beat(settings, "ingest")
    heartbeat.beat(settings, "ingest")
    beat_s = heartbeat.last_beat_s(settings, "ingest")
    assert beat_s is not None and beat_s < 5
    assert heartbeat.main(["ingest"]) == 0 and heartbeat.main(["trainer"]) == 1


@pytest.mark.parametrize(
    ("ago_s", "code"), [(heartbeat.FRESH_S - 3, 0), (heartbeat.FRESH_S + 1, 1), (1e6, 1)]
)
def test_a_heartbeat_expires(settings: Settings, ago_s: float, code: int, tmp_path: Path) -> None:
    heartbeat.beat(settings, "ingest")
    (file,) = (tmp_path / "data" / "run").iterdir()
    os.utime(file, (time.time() - ago_s, time.time() - ago_s))
    assert heartbeat.main(["ingest"]) == code


def test_the_newest_heartbeat_decides_and_old_files_are_removed(
    settings: Settings, tmp_path: Path
) -> None:
    run = tmp_path / "data" / "run"
    run.mkdir(parents=True)
    for name, ago_s in (("ingest-1.alive", 100.0), ("ingest-2.alive", heartbeat.FORGOTTEN_S + 60)):
        (run / name).touch()
        os.utime(run / name, (time.time() - ago_s, time.time() - ago_s))
    heartbeat.beat(settings, "ingest")
    assert heartbeat.main(["ingest"]) == 0
    assert {path.name for path in run.iterdir()} == {
        "ingest-1.alive",
        f"ingest-{os.getpid()}.alive",
    }


def test_a_wrong_command_line_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert heartbeat.main([]) == 2 and "usage" in capsys.readouterr().err
