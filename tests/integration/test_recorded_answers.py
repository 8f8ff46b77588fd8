"""Impressions on real servers: an answer, its record, the click that it led to, and the archive."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from eddyline.archive import Archive
from eddyline.kafka import producers, topics
from eddyline.kafka.producers import sent_to
from eddyline.schema.answers import RecordedAnswer, decode_answer
from eddyline.schema.partitioning import partition_of
from evaluation.judge import report as reports
from evaluation.judge.impressions import JoinCounts
from evaluation.judge.report import JudgeReport
from tests.archiving import archive_all
from tests.integration.conftest import Live, OwnServers


def recorded(live: Live) -> list[RecordedAnswer]:
    records = live.read(topics.ANSWERS)
    for one in records:
        assert one.partition == partition_of(one.key.decode(), live.settings.clicks_partitions)
    return [decode_answer(one.value, key=one.key.decode()) for one in records]


def check_judge(live: Live) -> None:
    """A judge that starts now joins both clicks, on the third item of their answers."""
    judge = live.deployment.child(
        "judge",
        "evaluation.judge",
        lambda: True,
        judge_from="beginning",
        judge_report_s="1",
        answers_sample="1",
        clicks_partitions="4",
        items_partitions="2",
    )
    live.supervisor.start(judge)

    def joined() -> JudgeReport | None:
        report = reports.read(live.settings)
        return report if report is not None and report.joined.joined == 2 else None

    report = live.wait_for("the judge to join both clicks", joined, timeout_s=60)
    assert report.joined == JoinCounts(answers=2, joined=2)
    rates = {
        (one.group, one.value, one.position): (one.impressions, one.clicks)
        for one in report.clicks
        if one.window == "total" and one.position in (0, 3)
    }
    assert rates == {
        ("all", "", 0): (10, 2),
        ("all", "", 3): (2, 2),
        ("path", "towers", 0): (10, 2),
        ("path", "towers", 3): (2, 2),
        ("scene", "home", 0): (10, 2),
        ("arm", "b", 0): (10, 2),
    }


def check_without_kafka(live: Live, own_servers: OwnServers) -> None:
    """Queries go on at once, and are recorded again afterwards."""
    client = live.client()
    own_servers.pause("kafka")
    try:
        began = time.monotonic()
        for _ in range(50):
            assert len(client.retrieve("ana", 5, timeout_s=5).items) == 5
        assert time.monotonic() - began < 10, "a tenth of this on an idle machine"
    finally:
        own_servers.resume("kafka")
    last = client.retrieve("bob", 5, timeout_s=10).impression_id
    live.wait_for(
        "answers to be recorded again",
        lambda: last in {one.impression_id for one in recorded(live)},
        timeout_s=40,
    )


def test_an_answer_is_recorded_joined_with_its_click_and_archived(
    own_servers: OwnServers, make_live: Callable[..., Live]
) -> None:
    live = make_live(own_servers, with_items=False, worker={"answers_sample": "1"})
    client = live.client()
    answers: dict[str, Any] = {}
    for user in ("ana", "bob"):
        token = live.click(user, live.dataset.items[0].item_id)
        live.applied()
        answers[user] = client.retrieve(
            user, 5, after=token, wait_ms=2_000, scene="home", arm="b", timeout_s=10
        )
        live.click(user, answers[user].items[2].item_id, impression_id=answers[user].impression_id)
    found = live.wait_for("both records", lambda: len(r := recorded(live)) >= 2 and r)
    assert len(found) == 2, "each answer once"
    by_id = {one.impression_id: one for one in found}
    for user, answer in answers.items():
        one = by_id[answer.impression_id]
        assert (one.user_id, one.scene, one.arm, one.k) == (user, "home", "b", 5)
        assert [i.item_id for i in one.items] == [i.item_id for i in answer.items]
        assert [c.item_id for c in one.paths[0].items] == [i.item_id for i in answer.items]
        assert one.user_offset == answer.freshness.user.offset

    live.applied()
    archive_all(live.settings)
    archive = Archive(live.settings)
    shown = {one.event.impression_id: one.event for one in archive.read(topics.ANSWERS)}
    assert shown == by_id
    clicks = [one.event for one in archive.read(topics.CLICKS) if one.event.impression_id]
    assert len(clicks) == 2
    for click in clicks:
        assert shown[click.impression_id].items[2].item_id == click.item_id

    check_judge(live)

    sent_to(producers.send_forget(live.producer, live.settings, "ana"), live.settings)
    live.applied()
    archive_all(live.settings)
    assert {one.key for one in archive.read(topics.ANSWERS)} == {"bob"}

    check_without_kafka(live, own_servers)
