"""The fusion `blend` on real servers: clicks teach the judge, and the worker's next answers differ.

Users walk around a ring of items: a user at one goes on to the next. Only the path `next` knows
that, so the blender has to learn that it is right.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from evaluation.judge import report as reports
from serving.rpc.client import Client
from tests.integration.conftest import Live, OwnServers

pytestmark = [pytest.mark.timeout(240), pytest.mark.long]
PATHS = "towers,popular_fast,next"
SETTINGS = {"fusion": "blend", "recall_paths": PATHS, "seen_items": "keep"}
RING = 12
USERS = 40


def learned(live: Live) -> int:
    report = reports.read(live.settings)
    return 0 if report is None else report.learned


def firsts(client: Client, ring: list[str]) -> int:
    """Of the users, for how many the first item is the one after their last."""
    right = 0
    for user in range(USERS):
        answer = client.retrieve(f"u{user}", 5, timeout_s=10)
        assert len(answer.items) == 5 and not answer.missing
        right += answer.items[0].item_id == ring[(user + RING - 1) % RING]
    return right


def test_clicks_teach_which_path_is_right_and_answers_follow(
    own_servers: OwnServers, make_live: Callable[..., Live]
) -> None:
    live = make_live(own_servers, worker=SETTINGS)
    client = live.client()
    ring = [item.item_id for item in live.dataset.items[:RING]]
    judge = live.deployment.child(
        "judge",
        "evaluation.judge",
        lambda: True,
        judge_from="beginning",
        judge_report_s="1",
        judge_wait_s="0.2",
        judge_sample="1",
        judge_repeats="keep",
        clicks_partitions="4",
        items_partitions="2",
        **SETTINGS,
    )
    # Each user has walked from an own place of the ring nearly once around.
    for step in range(RING - 1):
        for user in range(USERS):
            live.click(f"u{user}", ring[(user + step) % RING])
    live.applied()
    before = firsts(client, ring)
    live.supervisor.start(judge)
    live.wait_for("the judge to learn", lambda: learned(live) > 200, timeout_s=90)
    live.wait_for("answers to follow", lambda: firsts(client, ring) > USERS * 0.8, timeout_s=30)
    assert before < USERS * 0.8, "else there was nothing to learn"
    answer = client.retrieve("u0", 5, timeout_s=10)
    best = answer.items[0]
    shares = {path.path: path.share for path in best.paths}
    assert max(shares, key=shares.__getitem__) == "next"
    assert best.fused_score > answer.items[1].fused_score

    own_servers.pause("kafka")
    try:
        assert firsts(client, ring) > USERS * 0.8, "the last weights stay"
    finally:
        own_servers.resume("kafka")
