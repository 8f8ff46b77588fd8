"""The window of event ids: a re-sent event is dropped up to its width, and not beyond."""

from __future__ import annotations

import pytest

from eddyline.schema.deduplication import DedupeWindow

SIZE = 10


@pytest.mark.parametrize(
    ("back", "counts"), [(1, False), (SIZE - 1, False), (SIZE, False), (SIZE + 1, True)]
)
@pytest.mark.parametrize("known", [True, False])
def test_an_event_that_is_sent_again_counts_beyond_the_window_only(
    back: int, counts: bool, known: bool
) -> None:
    window = DedupeWindow(SIZE, {"a": 5} if known else {}, done=5 if known else -1)
    assert window.accept("a", 5), "the first one, also if it was applied before"
    assert window.accept("a", 5 + back) is counts
    assert window.accept(None, 5 + back + 1)


def test_a_duplicate_does_not_extend_the_window() -> None:
    window = DedupeWindow(SIZE)
    assert [window.accept("a", at) for at in (0, SIZE, SIZE + 1)] == [True, False, True]
