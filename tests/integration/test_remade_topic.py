"""A topic that is deleted and made anew in a real Kafka is noticed by its id."""

from __future__ import annotations

import time

from eddyline.errors import EddylineError
from eddyline.kafka import topics
from eddyline.settings.loader import Settings
from serving.worker.log_watch import LogWatch


def test_a_topic_that_is_made_anew_is_noticed(fresh_settings: Settings) -> None:
    settings, name = fresh_settings, topics.item_vectors("1")
    topics.ensure_topics(settings, [*topics.SOURCES, name])
    known = topics.log_ids(settings, [name, topics.CLICKS])
    watch = LogWatch(settings, known)
    watch.check()
    assert watch.missing() == ""
    with topics.open_admin(settings) as admin:
        admin.delete_topics([settings.prefixed(name)])
    deadline = time.monotonic() + 30
    while not watch.missing():
        assert time.monotonic() < deadline
        time.sleep(0.2)
        watch.check()
    while True:  # Kafka deletes in the background
        assert time.monotonic() < deadline
        try:
            topics.ensure_topics(settings, [name])
            new = topics.log_ids(settings, [name])[name]
            if new != known[name]:
                break
        except EddylineError:
            pass
        time.sleep(0.2)
    watch.check()
    said = watch.missing()
    assert f"the topic {settings.prefixed(name)} was made anew or deleted" in said
    assert "clicks" not in said
