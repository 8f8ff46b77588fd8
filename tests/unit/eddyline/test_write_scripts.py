"""The write scripts' text: the order of their commands, and the rights that they need."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eddyline.stores import write_scripts

DOCS = Path(__file__).parents[3] / "docs" / "security.md"
WRITING = re.compile(r"redis\.p?call\('([A-Z]+)'")
READS = {
    "GET",
    "GETRANGE",
    "LINDEX",
    "SCARD",
    "STRLEN",
    "TIME",
    "ZCARD",
    "ZRANGEBYSCORE",
    "ZREVRANGE",
}


# They move no fence: what they remove has no effect on any later write.
UNFENCED = {"remove_idle_users", "remove_deleted_items"}
# It takes its writes back where one fails (`test_failing_scripts`), and reads what it wrote.
TAKES_BACK = {"append_co_visits"}


@pytest.mark.parametrize("name", sorted({*write_scripts.NAMES} - UNFENCED))
def test_the_fence_moves_last(name: str) -> None:
    text = write_scripts.text(name)
    fence = text.index("redis.call('SET', KEYS[1], ARGV[2])")
    assert text.count("KEYS[1], ARGV[2]") == 1
    assert not WRITING.findall(text[fence + 1 :])
    assert re.fullmatch(r"\s*return \{1, .*\}\s*", text[fence:].partition("\n")[2])


@pytest.mark.parametrize("name", sorted({*write_scripts.NAMES} - TAKES_BACK))
def test_nothing_that_can_fail_on_stored_values_follows_a_write(name: str) -> None:
    """Types are checked by reading every key first; only deletions may read in between."""
    calls = WRITING.findall(write_scripts.text(name))
    first = next(n for n, command in enumerate(calls) if command not in READS)
    assert {c for c in calls[first:] if c in READS} <= {"ZCARD"}


def test_the_documented_users_have_the_rights_of_every_script() -> None:
    rules = dict(re.findall(r"^user (\w+) (.+)$", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    needed = {
        f"+{command}" for name in write_scripts.NAMES for command in write_scripts.commands(name)
    }
    for user in ("ingest", "operator"):
        assert needed <= set(rules[user].split()), user
