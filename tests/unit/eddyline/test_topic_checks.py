"""What is said about topics that others made."""

from __future__ import annotations

import pytest

from eddyline.kafka import topics
from eddyline.kafka.topic_checks import check_one
from eddyline.settings.loader import Settings

SETTINGS = Settings(kafka_bootstrap_servers="10.0.0.1:9092,10.0.0.2:9092", namespace="shop")
BY_AGE = [topics.CLICKS, topics.DEAD_LETTERS, topics.ANSWERS]


def found(name: str, copies: int = 1, **changed: str) -> list[str]:
    """The problems of a topic as Eddyline makes it, but for `changed`; _ stands for a dot."""
    configs = {"cleanup.policy": "delete"} | topics.topic_configs(SETTINGS, name)[1]
    configs |= {key.replace("_", "."): value for key, value in changed.items()}
    findings = check_one(SETTINGS, name, configs, copies)
    for finding in findings:
        assert finding.topic == f"shop.{name}"
        assert finding.mend.startswith("kafka-configs.sh --bootstrap-server 10.0.0.1:9092 --alter")
        assert f"--entity-name shop.{name} --add-config " in finding.mend
    return [finding.problem for finding in findings]


@pytest.mark.parametrize("name", topics.ALL)
def test_topics_as_eddyline_makes_them_are_right(name: str) -> None:
    assert found(name) == found(name, copies=3, min_insync_replicas="2") == []


@pytest.mark.parametrize("name", BY_AGE)
def test_compacted_clicks_lose_all_but_one(name: str) -> None:
    [problem] = found(name, cleanup_policy="compact")
    assert "cleanup.policy is compact, not delete: compaction keeps one record" in problem


@pytest.mark.parametrize("policy", ["delete", "compact,delete"])
def test_items_that_end_by_age_are_lost(policy: str) -> None:
    [problem] = found(topics.ITEMS, cleanup_policy=policy)
    assert problem.startswith(f"cleanup.policy is {policy}, not compact: records that still hold")


@pytest.mark.parametrize("name", topics.ARCHIVED)
def test_the_clocks_of_producers_distort(name: str) -> None:
    [problem] = found(name, message_timestamp_type="CreateTime")
    assert "is CreateTime, not LogAppendTime: producers' clocks decide" in problem


@pytest.mark.parametrize("name", BY_AGE)
@pytest.mark.parametrize(
    ("more_ms", "right"), [(-1, True), (0, True), (1, False), (2**62, False), (None, False)]
)
def test_a_log_keeps_nothing_longer_than_erasures_are_kept(
    name: str, more_ms: int | None, right: bool
) -> None:
    kept_ms = SETTINGS.forgotten_kept_d * 86_400_000
    problems = found(name, retention_ms=str(-1 if more_ms is None else kept_ms + more_ms))
    assert (problems == []) == right
    harm = "may be archived again" if name == topics.ANSWERS else "may bring the user back"
    assert all(problem.endswith(harm) for problem in problems)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (topics.CLICKS, "retention_ms"),
        (topics.USERS, "delete_retention_ms"),
        (topics.ITEMS, "delete_retention_ms"),
        (topics.DEAD_LETTERS, "retention_ms"),
        (topics.ANSWERS, "retention_ms"),
        (topics.DEAD_LETTERS, "max_message_bytes"),
    ],
)
def test_a_limit_may_be_larger_and_not_smaller(name: str, key: str) -> None:
    wanted = int(topics.topic_configs(SETTINGS, name)[1][key.replace("_", ".")])
    # How long clicks and dead letters may be kept has an end, see above.
    larger = () if key == "retention_ms" else ((-1, 0), (2**60, 0))
    for value, problems in ((wanted - 1, 1), (wanted, 0), (wanted + 1, 0), *larger):
        assert len(found(name, **{key: str(value)})) == problems, value
    assert len(found(name, **{key: "0"})) == 1


@pytest.mark.parametrize(
    ("copies", "in_sync", "problem"),
    [
        (1, "1", ""),
        (1, "2", "every write is refused"),
        (2, "1", ""),
        (2, "3", "every write is refused"),
        (3, "1", "is lost with one broker"),
        (3, "2", ""),
        (3, "3", ""),
    ],
)
def test_replicas_that_must_be_in_sync(copies: int, in_sync: str, problem: str) -> None:
    problems = found(topics.CLICKS, copies, min_insync_replicas=in_sync)
    assert [problem in one for one in problems] == ([True] if problem else [])


def test_what_kafka_does_not_show_is_not_judged() -> None:
    assert check_one(SETTINGS, topics.CLICKS, {}, 1) == []
