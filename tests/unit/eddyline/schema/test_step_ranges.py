"""Where a generation takes micro-steps, when processes come, go and go back."""

from __future__ import annotations

import msgspec
import pytest

from eddyline.schema.step_ranges import FOREVER, StepRanges, always, resolve
from eddyline.stores import user_codec
from eddyline.stores.state_store import UserEffects

Ranges = dict[str, list[tuple[int, int]]]


def of(log: str = "log", **ranges: list[tuple[int, int]]) -> dict[str, StepRanges]:
    return {name[1:]: StepRanges(log, tuple(found)) for name, found in ranges.items()}


def opened(
    stored: dict[str, StepRanges], recorded: dict[str, StepRanges], live: str, position: int
) -> Ranges:
    found = resolve(stored, recorded, live.split(), "log", position)
    assert {one.log for one in found.values()} == {"log"}
    return {f"g{name}": list(one.ranges) for name, one in found.items()}


ON = of(g1=[(0, FOREVER)])


@pytest.mark.parametrize(
    ("what", "stored", "recorded", "live", "position", "expected"),
    [
        ("the first process", {}, {}, "1", 0, {"g1": [(0, FOREVER)]}),
        ("the same one again", ON, ON, "1", 50, {"g1": [(0, FOREVER)]}),
        ("a retraining", ON, ON, "2", 50, {"g1": [(0, 50)], "g2": [(50, FOREVER)]}),
        ("both are live", ON, ON, "1 2", 50, {"g1": [(0, FOREVER)], "g2": [(50, FOREVER)]}),
        (
            "the older process takes the partition back",
            of(g1=[(0, 50)], g2=[(50, FOREVER)]),
            of(g1=[(0, 50)], g2=[(50, FOREVER)]),
            "1",
            70,
            {"g1": [(0, 50), (70, FOREVER)], "g2": [(50, 70)]},
        ),
        (
            "an emptied store",
            {},
            of(g1=[(0, 50)], g2=[(50, 70), (80, FOREVER)]),
            "2",
            0,
            {"g1": [], "g2": [(50, 70), (80, FOREVER)]},
        ),
        (
            "a copy from before the switch",
            ON,
            of(g1=[(0, 50)], g2=[(50, FOREVER)]),
            "2",
            30,
            {"g1": [(0, 30)], "g2": [(50, FOREVER)]},
        ),
        (
            "another process moved the fence after the begin was recorded",
            ON,
            of(g1=[(0, 50)], g2=[(50, FOREVER)]),
            "2",
            55,
            {"g1": [(0, 55)], "g2": [(55, FOREVER)]},
        ),
        (
            "a record of a process that lost the partition",
            of(g1=[(0, 50)], g2=[(50, FOREVER)]),
            of(g1=[(0, 40)], g2=[(40, FOREVER)]),
            "2",
            70,
            {"g1": [(0, 50)], "g2": [(50, FOREVER)]},
        ),
        (
            "a pause that was recorded is kept where the store went back",
            of(g1=[(0, FOREVER)]),
            of(g1=[(0, 50), (70, FOREVER)], g2=[(50, 70)]),
            "1",
            20,
            {"g1": [(0, 50), (70, FOREVER)], "g2": []},
        ),
        (
            "another log",
            of("old", g1=[(0, 50)], g2=[(50, FOREVER)]),
            of("old", g1=[(0, 50)], g2=[(50, FOREVER)]),
            "2",
            0,
            {"g1": [], "g2": [(0, FOREVER)]},
        ),
        (
            "state of an older version",
            of("", g1=[(0, FOREVER)], g2=[(0, FOREVER)]),
            {},
            "2",
            50,
            {"g1": [(0, 50)], "g2": [(0, FOREVER)]},
        ),
    ],
)
def test_resolved(what, stored, recorded, live, position, expected) -> None:
    assert opened(stored, recorded, live, position) == expected, what


def test_covers_at_the_edges() -> None:
    ranges = StepRanges("log", ((3, 5), (7, FOREVER)))
    covered = [o for o in (2, 3, 4, 5, 6, 7, FOREVER - 1) if ranges.covers(o)]
    assert covered == [3, 4, 7, FOREVER - 1]


def test_the_stored_form_and_that_of_older_versions() -> None:
    ranges = {"1": StepRanges("a|b", ((0, 5),)), "2": always("a|b")}
    names, args = user_codec.encode_users("{u0}", UserEffects(step_ranges=ranges))
    assert "{u0}:generations" in names
    assert user_codec.decode_step_ranges(args[-1]) == ranges
    assert user_codec.decode_step_ranges(None) == {}
    older = user_codec.decode_step_ranges(msgspec.msgpack.encode(("1", "2")))
    assert older == {"1": always(""), "2": always("")}
    assert "{u0}:generations" not in user_codec.encode_users("{u0}", UserEffects())[0]
