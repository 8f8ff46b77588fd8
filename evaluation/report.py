"""What an evaluation says: a table of metrics by row and group, curves over time, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from embeddings.evaluation.metrics import of_ranks
from evaluation import metrics
from evaluation.event_log import EventLog, places
from evaluation.metrics import Bootstrap, Estimate, Floats, Ints, Lists, Mask
from evaluation.product import Product
from evaluation.protocol import Outcome

# The events of a point of a curve are this part of all.
CURVE_POINTS = 20
# Rows whose difference is always reported: what a live history is worth.
PAIRS = (
    ("towers", "towers-frozen"),
    ("towers", "towers-daily"),
    ("towers", "towers-nostep"),
    ("cascade", "popular"),
    ("rrf", "cascade"),
    ("blend", "cascade"),
    ("blend", "rrf"),
)


class RowReport(msgspec.Struct, frozen=True, kw_only=True):
    """One row. metrics: by name, with hr_10_debiased; groups: group -> metrics; curve: HR@10"""

    name: str
    metrics: dict[str, Estimate]
    groups: dict[str, dict[str, Estimate]]
    curve: list[float]
    lists: Lists | None = None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """HR@10 of `left` minus that of `right`, paired; group: "" for all events."""

    left: str
    right: str
    group: str
    hr_10: Estimate


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole result; `--json` writes it as it is.

    events:  of the log, before the split, scored, without a live target (each a miss), of items in
             the user's list (left out), dislikes after the split (left out), resent
             (with the id of an earlier one; not in the log)
    groups:  group -> its events; curve_at_ms: time of the first event of each point
    """

    name: str
    seed: int
    split: float
    repeats: str
    events: dict[str, int]
    users: int
    items: int
    lists_of: int
    groups: dict[str, int]
    curve_at_ms: list[int]
    rows: list[RowReport]
    differences: list[Difference]
    rejected: dict[str, int]


def groups_of(outcome: Outcome) -> dict[str, Mask]:
    """Group -> bool (n,), of the events that count."""
    scored, kept = outcome.scored, outcome.kept
    user, item, seen = scored.user_before[kept], scored.item_before[kept], scored.seen_user[kept]
    return {
        "users seen": seen,
        "users unseen": ~seen,
        "user events 0": user == 0,
        "user events 1–4": (user >= 1) & (user <= 4),
        "user events 5–19": (user >= 5) & (user <= 19),
        "user events 10+": user >= 10,
        "user events 20+": user >= 20,
        "item clicks 0": item == 0,
        "item clicks 1–5": (item >= 1) & (item <= 5),
        "item clicks 6–50": (item >= 6) & (item <= 50),
        "item clicks 51+": item > 50,
    }


def make(
    name: str,
    log: EventLog,
    product: Product,
    outcome: Outcome,
    *,
    first: int,
    split: float,
    repeats: str,
    seed: int,
) -> Report:
    """The report of an outcome. Deterministic for a seed."""
    scored, kept = outcome.scored, outcome.kept
    events = scored.events[kept]
    users = places(log.user_ids)[log.users[events]]
    groups = groups_of(outcome)
    bootstrap = Bootstrap(users, seed=seed)
    pairs = [pair for pair in PAIRS if {*pair} <= outcome.rows.keys()]
    wanted = [(*pair, group) for pair in pairs for group in ("", "user events 10+")]
    paired = {row for pair in pairs for row in pair}
    hits = {row: of_ranks(outcome.rows[row].ranks[kept])["hr_10"] for row in paired}
    return Report(
        name=name,
        seed=seed,
        split=split,
        repeats=repeats,
        events={
            "log": len(log),
            "before the split": first,
            "scored": len(events),
            "target not live": int(np.count_nonzero(~scored.live[kept])),
            "repeats left out": int(np.count_nonzero(~kept)),
            "dislikes left out": len(log) - first - len(scored.events),
            "resent left out": log.resent,
        },
        users=len(np.unique(users)),
        items=outcome.live_at_end,
        lists_of=len(outcome.lists_of),
        groups={group: int(np.count_nonzero(mask)) for group, mask in groups.items()},
        curve_at_ms=[int(part[0]) for part in _parts(log.at_ms[events])],
        rows=_rows(log, product, outcome, bootstrap, groups, first),
        differences=differences(
            bootstrap, hits, wanted, {"": np.ones(len(events), bool), **groups}
        ),
        rejected=dict(sorted(product.rejected.items())),
    )


def differences(
    bootstrap: Bootstrap,
    hits: Mapping[str, Floats],
    wanted: Sequence[tuple[str, str, str]],
    groups: Mapping[str, Mask],
) -> list[Difference]:
    """The paired differences of rows. wanted: (left, right, group)"""
    found = bootstrap.estimates(
        [(hits[left] - hits[right], groups[group].astype(float)) for left, right, group in wanted]
    )
    return [
        Difference(left=left, right=right, group=group, hr_10=one)
        for (left, right, group), one in zip(wanted, found, strict=True)
    ]


def _rows(
    log: EventLog,
    product: Product,
    outcome: Outcome,
    bootstrap: Bootstrap,
    groups: Mapping[str, Mask],
    first: int,
) -> list[RowReport]:
    """The report of each row."""
    kept = outcome.kept
    # An event counts by the inverse of its item's popularity: as many clicks as it had before.
    inverse: Floats = 1.0 / (1.0 + outcome.scored.item_before[kept].astype(np.float64))
    weights = {"": np.ones(len(inverse), bool), **groups}
    debiased = {group: of_group * inverse for group, of_group in weights.items()}
    counts = log.counts(log.items, len(log.item_ids), first)
    events_of = dict(zip(log.item_ids, counts.tolist(), strict=True))
    items = product.items
    vectors_of = {item_id: items.vectors[place] for item_id, place in items.place_of.items()}
    rows = []
    for row, results in outcome.rows.items():
        values = of_ranks(results.ranks[kept])
        names, columns = [], []
        for group, of_group in weights.items():
            names += [(group, metric) for metric in (*values, "hr_10_debiased")]
            columns += [(value, of_group) for value in values.values()]
            columns.append((values["hr_10"], debiased[group]))
        found: dict[str, dict[str, Estimate]] = {group: {} for group in weights}
        for (group, metric), one in zip(names, bootstrap.estimates(columns), strict=True):
            found[group][metric] = one
        lists = [
            [item_id for item_id in one if item_id in vectors_of] for one in results.lists.values()
        ]
        measured = metrics.of_lists(lists, outcome.live_at_end, events_of, vectors_of)
        rows.append(
            RowReport(
                name=row,
                metrics=found.pop(""),
                groups=found,
                curve=[float(part.mean()) for part in _parts(values["hr_10"])],
                lists=measured if any(lists) else None,
            )
        )
    return rows


def _parts(values: Floats | Ints) -> list[npt.NDArray[Any]]:
    """The parts of the points of a curve, in order."""
    return [part for part in np.array_split(values, CURVE_POINTS) if len(part)]
