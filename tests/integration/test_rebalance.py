"""Ingest processes come and go under load, in short: nothing lost, nothing doubled, the pause
measured.
"""

from __future__ import annotations

import msgspec
import pytest

from benchmarks.rebalance import Looks, change_hands
from cli.commands import replay_file
from eddyline.settings.loader import Settings
from sandbox.processes import Deployment
from sandbox.servers.local_servers import log_dir
from sandbox.servers.supervisor import Supervisor
from tests import oracle

STEPS = [("one", "start", 1), ("one more", "start", 1), ("one leaves", "term", 1)]
# A session's length, which is what a death without a word costs, and a busy machine on top.
PAUSE_MS_MAX = 20_000


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_partitions_change_hands_and_nothing_is_lost_or_doubled(
    fresh_settings, dataset, bundle
) -> None:
    folder, manifest = bundle
    ours = Settings()  # the processes get the addresses and folders only
    settings = msgspec.structs.replace(
        fresh_settings,
        clicks_partitions=ours.clicks_partitions,
        items_partitions=ours.items_partitions,
    )
    settings.bundles.parent.mkdir(parents=True, exist_ok=True)
    settings.bundles.symlink_to(folder)
    log_dir(settings).mkdir(parents=True, exist_ok=True)
    with Supervisor(log_dir(settings)) as idle:
        Deployment(settings, idle).prepare(manifest)
    replay_file.send(settings, dataset.items)
    phases = change_hands(settings, STEPS, rate=150, phase_s=2)
    assert [phase.name for phase in phases] == [name for name, *_ in STEPS]
    assert all(0 <= pause <= PAUSE_MS_MAX for phase in phases for pause in phase.pauses_ms), phases
    assert max(phases[1].pauses_ms) > 0, "no partition ever waited: nothing was measured"
    found = oracle.compare(settings)
    assert found.differences == []
    assert found.counts["event id"] == 150 * 2 * (len(STEPS) + 1)


def test_a_pause_is_the_time_in_which_records_waited_and_none_was_applied() -> None:
    looks = Looks(times=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    looks.fences = [[9, 9], [9, 9], [9, 9], [11, 9], [11, 9], [12, 9], [12, 9]]
    looks.ends = [[10, 10], [11, 10], [12, 10], [13, 10], [13, 11], [13, 12], [13, 12]]
    # Of the first: record 10 waits from 1.0 to 3.0, the next one from 3.0 to 5.0. Of the second: to
    # the end.
    assert looks.pauses_ms(0, 6) == [2_000, 2_000]
    assert looks.pauses_ms(4, 6) == [1_000, 2_000]
    assert looks.pauses_ms(0, 1) == [0, 0]
