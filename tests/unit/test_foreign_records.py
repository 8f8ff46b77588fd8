"""The map of the chaos run and what its records mean by hand are one; a wrong map is noticed."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from eddyline.schema import validation
from eddyline.schema.events import Click
from eddyline.schema.records import BuiltRecord
from eddyline.settings.loader import Settings
from tests.chaos import foreign
from tests.chaos.foreign import ACTIONS, MAP, OWN, Foreign, in_own_format
from tests.model.reading import Raw, Refused, user_event
from tests.model.rules import plausible

SETTINGS = Settings(clicks_partitions=4, clicks_map=str(MAP))
MS = 1_790_000_000_123


def drawn(count: int) -> list[Foreign]:
    rng = random.Random(4)
    return [
        Foreign(
            user=f"u{rng.randrange(9)}",
            item=f"i{rng.randrange(9)}",
            action=rng.choice([*ACTIONS]),
            at_ms=MS + rng.randrange(10**8),
            event_id=rng.choice([None, f"e{n}"]),
            visits=rng.random() < 0.5,
        )
        for n in range(count)
    ]


def differences(settings: Settings, records: list[Foreign]) -> list[str]:
    found = []
    for number, one in enumerate(records):
        record = BuiltRecord("clicks", 0, number, one.at_ms, None, one.value())
        product = [event for _, event, _ in validation.user_events(settings, record)]
        value = in_own_format(record.value, record.headers)
        by_hand = [] if value is None else [msgspec.json.decode(value, type=Click)]
        if product != by_hand:
            found.append(f"{one}: {product}, by hand {by_hand}")
    return found


def test_the_map_and_the_reading_by_hand_agree() -> None:
    records = drawn(400)
    assert {one.action for one in records} == ACTIONS.keys()
    assert differences(SETTINGS, records) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("weight = 2", "weight = 3"),
        ('hovered = "ignore"', 'hovered = "view"'),
        ('["account.id", "visitor"]', '["account.id", "product.sku"]'),
        ('event_id = "id"', ""),
        ('seen = "view"', 'seen = "click"'),
    ],
)
def test_a_wrong_map_is_noticed(tmp_path: Path, right: str, wrong: str) -> None:
    text = MAP.read_text(encoding="utf-8")
    assert right in text
    file = tmp_path / "wrong.toml"
    file.write_text(text.replace(right, wrong), encoding="utf-8")
    settings = msgspec.structs.replace(SETTINGS, clicks_map=str(file))
    assert differences(settings, drawn(60)) != []


def test_the_model_reads_the_own_format_and_leaves_marked_records() -> None:
    one = Foreign("u1", "i1", "bought", MS, "e1", visits=False)
    value = in_own_format(one.value(), ())
    raw = Raw("clicks", 0, 1, MS, None, value)
    event = user_event(raw, 0, plausible(SETTINGS))
    assert (event["user_id"], event["kind"], event["weight"], event["at_ms"]) == (
        "u1",
        "purchase",
        2.0,
        MS,
    )
    assert in_own_format(b"{", [OWN]) == b"{"
    with pytest.raises(Refused):
        user_event(raw._replace(value=one.value()), 0, plausible(SETTINGS))
    assert foreign.in_own_format(one._replace(action="hovered").value(), ()) is None
