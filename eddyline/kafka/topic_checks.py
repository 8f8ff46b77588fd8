"""Whether topics that others made, or changed, keep what Eddyline needs.

Nothing is changed here. A finding says what would be lost or distorted, and the command that mends
it. `topics.ensure_topics` creates what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eddyline.kafka import topics
from eddyline.schema.erasure import DAY_MS
from eddyline.settings.loader import Settings

_POLICY, _STAMP, _KEEP = "cleanup.policy", "message.timestamp.type", "retention.ms"
_DELETES, _BYTES, _IN_SYNC = "delete.retention.ms", "max.message.bytes", "min.insync.replicas"
# Configurations where a larger value is as good.
_AT_LEAST = (_KEEP, _DELETES, _BYTES)
# Their records of users go by age.
_BY_AGE = (topics.CLICKS, topics.DEAD_LETTERS, topics.ANSWERS)


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a topic.

    topic:   the name in Kafka, prefix included
    problem: what is configured, and what it does to the data
    mend:    the command that mends it, for a shell
    """

    topic: str
    problem: str
    mend: str

    def __str__(self) -> str:
        return f"topic {self.topic}: {self.problem}; mend it by: {self.mend}"


def check_topics(settings: Settings) -> list[Finding]:
    """Findings on `topics.ALL`, and no others.

    Topics whose configuration Kafka does not show, for the right DESCRIBE_CONFIGS is missing, are
    not checked. Raises KafkaUnavailable, KafkaRefused.
    """
    names = topics.ALL
    real = {name: settings.prefixed(name) for name in names}
    with topics.open_admin(settings) as admin:
        existing = set(admin.list_topics())
        there = [name for name in names if real[name] in existing]
        found = [
            Finding(real[name], "does not exist", _creating(settings, name))
            for name in names
            if name not in there
        ]
        if not there:
            return found
        configs = topics.shown_configs(settings, admin, there)
        copies = {
            topic["name"]: min((len(p["replica_nodes"]) for p in topic["partitions"]), default=1)
            for topic in admin.describe_topics([real[name] for name in there])
        }
    for name in there:
        found += check_one(settings, name, configs[name], copies.get(real[name], 1))
    return found


def _creating(settings: Settings, name: str) -> str:
    if not settings.has_own_topic(name):
        return "eddyline topics create"
    return f"EDDYLINE_{name.upper()}_TOPIC=NAME with the name of a topic that exists"


def check_one(
    settings: Settings, name: str, configs: Mapping[str, str], copies: int
) -> list[Finding]:
    """Findings on one topic. name: without prefix; configs: as Kafka has them; copies: replicas."""
    _, wanted = topics.topic_configs(settings, name)
    wanted = {_POLICY: "delete"} | wanted
    found = []
    for key, value in wanted.items():
        now = configs.get(key)
        if now is None or now == value or (key in _AT_LEAST and _at_least(now, value)):
            continue
        problem = f"{key} is {now}, not {value}: {_harm(name, key, now, value)}"
        found.append(_finding(settings, name, key, value, problem))
    keep, kept_ms = configs.get(_KEEP), settings.forgotten_kept_d * DAY_MS
    if name in _BY_AGE and keep is not None:
        if not 0 <= int(keep) <= kept_ms:
            harm = "may be archived again" if name == topics.ANSWERS else "may bring the user back"
            problem = (
                f"{_KEEP} is {keep}, more than forgotten_kept_d ({settings.forgotten_kept_d} "
                f"days): records from before a user was forgotten {harm}"
            )
            found.append(_finding(settings, name, _KEEP, str(kept_ms), problem))
    in_sync = configs.get(_IN_SYNC, "1")
    if int(in_sync) > copies:
        problem = f"{_IN_SYNC} is {in_sync}, with {copies} replicas: every write is refused"
        found.append(_finding(settings, name, _IN_SYNC, str(max(1, copies - 1)), problem))
    elif copies > 2 and in_sync == "1":
        problem = (
            f"{_IN_SYNC} is 1, with {copies} replicas: a record that was acknowledged is lost with "
            "one broker"
        )
        found.append(_finding(settings, name, _IN_SYNC, "2", problem))
    return found


def _at_least(now: str, wanted: str) -> bool:
    return int(now) < 0 or int(now) >= int(wanted) >= 0  # −1: for ever


def _harm(name: str, key: str, now: str, wanted: str) -> str:
    if name == topics.ITEMS and key == _KEEP:
        return "patches go by age; once Redis is emptied, those that build on them are refused"
    if key == _POLICY:
        if name == topics.ITEMS and wanted == "delete":
            return "it carries patches, and compaction keeps the last one of an item alone"
        if name in _BY_AGE:
            return "compaction keeps one record of each key, the others are lost"
        if "compact" in now:
            return "records that still hold are deleted by age"
        return "records that still hold are deleted by age, and changed ones pile up until then"
    if key == _STAMP:
        return (
            "producers' clocks decide what lies in the far future and what came before a user was "
            "forgotten"
        )
    if key == _DELETES:
        return "a process that stood still for longer misses deletes"
    if key == _BYTES:
        return "a large record that was refused cannot be kept as a dead letter"
    return "records go sooner than the settings say"


def _finding(settings: Settings, name: str, key: str, value: str, problem: str) -> Finding:
    server = settings.kafka_bootstrap_servers.split(",")[0]
    topic = settings.prefixed(name)
    mend = (
        f"kafka-configs.sh --bootstrap-server {server} --alter --entity-type topics "
        f"--entity-name {topic} --add-config {key}={value}"
    )
    return Finding(topic, problem, mend)
