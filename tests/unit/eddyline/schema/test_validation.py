"""Times and users that no codec can refuse: seconds for milliseconds, placeholders for users."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from eddyline.errors import Rejected
from eddyline.schema import validation
from eddyline.schema.events import MOVED, Forget, encode
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings

NOW_MS, ORIGIN_MS = 1_700_000_000_000, 1_699_999_000_000
EARLIEST_MS = 631_152_000_000  # 1990
SETTINGS = Settings(clicks_partitions=1, items_partitions=1)


def event(settings: Settings = SETTINGS, origin_ms: int | None = None, **fields: Any) -> Any:
    value = {"user_id": "u", "item_id": "i"} | fields
    if "merge_into" in fields:
        del value["item_id"]
    found, own = validation.user_event(settings, 0, json.dumps(value).encode(), NOW_MS, origin_ms)
    assert own
    return found


def profile(**fields: Any) -> Any:
    value = {"user_id": "u"} | fields
    key = value["user_id"].encode()
    return validation.profile(SETTINGS, 0, key, json.dumps(value).encode(), NOW_MS)[1]


def item(**fields: Any) -> Any:
    return validation.item(
        SETTINGS, 0, b"i", json.dumps({"item_id": "i"} | fields).encode(), NOW_MS
    )[1]


def refusal(call: Any, **fields: Any) -> Rejected:
    with pytest.raises(Rejected) as caught:
        call(**fields)
    return caught.value


@pytest.mark.parametrize("call", [event, profile, item])
@pytest.mark.parametrize("at_ms", [1, 1_700_000_000, EARLIEST_MS - 1])
def test_a_time_before_the_earliest_is_refused(call: Any, at_ms: int) -> None:
    refused = refusal(call, at_ms=at_ms)
    assert (refused.reason, refused.field) == ("too_early", "at_ms")
    assert str(at_ms) in str(refused) and str(EARLIEST_MS) in str(refused)
    assert ("seconds?" in str(refused)) is (at_ms == 1_700_000_000)


@pytest.mark.parametrize("call", [event, profile, item])
@pytest.mark.parametrize("at_ms", [EARLIEST_MS, EARLIEST_MS + 1, NOW_MS])
def test_later_times_are_accepted(call: Any, at_ms: int) -> None:
    assert call(at_ms=at_ms).at_ms == at_ms


def test_a_merge_in_seconds_is_refused_and_a_moved_event_is_not() -> None:
    seconds = 1_700_000_000
    assert refusal(event, merge_into="v", at_ms=seconds).reason == "too_early"
    assert event(context=MOVED, at_ms=seconds).at_ms == seconds, "it was accepted before"
    assert event(msgspec.structs.replace(SETTINGS, at_ms_min=0), at_ms=1).at_ms == 1


def test_the_first_append_stands_in_for_a_time_that_is_left_out() -> None:
    assert event().at_ms == event(at_ms=0).at_ms == NOW_MS
    assert event(origin_ms=ORIGIN_MS).at_ms == ORIGIN_MS
    merge = event(origin_ms=ORIGIN_MS, merge_into="v")
    assert merge.merge_into == "v" and merge.at_ms == ORIGIN_MS
    assert item().at_ms == profile().at_ms == 0, "unknown"


@pytest.mark.parametrize("appended_ms", [-(2**63), -2, -1])
@pytest.mark.parametrize("value", [b'{"user_id":"u","item_id":"i"}', b'{"user_id":"u"}', None])
def test_a_record_without_a_time_stamp_is_refused_by_name(
    appended_ms: int, value: bytes | None
) -> None:
    """A topic with CreateTime may have -1: no rule about the time of a record can hold then."""
    calls = [
        lambda: validation.user_event(SETTINGS, 0, value, appended_ms),
        lambda: validation.profile(SETTINGS, 0, b"u", value, appended_ms),
    ]
    if value is not None:  # a delete always applies
        calls.append(lambda: validation.item(SETTINGS, 0, b"i", b'{"item_id":"i"}', appended_ms))
    for call in calls:
        with pytest.raises(Rejected, match=r"message[.]timestamp[.]type=LogAppendTime") as caught:
            call()
        assert caught.value.reason == "no_timestamp"
    assert validation.item(SETTINGS, 0, b"i", None, appended_ms)[:2] == ("i", None)


@pytest.mark.parametrize("appended_ms", [0, 1])
def test_the_first_moments_of_1970_are_time_stamps(appended_ms: int) -> None:
    sent = b'{"user_id":"u","item_id":"i","at_ms":0}'
    assert validation.user_event(SETTINGS, 0, sent, appended_ms)[0].at_ms == appended_ms
    assert validation.item(SETTINGS, 0, b"i", b'{"item_id":"i"}', appended_ms)[1] is not None


@pytest.mark.parametrize("user", ["null", "NULL", "undefined", "None", "NaN", "anonymous"])
def test_a_placeholder_is_no_user(user: str) -> None:
    for fields in ({"user_id": user}, {"merge_into": user}):
        refused = refusal(event, **fields)
        assert refused.reason == "placeholder_id" and repr(user) in str(refused)
    assert refusal(profile, user_id=user).reason == "placeholder_id"
    assert event(item_id=user).item_id == user, "an item may have that name"
    assert event(user_id=user + "1").user_id == user + "1"


def test_placeholders_are_a_setting_and_can_be_forgotten() -> None:
    mine = msgspec.structs.replace(SETTINGS, user_ids_refused=" Guest , 0,")
    assert refusal(event, settings=mine, user_id="guest").reason == "placeholder_id"
    assert refusal(event, settings=mine, user_id="0").reason == "placeholder_id"
    assert event(mine, user_id="null").user_id == "null"
    none = msgspec.structs.replace(SETTINGS, user_ids_refused="")
    assert event(none, user_id="null").user_id == "null"
    forget = encode(Forget(user_id="null", forget_until_ms=NOW_MS))
    assert validation.user_event(SETTINGS, 0, forget, NOW_MS)[0].user_id == "null"
    assert validation.profile(SETTINGS, 0, b"null", None, NOW_MS)[:2] == ("null", None)
    assert partition_of("null", 1) == 0
