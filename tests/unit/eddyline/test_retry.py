"""Waits for servers: growing pauses, a stop ends them, other errors pass through."""

import threading
import time
from itertools import pairwise

import pytest

from eddyline.errors import KafkaUnavailable, StoreRefused
from eddyline.process.retry import Backoff, Retry, Stopped
from eddyline.settings.loader import Settings

SETTINGS = Settings(backoff_ms_max=10)


@pytest.mark.parametrize("max_s", [0.2, 0.39, 0.4, 0.41, 100.0])
def test_pauses_double_up_to_the_limit(max_s: float) -> None:
    backoff = Backoff(0.1, max_s)
    pauses = [backoff.next_s() for _ in range(20)]
    assert pauses[:2] == [0.1, 0.2] and pauses[-1] == min(max_s, 0.1 * 2**19)
    assert all(b == min(2 * a, max_s) for a, b in pairwise(pauses))
    backoff.reset()
    assert backoff.next_s() == 0.1


def test_no_pause_is_longer_than_the_limit_not_even_the_first() -> None:
    assert Backoff(0.1, 0.05).next_s() == 0.05


def test_a_server_that_comes_back_is_waited_for() -> None:
    tries, names = 0, list[str]()

    def call() -> str:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise KafkaUnavailable("away")
        return "here"

    assert Retry(SETTINGS, on_wait=names.append).wait_for("Kafka", call) == "here"
    # A process that waits long shows at each attempt that it is alive.
    assert (tries, names) == (4, 4 * ["Kafka"])


def test_a_stop_ends_the_wait() -> None:
    def call() -> None:
        raise KafkaUnavailable("away")

    stop = threading.Event()
    threading.Timer(0.05, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(Stopped):
        Retry(Settings(backoff_ms_max=60_000), stop).wait_for("Kafka", call)
    assert time.monotonic() - begun < 5


def test_an_error_that_waiting_does_not_heal_passes_through() -> None:
    def call() -> None:
        raise StoreRefused("another layout")

    with pytest.raises(StoreRefused):
        Retry(SETTINGS).wait_for("Redis", call)
