"""Which users a sample has."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from eddyline.schema.partitioning import partition_of
from eddyline.schema.user_sample import is_sampled

USERS = [f"user-{n}" for n in range(40_000)]


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_a_sample_has_its_share_of_every_partition(share: float) -> None:
    chosen = [user for user in USERS if is_sampled(user, share)]
    # Five standard deviations of a fair draw.
    spread = 5 * (len(USERS) * share * (1 - share)) ** 0.5
    assert abs(len(chosen) - share * len(USERS)) < spread
    by_partition = Counter(partition_of(user, 8) for user in chosen)
    for partition in range(8):
        assert abs(by_partition[partition] - len(chosen) / 8) < 5 * (len(chosen) / 8) ** 0.5


def test_a_smaller_sample_is_part_of_a_larger_one() -> None:
    shares = (0.0, 0.01, 0.05, 0.3, 1.0)
    samples = [{user for user in USERS if is_sampled(user, share)} for share in shares]
    for smaller, larger in pairwise(samples):
        assert smaller < larger
    assert samples[0] == set() and samples[-1] == set(USERS)


def test_the_sample_is_the_same_in_every_version() -> None:
    chosen = [n for n in range(200) if is_sampled(f"user-{n}", 0.02)]
    assert chosen == [16, 60, 67, 81, 87, 124, 134, 142, 169, 172, 194]
