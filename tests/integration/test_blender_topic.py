"""The blender's weights through a real Kafka: what the judge publishes, the worker answers with."""

from __future__ import annotations

import logging
import time

import msgspec
import numpy as np
import pytest

from eddyline.errors import KafkaUnavailable
from eddyline.kafka import reading, topics
from eddyline.kafka.topics import BLENDER
from eddyline.settings.loader import Settings
from evaluation.blend_learner import BlendLearner
from evaluation.judge.blender_publisher import BlenderPublisher
from serving.answer.blend_weights import KEY, CurrentBlender, start_blender
from serving.answer.blender import Blender
from serving.answer.blender_watch import BlenderWatch
from tests.integration.conftest import OwnServers

NAMES = ["towers", "popular", "newest"]


def blender_of(clicks: int, names: list[str] = NAMES) -> Blender:
    blender, rng = start_blender(names), np.random.default_rng(clicks)
    for _ in range(clicks):
        q, x = rng.random(len(blender.contexts)), rng.random((9, len(blender.features)))
        blender.learn(q, x, 3)
    return blender


def learner_of(clicks: int, names: list[str] = NAMES) -> BlendLearner:
    learner = BlendLearner(names)
    learner.blender = blender_of(clicks, names)
    return learner


def test_the_newest_weights_are_used_and_others_are_named(
    fresh_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    current, publisher = CurrentBlender(NAMES), BlenderPublisher(fresh_settings)
    watch = BlenderWatch(fresh_settings, current)
    try:
        watch.read()
        assert current().encode() == start_blender(NAMES).encode() and not current.why
        for clicks in (1, 40):
            publisher.publish(learner_of(clicks))
            watch.read()
            assert current().encode() == blender_of(clicks).encode()
        publisher.publish(learner_of(41, ["popular", "newest"]))
        with caplog.at_level(logging.WARNING):
            watch.read()
            watch.read()
        assert current().encode() == blender_of(40).encode()
        assert "learned for other recall paths" in current.why
        assert sum("weights of the blender" in one.message for one in caplog.records) == 1
    finally:
        publisher.close()
        watch.close()
    assert list(reading.latest(fresh_settings, BLENDER)) == [KEY]
    _, configs = topics.topic_configs(fresh_settings, BLENDER)
    assert configs["cleanup.policy"] == "compact"


def test_weights_that_have_not_changed_are_sent_once(fresh_settings: Settings) -> None:
    publisher = BlenderPublisher(fresh_settings)
    try:
        for learner in (None, learner_of(3), learner_of(3), None, learner_of(4)):
            publisher.publish(learner)
    finally:
        publisher.close()
    assert len(list(reading.read(fresh_settings, BLENDER))) == 2


@pytest.mark.long
def test_a_process_reads_by_itself_and_keeps_its_weights_while_kafka_is_away(
    own_servers: OwnServers, caplog: pytest.LogCaptureFixture
) -> None:
    settings = msgspec.structs.replace(own_servers.settings, kafka_timeout_ms=1_000)
    current, publisher = CurrentBlender(NAMES), BlenderPublisher(settings)
    watch = BlenderWatch(settings, current)
    publisher.publish(learner_of(5))
    watch.start()
    try:
        end_s = time.monotonic() + 20
        while current().learned != 5 and time.monotonic() < end_s:
            time.sleep(0.05)
        assert current().learned == 5
        own_servers.pause("kafka")
        with pytest.raises(KafkaUnavailable):
            watch.read()
        assert current().learned == 5
        with caplog.at_level(logging.WARNING):
            publisher.publish(learner_of(6))
            publisher.publish(learner_of(7))
        failures = [r for r in caplog.records if "cannot be published" in r.message]
        assert len(failures) == 1
        own_servers.resume("kafka")
        end_s = time.monotonic() + 40
        while current().learned != 8 and time.monotonic() < end_s:
            publisher.publish(learner_of(8))
            time.sleep(0.2)
        assert current().learned == 8
    finally:
        watch.close()
        publisher.close()
