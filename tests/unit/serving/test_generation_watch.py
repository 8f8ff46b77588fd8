"""A worker leaves its generation before what it serves from is removed."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from eddyline import generations
from eddyline.errors import GenerationEnded, KafkaUnavailable
from eddyline.generations import End, Generations
from eddyline.process.lifecycle import exit_code
from eddyline.settings.loader import Settings
from serving.generation_watch import GenerationWatch

LATER = 2**52
ENDED = Generations("4", {}, {}, {"1": End(ended_ms=1_000, leave_ms=2_000, remove_ms=3_000)})


def saying(monkeypatch: pytest.MonkeyPatch, found: Generations | Exception) -> None:
    def read(settings: Any) -> Generations:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(generations, "read", read)


def test_the_process_is_ended_once_its_generation_must_not_be_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saying(monkeypatch, ENDED)
    stop = threading.Event()
    watch = GenerationWatch(Settings(), "1", stop.set)
    with caplog.at_level(logging.WARNING):
        watch.check(1_000)
        watch.check(1_999)
    assert [record.message for record in caplog.records] == [
        "the generation of this process has ended: restart it before it has to end"
    ]
    watch.raise_ended()
    assert not stop.is_set()
    watch.start()
    assert stop.wait(10)
    watch.close()
    with pytest.raises(GenerationEnded, match="generation 1 has ended") as ended:
        watch.raise_ended()
    assert exit_code(ended.value) == 1, "a restart heals it"


@pytest.mark.parametrize(
    "found",
    [
        Generations("1", {}, {}, {}),
        Generations("4", {}, {}, {"1": End(ended_ms=1, leave_ms=LATER, remove_ms=LATER)}),
        KafkaUnavailable("away"),
        RuntimeError("broken"),
    ],
)
def test_it_serves_on_otherwise(
    monkeypatch: pytest.MonkeyPatch, found: Generations | Exception
) -> None:
    monkeypatch.setattr(generations, "CHECK_S", 0.01)
    saying(monkeypatch, found)
    stop = threading.Event()
    watch = GenerationWatch(Settings(), "1", stop.set)
    watch.start()
    assert not stop.wait(0.1)
    watch.close()
    watch.raise_ended()
