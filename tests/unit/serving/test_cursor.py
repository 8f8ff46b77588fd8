"""The cursor of pages: what it keeps, and every reason to refuse one."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eddyline.schema.item_key import keys_of
from serving.rules import cursor
from serving.rules.cursor import AHEAD_S_MAX, CHARS_MAX, FIRST_PAGE, ITEMS_MAX, CursorRejected

NOW_S = 1_700_000_000


def token(*item_ids: str, user: str = "ana", generation: str = "g1") -> str:
    return cursor.encode(FIRST_PAGE, item_ids, user, generation, NOW_S)


def refusal(text: str, user: str = "ana", now_s: float = NOW_S) -> str:
    with pytest.raises(CursorRejected) as failed:
        cursor.decode(text, user, 60, now_s)
    return str(failed.value)


@given(st.lists(st.text(min_size=1, max_size=9), max_size=30), st.text(max_size=9))
def test_it_names_the_items_of_all_pages_before(item_ids: list[str], user: str) -> None:
    first = cursor.decode(token(*item_ids[:9], user=user), user, 60, NOW_S)
    second = cursor.encode(first, item_ids[9:], user, "g1", NOW_S)
    found = cursor.decode(second, user, 60, NOW_S)
    assert np.array_equal(found.keys, keys_of(item_ids))


def test_the_empty_token_is_the_first_page() -> None:
    assert cursor.decode("", "ana", 60) is FIRST_PAGE
    assert not FIRST_PAGE.of_other("g1")


def test_it_knows_whether_the_generation_changed() -> None:
    found = cursor.decode(token("a"), "ana", 60, NOW_S)
    assert (found.of_other("g1"), found.of_other("g2")) == (False, True)


@pytest.mark.parametrize(
    ("count", "fits"),
    [(ITEMS_MAX - 1, True), (ITEMS_MAX, True), (ITEMS_MAX + 1, False), (20 * ITEMS_MAX, False)],
)
def test_it_names_so_many_items(count: int, fits: bool) -> None:
    made = token(*(f"item-{n}" for n in range(count)))
    assert bool(made) == fits
    if fits:
        assert len(made) <= CHARS_MAX
        assert len(cursor.decode(made, "ana", 60, NOW_S).keys) == count


@pytest.mark.parametrize(
    ("age_s", "why"),
    [
        (59, ""),
        (60, ""),
        (61, "it is 61 s old, allowed are 60: begin anew"),
        (10**6, "it is 1,000,000 s old, allowed are 60: begin anew"),
        (-AHEAD_S_MAX, ""),
        (-AHEAD_S_MAX - 1, "it was made 61 s ahead of this worker's clock"),
    ],
)
def test_its_time_is_limited(age_s: int, why: str) -> None:
    if why:
        assert refusal(token("a"), now_s=NOW_S + age_s) == why
    else:
        assert len(cursor.decode(token("a"), "ana", 60, NOW_S + age_s).keys) == 1


def test_the_reasons_to_refuse_one() -> None:
    none, damaged = "it is not the `next_cursor` of an answer", "it is damaged, or not the"
    assert refusal(token("a"), user="bob") == "it was made for another user"
    assert refusal(token("a", user="")) == "it was made for another user"
    for text in ("é", "a", "ab c", "\0\0\0\0"):
        assert refusal(text) == none
    for text in ("abcd", token("a")[:-12], token("a") + token("b")):
        assert refusal(text).startswith(damaged)
    assert refusal("A" * CHARS_MAX).startswith(damaged)
    assert refusal("A" * (CHARS_MAX + 1)).startswith(f"{CHARS_MAX + 1:,} characters, allowed are")
    raw = bytearray(base64.urlsafe_b64decode(token("a") + "=="))
    raw[0] = cursor.VERSION + 1
    body = bytes(raw[:-8])
    newer = base64.urlsafe_b64encode(body + cursor._sum(body)).decode()
    assert refusal(newer) == f"it has version {cursor.VERSION + 1}, this worker reads 1"


@given(st.data())
def test_a_changed_character_is_noticed(data: st.DataObject) -> None:
    made = token("a", "b")
    at = data.draw(st.integers(0, len(made) - 1))
    other = data.draw(st.sampled_from([c for c in "ABab01-_" if c != made[at]]))
    changed = made[:at] + other + made[at + 1 :]
    try:
        found = cursor.decode(changed, "ana", 60, NOW_S)
    except CursorRejected:
        return
    # The last character has bits that belong to no byte.
    assert at == len(made) - 1 and np.array_equal(found.keys, keys_of(["a", "b"]))


@given(st.text(max_size=60))
def test_no_text_breaks_it(text: str) -> None:
    try:
        assert cursor.decode(text, "ana", 60, NOW_S) is FIRST_PAGE and not text
    except CursorRejected as error:
        assert str(error)
