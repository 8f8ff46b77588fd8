"""A sample of the users by a hash of their ids: the same users in every process.

A smaller sample is part of a larger one. So the users whose answers are recorded are among those
that a judge with a larger sample follows.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

_HASHES = 2**64


@lru_cache(maxsize=65_536)
def is_sampled(user_id: str, share: float) -> bool:
    """Whether a user is in the sample. share: 0 … 1 of all users; 0: none, 1: all.

    The hash is not that of the partitions: a sample takes users of all of them.

    >>> [is_sampled("ana", share) for share in (0.0, 0.1, 0.2, 1.0)]
    [False, False, True, True]
    """
    if share >= 1:
        return True
    hashed = int.from_bytes(blake2b(user_id.encode(), digest_size=8).digest(), "big")
    return hashed < share * _HASHES
