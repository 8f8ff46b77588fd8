"""The plan of a run: which fault comes when. A function of the seed alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

# Every kind and its effect. A run has each equally often, to within one.
KINDS = {
    "kill ingest": "kill -9 of an ingest process",
    "kill redis": "kill -9 of Valkey",
    "kill broker": "kill -9 of the Kafka broker",
    "kill worker": "kill -9 of the query worker",
    "freeze ingest": "SIGSTOP of an ingest process beyond its session, then SIGCONT: a zombie",
    "freeze redis": "SIGSTOP of Valkey, then SIGCONT",
    "freeze broker": "SIGSTOP of the broker, then SIGCONT",
    "older copy": "Valkey is killed and comes back with an older copy of its append-only files",
    "emptied": "all of Redis is gone: FLUSHALL, or killed and back without its files",
    "error LOADING": "Redis answers everything with -LOADING",
    "error BUSY": "Redis answers everything with -BUSY",
    "error OOM": "Redis answers writes with -OOM",
    "error MISCONF": "Redis answers writes with -MISCONF",
    "slow answers": "every answer of Redis comes later than `redis_timeout_ms`",
    "cut before": "connections are cut before a write reaches Redis",
    "cut after": "connections are cut after Redis did a write and before its answer",
    "duplicates": "a burst of events that were sent before, under their event ids, at new offsets",
    "reordered": "a burst of old events, within and beyond the allowed lateness",
    "strays": "a burst of clicks without a key, and of any record in a wrong partition",
    "transactions": "a burst of clicks in transactions; half of these are aborted",
    "retention": "Kafka deletes the head of every partition of `clicks`, up to the fences",
    "settings": "both ingest processes are killed and come back with other settings",
    "retraining": "another generation becomes active; ingest and worker are killed and load it; "
    "the one before ends",
}
# What an emptied Redis could not be filled from: all of these fall after the last "emptied".
LATE = ("retention", "settings", "retraining")
# Settings that may change between starts, and values that the load reaches.
CHANGES = (
    {"history_length_max": 30},
    {"history_length_max": 60},
    {"lateness_s_max": 1_200},
    {"lateness_s_max": 0},
    {"history_age_s_max": 600},
    {"history_age_s_max": 0},
    {"dedupe_window_events": 20_000},
    {"user_idle_s_max": 4},
    {"user_idle_s_max": 0},
    {"deleted_items_kept_s": 2},
    {"deleted_items_kept_s": 0},
)
# Ingest's session ends after 6 s.
ZOMBIE_S = (6.5, 8.0)
SHORT_S = 0.8


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. at_s: after the start of the load; more: parameters of its kind."""

    number: int
    at_s: float
    kind: str
    more: dict[str, Any]

    def __str__(self) -> str:
        """One line of the printed plan."""
        details = ", ".join(f"{name} {value}" for name, value in self.more.items())
        return f"{self.number:4d}  {self.at_s:7.1f} s  {self.kind:15s} {details}"


def plan(
    seed: int, count: int, gap_s: tuple[float, float], ingests: int = 2, short: bool = False
) -> list[Fault]:
    """`count` faults, one every `gap_s` seconds; each round of kinds in an order of its own.

    Kinds of LATE change places with "emptied", so that every "emptied" falls before them.

    short: no fault takes longer than SHORT_S, except a zombie's sleep

    >>> plan(7, 40, (2, 4)) == plan(7, 40, (2, 4)) != plan(8, 40, (2, 4))
    True
    >>> len({fault.kind for fault in plan(7, len(KINDS), (2, 4))}) == len(KINDS)
    True
    """
    rng = random.Random(f"chaos-{seed}")
    faults: list[Fault] = []
    at_s = 0.0
    for number, kind in enumerate(_kinds(rng, count), 1):
        at_s += rng.uniform(*gap_s)
        more = _more(rng, kind, ingests)
        if short and kind != "freeze ingest":
            more |= {
                name: min(more[name], SHORT_S) for name in ("seconds", "older_s") if name in more
            }
        faults.append(Fault(number, round(at_s, 2), kind, more))
    return faults


def _kinds(rng: random.Random, count: int) -> list[str]:
    kinds: list[str] = []
    while len(kinds) < count:
        turn = sorted(KINDS)
        rng.shuffle(turn)
        kinds += turn
    del kinds[count:]
    places = [at for at, kind in enumerate(kinds) if kind in ("emptied", *LATE)]
    placed = sorted((kinds[at] for at in places), key=lambda kind: kind != "emptied")
    for at, kind in zip(places, placed, strict=True):
        kinds[at] = kind
    return kinds


def _more(rng: random.Random, kind: str, ingests: int) -> dict[str, Any]:
    if kind in ("kill ingest", "freeze ingest"):
        more: dict[str, Any] = {"which": f"ingest-{rng.randint(1, ingests)}"}
        return more | (
            {"seconds": round(rng.uniform(*ZOMBIE_S), 1)} if kind == "freeze ingest" else {}
        )
    if kind == "freeze redis":
        return {"seconds": round(rng.uniform(0.5, 4.0), 1)}
    if kind == "freeze broker":
        return {"seconds": round(rng.uniform(1.0, 8.0), 1)}
    if kind == "older copy":
        return {"older_s": round(rng.uniform(1.0, 15.0), 1)}
    if kind == "emptied":
        return {"how": rng.choice(("FLUSHALL", "without files"))}
    if kind.startswith(("error", "slow", "cut")):
        return {"seconds": round(rng.uniform(0.3, 2.5), 1)}
    if kind == "settings":
        return dict(rng.choice(CHANGES))
    if kind in ("duplicates", "reordered", "strays", "transactions"):
        return {"events": rng.randint(50, 300) if kind != "strays" else rng.randint(5, 40)}
    return {}
