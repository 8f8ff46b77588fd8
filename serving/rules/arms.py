"""Arms of an experiment: some of the users, by a stable hash, get answers made in another way.

In the rules file:

    experiment = "2026-12"

    [[arm]]
    name = "diverse"
    share = 0.1
    diversity = 0.3
    limits = { categories = 3 }
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from hashlib import blake2b
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from eddyline.schema.answers import LABEL_BYTES_MAX
from eddyline.schema.events import quote
from eddyline.settings.answers import LIMITS_MAX, MOST_MAX
from eddyline.settings.worker import WEIGHT_MAX

ARMS_MAX = 16
# Above half a quota would be most of the answer.
QUOTA_MAX = 0.5

_Quota = Annotated[float, Meta(ge=0, le=QUOTA_MAX)]
_Weight = Annotated[float, Meta(gt=0, le=WEIGHT_MAX)]
_Most = Annotated[int, Meta(ge=0, le=MOST_MAX)]


class Arm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the arm has in place of the settings; None: as the settings have it.

    share:   of the users
    weights: of the paths, for `rrf`; with a fusion only
    limits:  attribute -> most items of each value; 0: no limit
    """

    name: str
    share: Annotated[float, Meta(gt=0, le=1)]
    fusion: Literal["cascade", "rrf", "blend"] | None = None
    weights: dict[str, _Weight] = {}
    diversity: Annotated[float, Meta(ge=0, le=1)] | None = None
    limits: Annotated[dict[str, _Most], Meta(max_length=LIMITS_MAX)] | None = None
    quota_young: _Quota | None = None
    quota_fresh: _Quota | None = None
    quota_every: Annotated[int, Meta(ge=1, le=1_000)] | None = None


class Arms:
    """The arms of one experiment. Thread rule: any thread."""

    def __init__(self, arms: Sequence[Arm] = (), experiment: str = "") -> None:
        """arms: that were checked, in their order; experiment: another one divides anew"""
        self.listed = arms
        self._by_name = {arm.name: arm for arm in arms}
        self._experiment = experiment

    def of(self, user_id: str, label: str) -> Arm | None:
        """The arm of a user; None if there is none.

        user_id: a guest, "", is in no arm
        label:   of the request; one that names an arm chooses it, another one none
        """
        if label:
            return self._by_name.get(label)
        if not self.listed or not user_id:
            return None
        seed = f"{self._experiment}\0{user_id}".encode()
        hashed = blake2b(seed, digest_size=8, person=b"arm").digest()
        place, end = int.from_bytes(hashed, "little") / 2**64, 0.0
        for arm in self.listed:
            end += arm.share
            if place < end:
                return arm
        return None


def why_not(
    arms: Sequence[Arm], *, attributes: Sequence[str], fusion: str, paths: Collection[str]
) -> str:
    """What is wrong with these arms; "" if nothing is.

    attributes: that limits may name; fusion, paths: of the settings
    """
    if len(arms) > ARMS_MAX:
        return f"{len(arms)} arms, allowed are 0 … {ARMS_MAX}"
    names: set[str] = set()
    for arm in arms:
        where, size = f"arm {quote(arm.name)}", len(arm.name.encode())
        if not 1 <= size <= LABEL_BYTES_MAX:
            return f"{where}: its name has {size} bytes, allowed: 1 … {LABEL_BYTES_MAX}"
        if arm.name in names:
            return f"{where}: another arm has the same name"
        names.add(arm.name)
        if arm.fusion == "blend" and fusion != "blend":
            return f"{where}: fusion: 'blend' needs the setting fusion = blend, it is {fusion!r}"
        if arm.weights and arm.fusion != "rrf":
            return f"{where}: weights: they are of the fusion 'rrf'"
        for path in arm.weights:
            if path not in paths:
                return f"{where}: weights: {quote(path)} is not in recall_paths"
        for attribute in arm.limits or ():
            if attribute not in attributes:
                allowed = ", ".join(attributes)
                return f"{where}: limits: {quote(attribute)}, allowed are {allowed}"
    shares = math.fsum(arm.share for arm in arms)
    return f"the shares of all arms are {shares:g}, at most 1" if shares > 1 + 1e-9 else ""
