"""The rules of a process' answers: what request, arm and settings say, applied to one query."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from threading import Lock

import msgspec

from eddyline.settings.loader import Settings
from index.filters import Filter
from index.port import IndexReader
from serving.answer.blend_weights import CurrentBlender
from serving.answer.fusion import Fusion, Recommendation
from serving.answer.fusions import make_fusion
from serving.recall.base import RecallPath, RecallRequest
from serving.recall.popularity import Popularity
from serving.rules.arms import Arm
from serving.rules.editorial import ActiveRules, EditorialRules
from serving.rules.editorial_watch import CurrentRules
from serving.rules.limits import Limit, without_terms
from serving.rules.quotas import FRESH, NO_QUOTAS, YOUNG, Draw, Quota, Quotas, quotas_of
from serving.rules.selection import POOL_MAX, Choice, Chosen, Wishes

# Of arms, so many different ones are kept.
FUSIONS_MAX = 64
# (name, weights of paths) -> the fusion.
FusionOf = Callable[[str, Mapping[str, float]], Fusion]


class AnswerRules:
    """Chooses the items of answers. Thread rule: any thread."""

    def __init__(
        self,
        fusion: Fusion,
        paths: Sequence[RecallPath],
        editorial: CurrentRules | None = None,
        *,
        k_max: int = POOL_MAX,
        limits: Sequence[Limit] = (),
        diversity: float = 0.0,
        quotas: Quotas = NO_QUOTAS,
        popularity: Popularity | None = None,
        fusion_of: FusionOf | None = None,
    ) -> None:
        """paths: in the order in which the fusion calls them; editorial: None: no rules

        k_max: the most items that one recall is asked for
        limits, diversity, quotas: of answers for which request and arm say nothing else
        popularity: knows the clicks of items; None: none has any
        fusion_of: makes the fusion of an arm; None: all arms have the same
        """
        self._limits, self._diversity, self._quotas = limits, diversity, quotas
        self._fusion_of = fusion_of
        # By what an arm says of its fusion.
        self._fusions: dict[tuple[str, tuple[tuple[str, float], ...]], Fusion] = {}
        self._popularity = popularity
        self.fusion = fusion
        self._paths = paths
        self._editorial = editorial or CurrentRules(EditorialRules())
        self._k_max = k_max
        self._lock = Lock()
        self._counts: Counter[str] = Counter()

    @classmethod
    def of(
        cls,
        settings: Settings,
        paths: Sequence[RecallPath],
        popularity: Popularity,
        editorial: CurrentRules | None = None,
        blender: CurrentBlender | None = None,
    ) -> AnswerRules:
        """The rules of the settings. editorial: of the rules file; blender: see `make_fusion`"""

        def fusion_of(name: str, weights: Mapping[str, float]) -> Fusion:
            listed = ",".join(f"{path}={weight!r}" for path, weight in weights.items())
            named = msgspec.structs.replace(settings, fusion=name, fusion_weights=listed)
            return make_fusion(named, blender)

        return cls(
            make_fusion(settings, blender),
            paths,
            editorial,
            k_max=settings.k_max,
            limits=[Limit(*pair) for pair in settings.answer_limit_of.items()],
            diversity=settings.diversity,
            quotas=quotas_of(settings),
            popularity=popularity,
            fusion_of=fusion_of,
        )

    def degradation(self) -> str:
        """`worker: reason` if rules or quotas are not what the settings say, else ""."""
        why = self._editorial.why
        if not why and self._popularity is not None:
            beyond, quotas = self._popularity.beyond(), self._quotas
            if beyond > quotas.clicks_max and any(one.kind == YOUNG for one in quotas.listed):
                why = (
                    f"quota_young: items beyond the popular list may have {beyond:.1f} clicks and "
                    "are not taken for young ones; raise popular_limit"
                )
        return f"worker: {why}" if why else ""

    @property
    def version(self) -> str:
        """Of the editorial rules."""
        return self._editorial().version

    def counts(self) -> dict[str, int]:
        """Items of answers by kind of rule, since the start."""
        with self._lock:
            return dict(self._counts)

    def active(self, now_ms: int, scene: str) -> ActiveRules:
        """The editorial rules that hold now."""
        return self._editorial().active(now_ms, scene)

    def arm_of(self, wishes: Wishes) -> Arm | None:
        """The arm that the user is in; None if there is none."""
        return self._editorial().arms.of(wishes.user_id, wishes.label)

    def fusion_for(self, arm: Arm | None) -> Fusion:
        """The fusion of an arm, or of the settings."""
        if arm is None or arm.fusion is None or self._fusion_of is None:
            return self.fusion
        key = arm.fusion, tuple(sorted(arm.weights.items()))
        found = self._fusions.get(key)
        if found is None:
            if len(self._fusions) >= FUSIONS_MAX:  # of files that were changed again and again
                self._fusions = {}
            self._fusions[key] = found = self._fusion_of(arm.fusion, arm.weights)
        return found

    def diversity_of(self, wishes: Wishes, arm: Arm | None) -> float:
        """Of the request, else of the arm, else of the settings."""
        if wishes.diversity is not None:
            return wishes.diversity
        return self._diversity if arm is None or arm.diversity is None else arm.diversity

    def choose(self, request: RecallRequest, index: IndexReader, wishes: Wishes) -> Chosen:
        """At most `request.k` items, as many as there are. Raises EndsQuery."""
        rules = self._editorial()  # once: the file may change meanwhile
        active = rules.active(request.now_ms, wishes.scene)
        arm = rules.arms.of(wishes.user_id, wishes.label)
        request = without_denied(request, active)
        pins = active.pins if wishes.pins else ()
        limits, quotas, draw = wishes.limits, self._quotas, None
        if limits is None:
            limits = self._limits if arm is None else limits_of_arm(arm, self._limits)
        if arm is not None:
            quotas = quotas_of_arm(arm, quotas)
        if quotas.listed and wishes.impression_id:
            draw = Draw(wishes.user_id, wishes.impression_id)
            draw = draw if draw.has_quotas(quotas) else None
        diversity, fusion = self.diversity_of(wishes, arm), self.fusion_for(arm)
        if not (limits or diversity or pins or active.boosts or draw):
            items, paths = fusion.fuse(self._paths, request, index)
            chosen = Chosen(items, paths, version=active.version)
        else:
            choice = Choice(
                fusion, self._paths, request, index, limits, diversity, active, self._k_max
            )
            chosen = choice.made(pins)
            if draw:
                chosen = self._with_quotas(chosen, choice, draw, quotas)
        return chosen if arm is None else chosen._replace(arm=arm.name)

    def _with_quotas(self, chosen: Chosen, choice: Choice, draw: Draw, quotas: Quotas) -> Chosen:
        """The answer with young or fresh items at the positions that it lacks them."""
        now_ms = choice.request.now_ms
        candidates = choice.candidates()
        clicks = [0.0] * len(candidates)
        if self._popularity is not None:
            clicks = self._popularity.clicks_at_most([one.hit.item_id for _, one in candidates])
        for kind, share in quotas.listed:
            positions = draw.positions(choice.request.k, share)
            fits = {
                one.hit.item_id: (rank, one, n)
                for (rank, one), n in zip(candidates, clicks, strict=True)
                if (
                    n <= quotas.clicks_max
                    if kind == YOUNG
                    else one.hit.at_ms and now_ms - one.hit.at_ms <= quotas.fresh_ms
                )
            }
            lacking = len(positions) - sum(one.hit.item_id in fits for one in chosen.items)
            if lacking <= 0:
                continue
            shown = {one.hit.item_id for one in chosen.items}
            some = [
                one
                for item_id, one in fits.items()
                if item_id not in shown and quotas.may_show(item_id)
            ]
            if not some:
                continue
            ranks, items, few = zip(*some, strict=True)
            order = draw.order(ranks, few, choice.length)
            drawn = [(ranks[at], items[at]) for at in order]
            chosen = choice.placed_at(positions[-lacking:], drawn, kind)
        return chosen

    def count(self, items: Sequence[Recommendation]) -> None:
        """Count the items of an answer that was sent."""
        if kinds := [rule.kind for one in items for rule in one.rules]:
            with self._lock:
                self._counts.update(kinds)


def without_denied(request: RecallRequest, active: ActiveRules) -> RecallRequest:
    """The request whose items the editorial rules do not deny."""
    if active.denied_items:
        request = request._replace(excluded=frozenset(request.excluded) | set(active.denied_items))
    return request._replace(filters=without_denied_terms(request.filters, active))


def without_denied_terms(filters: Filter | None, active: ActiveRules) -> Filter | None:
    """The filter that in addition bars items of denied values."""
    if not active.denied_terms:
        return filters
    return without_terms(filters, sorted(active.denied_terms))


def limits_of_arm(arm: Arm, limits: Sequence[Limit]) -> Sequence[Limit]:
    """The limits of an arm. limits: of the settings"""
    if arm.limits is None:
        return limits
    return [Limit(name, most) for name, most in arm.limits.items() if most]


def quotas_of_arm(arm: Arm, quotas: Quotas) -> Quotas:
    """The quotas of an arm. quotas: of the settings"""
    own = {YOUNG: arm.quota_young, FRESH: arm.quota_fresh}
    shares = {one.kind: one.share for one in quotas.listed}
    shares |= {kind: share for kind, share in own.items() if share is not None}
    listed = [Quota(kind, shares[kind]) for kind in (YOUNG, FRESH) if shares.get(kind)]
    every = quotas.every if arm.quota_every is None else arm.quota_every
    return quotas._replace(listed=listed, every=every)
