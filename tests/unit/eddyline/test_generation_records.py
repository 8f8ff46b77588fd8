"""Which generations have ended, and when what belongs to them may go."""

from __future__ import annotations

import pytest

from eddyline.errors import BundleError, GenerationEnded
from eddyline.generations import End, Generations, Manifest, refuse_ended

END = End(ended_ms=1_000, leave_ms=2_000, remove_ms=3_000)


def published(*names: str, active: str = "", ended: tuple[str, ...] = ()) -> Generations:
    manifests = {n: Manifest(generation=n, bundle=n, dimension=4, created_ms=0) for n in names}
    return Generations(active or names[-1], manifests, {}, dict.fromkeys(ended, END))


@pytest.mark.parametrize(
    ("names", "active", "ended", "outdated"),
    [
        ("12", "2", "", []),
        ("123", "3", "", []),
        ("1234", "4", "", ["1"]),
        ("12345", "5", "", ["1", "2"]),
        ("12345", "5", "1", ["2"]),  # what is decided is not decided again
        ("12345", "1", "", ["2"]),  # the active one never ends
        ("12345", "3", "", ["1", "2"]),
        ("51432", "2", "", ["5", "1"]),  # by the order of publication, not of names
    ],
)
def test_all_but_the_newest_published_ones_and_the_active_one_have_ended(
    names: str, active: str, ended: str, outdated: list[str]
) -> None:
    assert published(*names, active=active, ended=tuple(ended)).outdated(3) == outdated


def test_the_number_that_is_kept_is_the_settings() -> None:
    found = published(*"1234567")
    assert [len(found.outdated(kept)) for kept in (3, 4, 6, 7, 8)] == [4, 3, 1, 0, 0]


@pytest.mark.parametrize(
    ("now_ms", "usable", "removable"),
    [(1_999, True, []), (2_000, False, []), (2_999, False, []), (3_000, False, ["1"])],
)
def test_processes_leave_before_anything_is_removed(
    now_ms: int, usable: bool, removable: list[str]
) -> None:
    found = published(*"1234", ended=("1",))
    assert found.removable(now_ms) == removable
    found.check_usable(["2", "4"], now_ms)
    if usable:
        found.check_usable(["1"], now_ms)
        return
    with pytest.raises(GenerationEnded) as ended:
        found.check_usable(["4", "1"], now_ms)
    assert "generation 1 has ended (1970-01-01 00:00:01Z)" in str(ended.value)
    assert "the active generation is 4. Start the process again" in str(ended.value)
    assert "`eddyline generations list`" in str(ended.value)


def test_the_name_of_an_ended_generation_is_not_used_again() -> None:
    found = published(*"1234", ended=("1",))
    refuse_ended(found, "2")
    refuse_ended(found, "9")
    with pytest.raises(BundleError, match=r"generation 1 has ended .*a name of its own"):
        refuse_ended(found, "1")
