"""The protocol against the answers that are served, and against builds that would flatter us."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from eddyline.errors import SettingsError
from eddyline.schema.events import Click, Item
from eddyline.settings.loader import Settings
from embeddings.bundle.bundle import Bundle
from evaluation import offline, protocol
from evaluation.event_log import DISLIKE, EventLog, LogBuilder
from evaluation.product import Product
from evaluation.protocol import Outcome
from evaluation.references import ReferenceRow, Scores
from evaluation.rows import Query
from index.port import Hit
from serving.answer.fusions import make_fusion
from serving.answer.seen import SeenPolicy
from serving.recall import registry
from tests.unit.evaluation.small import BASE_MS, ITEMS, make_items, make_log

SETTINGS = Settings(
    popular_limit=9,
    history_length_max=12,
    popular_fast_half_life_events=5,
    popular_slow_half_life_events=40,
)
SPLIT = 0.5


def evaluate(
    log: EventLog, bundle: Bundle, *, keeps_repeats: bool = False, rows: tuple[str, ...] = ()
) -> Outcome:
    report, outcome = offline.evaluate(
        SETTINGS,
        log,
        bundle,
        name="small",
        split=SPLIT,
        keeps_repeats=keeps_repeats,
        seed=3,
        rows=rows or tuple(offline.ROWS),
    )
    assert not report.rejected
    return outcome


def run_row(log: EventLog, bundle: Bundle, row: type[ReferenceRow], **more: bool) -> Outcome:
    """An evaluation by one row that is made here."""
    product, first = Product(SETTINGS, bundle), log.split(SPLIT)
    try:
        made = row("row", log, product, len(protocol.scorable(log, first)))
        return protocol.run(log, product, [made], first, keeps_repeats=more.get("keeps", False))
    finally:
        assert not product.rejected
        product.close()


def served(
    log: EventLog, bundle: Bundle, event: int, keeps_repeats: bool
) -> dict[str, list[list[str]]]:
    """Answers with all live items just before an event, as runs of equal items: by path, and the
    cascade's. Everything is applied one by one to a new product.
    """
    now_ms = int(log.at_ms[event])
    product = Product(SETTINGS, bundle)
    try:
        for item in log.changes:
            if item.at_ms < now_ms:
                product.apply_items([item])
        for number in range(len(log)):
            if log.at_ms[number] < now_ms:
                product.apply_events([log.click(number)])
                product.write()
        every = {name: product.path(name) for name in registry.PATHS}
        user = product.user(log.user_ids[log.users[event]])
        product.read_popularity()
        product.popularity.refresh()
        request = product.request(user, len(product.items.ids))
        if not keeps_repeats:
            hidden = SeenPolicy(product.settings).hidden(user, product.index, now_ms)
            request = request._replace(excluded=hidden.ids, hidden=hidden)
        found = {}
        for name, path in every.items():
            found[name] = runs(name, path.recall(request, product.index).hits)
        paths = [*product.paths.values()]
        items, _ = product.fusion.fuse(paths, request, product.index)
        found["cascade"] = []
        for name in product.paths:
            found["cascade"] += runs(name, [one.hit for one in items if one.path == name])
        fusion = make_fusion(msgspec.structs.replace(product.settings, fusion="rrf"))
        items, _ = fusion.fuse(paths, request, product.index)
        fused = [one.hit._replace(score=one.fused_score) for one in items if one.fused_score]
        found["rrf"] = runs("rrf", fused)
        for name in ("popular", "newest"):
            more = [one.hit for one in items if one.path == name and not one.fused_score]
            found["rrf"] += runs(name, more)
        assert not product.rejected
        return found
    finally:
        product.close()


def runs(path: str, hits: list[Hit]) -> list[list[str]]:
    """Ids of hits, those of equal score together."""
    found: list[list[str]] = []
    last: float | None = None
    for hit in hits:
        score = hit.at_ms if path == "newest" else hit.score
        if score != last:
            found.append([])
        found[-1].append(hit.item_id)
        last = score
    return found


def rank_in(found: list[list[str]], item_id: str) -> float:
    before = 0
    for run in found:
        if item_id in run:
            return 1 + before + (len(run) - 1) / 2
        before += len(run)
    return float("inf")


@pytest.mark.parametrize("keeps_repeats", [False, True])
def test_every_rank_is_that_of_the_answer_served_just_before(
    bundle: Bundle, keeps_repeats: bool
) -> None:
    log = make_log(1)
    outcome = evaluate(log, bundle, keeps_repeats=keeps_repeats)
    scored = outcome.scored
    checked = 0
    for number, event in enumerate(scored.events.tolist()):
        if not outcome.kept[number]:
            continue
        item_id = log.item_ids[log.items[event]]
        for name, found in served(log, bundle, event, keeps_repeats).items():
            wanted = rank_in(found, item_id)
            assert outcome.rows[name].ranks[number] == wanted, (name, number, item_id)
            checked += wanted < float("inf")
    assert checked > 100
    paths = {*registry.PATHS, "cascade", "rrf", "rrf-all"}
    assert paths <= outcome.rows.keys()
    assert scored.repeat.any() and not scored.live.all(), "the log has all kinds of events"


@pytest.mark.parametrize("row", ["towers-frozen", "towers-daily"])
def test_an_older_history_is_that_of_its_time(bundle: Bundle, row: str) -> None:
    day = 86_400_000
    builder = LogBuilder(changes=[Item(item_id=f"i{n}") for n in range(ITEMS)])
    times = [*range(1, 11), day + 1, day + 2, day + 3, 2 * day + 1, 2 * day + 2, 2 * day + 3]
    for n, at_ms in enumerate(times):
        builder.add(Click(user_id="u", item_id=f"i{n}", at_ms=BASE_MS // day * day + at_ms))
    log = builder.build()
    outcome = evaluate(log, bundle, rows=(row, "towers"))
    first = log.split(SPLIT)
    for number, event in enumerate(outcome.scored.events.tolist()):
        product = Product(SETTINGS, bundle)
        product.apply_items(log.changes)
        today = log.at_ms[event] // day * day
        before = first if row == "towers-frozen" else int(np.searchsorted(log.at_ms, today))
        # The product of a restart at the split knows all events before it.
        before = max(before, first)
        product.apply_events([log.click(n) for n in range(before)])
        product.write()
        request = product.request(product.user("u"), ITEMS)
        seen = {log.item_ids[log.items[n]] for n in range(event)}
        hits = product.towers.recall(request._replace(excluded=seen), product.index).hits
        wanted = rank_in(runs("towers", hits), log.item_ids[log.items[event]])
        assert outcome.rows[row].ranks[number] == wanted
        product.close()
    different = outcome.rows[row].ranks != outcome.rows["towers"].ranks
    assert different.any(), "the live history knows more"


class Oracle(ReferenceRow):
    """Knows the target."""

    def scores(self, query: Query) -> Scores:
        found = np.zeros(len(self.rows))
        found[query.target] = 1.0
        return found


class Constant(ReferenceRow):
    """Says nothing."""

    def scores(self, query: Query) -> Scores:
        return np.ones(len(self.rows))


class Last(ReferenceRow):
    """The item of the last event that happened."""

    last = 0

    def learn(self, begin: int, end: int) -> None:
        self.last = int(self.log.items[end - 1])

    def scores(self, query: Query) -> Scores:
        return (self.rows == self.last).astype(float)


class Decayed(ReferenceRow):
    """Clicks decayed by events: one number an item, which every event lowers."""

    half_life = 5.0

    def __init__(self, names: str, log: EventLog, product: Product, scored: int) -> None:
        super().__init__(names, log, product, scored)
        self.clicks: dict[int, float] = {}

    def learn(self, begin: int, end: int) -> None:
        for item in self.log.items[self.positive(begin, end)].tolist():
            for other in self.clicks:
                self.clicks[other] *= 0.5 ** (1 / self.half_life)
            self.clicks[item] = self.clicks.get(item, 0.0) + 1.0

    def scores(self, query: Query) -> Scores:
        return np.array([self.clicks.get(row, -np.inf) for row in self.rows.tolist()])


class DecayedSlowly(Decayed):
    half_life = 40.0


class Again(ReferenceRow):
    """What the user had, first."""

    def scores(self, query: Query) -> Scores:
        seen = {entry.item_id for entry in query.user.history.entries}
        return np.array([float(i in seen) for i in self.product.items.ids])


def test_a_planted_oracle_hits_always(bundle: Bundle) -> None:
    outcome = run_row(make_log(2), bundle, Oracle)
    live = outcome.kept & outcome.scored.live
    assert (outcome.rows["row"].ranks[live] == 1.0).all() and live.sum() > 20
    assert np.isinf(outcome.rows["row"].ranks[outcome.kept & ~outcome.scored.live]).all()


def test_ties_count_half(bundle: Bundle) -> None:
    log = make_log(2)
    outcome = run_row(log, bundle, Constant, keeps=True)
    for number in np.flatnonzero(outcome.scored.live):
        now_ms = log.at_ms[outcome.scored.events[number]]
        live = sum(item.at_ms < now_ms for item in log.changes)
        assert outcome.rows["row"].ranks[number] == (live + 1) / 2


def test_an_answer_that_peeks_at_its_own_event_finds_nothing(bundle: Bundle) -> None:
    """Each event is on another item than the one before, so who knows the last one is wrong."""
    builder = LogBuilder(changes=[Item(item_id=f"i{n}") for n in range(ITEMS)])
    for n in range(90):
        builder.add(
            Click(user_id=f"u{n % 2}", item_id=f"i{n % ITEMS}", at_ms=BASE_MS + 1_000 * (n + 1))
        )
    outcome = run_row(builder.build(), bundle, Last, keeps=True)
    assert (outcome.rows["row"].ranks > 10).all()


def test_seen_items_do_not_compete(bundle: Bundle) -> None:
    log = make_log(4)
    dropped, kept = (run_row(log, bundle, Again, keeps=keeps) for keeps in (False, True))
    at = dropped.kept & dropped.scored.live
    ranks = dropped.rows["row"].ranks[at]
    assert len(ranks) > 20
    for number, rank in zip(np.flatnonzero(at), ranks, strict=True):
        event = int(dropped.scored.events[number])
        before = (log.users == log.users[event]) & (log.at_ms < log.at_ms[event])
        listed = {log.item_ids[i] for i in log.items[before]}  # in the list of 12, or beyond it
        live = [i.item_id for i in log.changes if i.at_ms < log.at_ms[event]]
        assert rank == (len(set(live) - listed) + 1) / 2
    assert (kept.rows["row"].ranks[at] > ranks).any()


def test_chance_hits_k_of_n(bundle: Bundle) -> None:
    builder = LogBuilder(changes=[Item(item_id=f"i{n}") for n in range(ITEMS)])
    rng = np.random.default_rng(5)
    for n in range(3_000):
        item_id = f"i{rng.integers(ITEMS)}"
        builder.add(
            Click(user_id=f"u{n % 400}", item_id=item_id, at_ms=BASE_MS + 1_000 * (n // 50 + 1))
        )
    report, outcome = offline.evaluate(
        SETTINGS,
        builder.build(),
        bundle,
        name="chance",
        split=0.2,
        keeps_repeats=True,
        seed=11,
        rows=("random",),
    )
    estimate = report.rows[0].metrics["hr_10"]
    assert estimate.low <= 10 / ITEMS <= estimate.high
    assert 0 < estimate.high - estimate.low < 0.1
    assert len(outcome.scored.events) == 2_400


def test_a_basket_is_scored_before_it_is_applied(bundle: Bundle) -> None:
    log = make_log(6)
    scored = evaluate(log, bundle, rows=("popular-all",)).scored
    for number, event in enumerate(scored.events.tolist()):
        before = log.at_ms < log.at_ms[event]
        assert scored.user_before[number] == (before & (log.users == log.users[event])).sum()
        assert scored.item_before[number] == (before & (log.items == log.items[event])).sum()


def test_plain_popularity_counts_what_happened_before(bundle: Bundle) -> None:
    log = make_log(8)
    outcome = evaluate(log, bundle, keeps_repeats=True, rows=("popular-all",))
    for number, event in enumerate(outcome.scored.events.tolist()):
        now_ms, target = log.at_ms[event], log.item_ids[log.items[event]]
        counts = {item.item_id: 0 for item in log.changes if item.at_ms < now_ms}
        for other in range(len(log)):
            item_id = log.item_ids[log.items[other]]
            if log.at_ms[other] < now_ms and log.kinds[other] != DISLIKE and item_id in counts:
                counts[item_id] += 1
        if target not in counts:
            assert outcome.rows["popular-all"].ranks[number] == float("inf")
            continue
        own = counts.pop(target)
        ties = sum(count == own for count in counts.values())
        wanted = 1 + sum(count > own for count in counts.values()) + ties / 2
        assert outcome.rows["popular-all"].ranks[number] == wanted


def test_the_same_seed_gives_the_same_bytes(bundle: Bundle) -> None:
    log = make_log(9)

    def report(seed: int) -> bytes:
        found, _ = offline.evaluate(
            SETTINGS, log, bundle, name="s", split=SPLIT, keeps_repeats=False, seed=seed
        )
        return msgspec.json.encode(found)

    assert report(1) == report(1) != report(2)


def test_the_order_of_the_files_does_not_matter_between_times(bundle: Bundle) -> None:
    clicks = [
        Click(user_id=f"u{n % 3}", item_id=f"i{n % 20}", at_ms=BASE_MS + 1_000 * (n + 1))
        for n in range(80)
    ]
    ranks = []
    for some in (clicks, clicks[::-1]):
        builder = LogBuilder(changes=make_items())
        for number, click in enumerate(some):
            event_id = f"e{number if some is clicks else len(some) - 1 - number}"
            builder.add(msgspec.structs.replace(click, event_id=event_id))
        ranks.append(evaluate(builder.build(), bundle, keeps_repeats=True).rows["towers"].ranks)
    assert np.array_equal(*ranks)


def test_what_cannot_be_evaluated_is_refused(bundle: Bundle) -> None:
    log = make_log(9)
    arguments = {"name": "s", "keeps_repeats": False, "seed": 1}
    with pytest.raises(SettingsError, match="--rows nothing: expected"):
        offline.evaluate(SETTINGS, log, bundle, split=0.5, rows=("nothing",), **arguments)  # type: ignore[arg-type]
    for split in (0.0, 1.0):
        with pytest.raises(SettingsError, match="--split"):
            offline.evaluate(SETTINGS, log, bundle, split=split, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "ids",
    [
        ["a", "b/1", "b/2", "b/01", "b/", "/3", "3", "b/99999999999999999999", "b/1/1", "c/-1"],
        [f"import/file/{n}" for n in range(10)],
    ],
)
def test_an_event_keeps_its_id_and_a_resent_one_is_left_out(ids: list[str]) -> None:
    builder = LogBuilder()
    clicks = [
        Click(user_id="u", item_id=f"i{n}", at_ms=BASE_MS - n, event_id=event_id)
        for n, event_id in enumerate(ids)
    ]
    for click in (*clicks, *clicks[::-1]):
        builder.add(msgspec.structs.replace(click, item_id=f"{click.item_id}-{len(builder) > 9}"))
    log = builder.build()
    assert log.resent == len(ids) == len(log) == 10
    for number, click in enumerate(clicks[::-1]):
        found = log.click(number)
        assert (found.event_id, found.item_id) == (click.event_id, f"{click.item_id}-False")


def test_resent_events_do_not_flatter_where_repeats_count(bundle: Bundle) -> None:
    """A second delivery would find its own event in the history."""
    clicks = [
        Click(
            user_id=f"u{n % 3}", item_id=f"i{n % 20}", at_ms=BASE_MS + 1_000 * n, event_id=f"e{n}"
        )
        for n in range(60)
    ]
    found = []
    for copies in (1, 2):
        builder = LogBuilder(changes=make_items())
        for click in clicks:
            for copy in range(copies):
                builder.add(msgspec.structs.replace(click, at_ms=click.at_ms + copy))
        found.append(evaluate(builder.build(), bundle, keeps_repeats=True))
    assert np.array_equal(found[0].rows["towers"].ranks, found[1].rows["towers"].ranks)


def test_a_training_takes_the_newest_events_before_the_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = make_log(2)
    assert offline.training_data(log, 90).clicks == [log.click(n) for n in range(90)]
    monkeypatch.setattr(offline, "CLICKS_MAX", 40)
    assert offline.training_data(log, 90).clicks == [log.click(n) for n in range(50, 90)]
    assert len(offline.training_data(log, 39).clicks) == 39


def test_events_before_the_split_are_not_cut_within_a_time() -> None:
    builder = LogBuilder()
    for n in range(10):
        builder.add(Click(user_id="u", item_id=f"i{n}", at_ms=5_000 if n > 3 else n + 1))
    log = builder.build()
    assert [log.split(share) for share in (0.3, 0.4, 0.5, 0.9, 1.0)] == [3, 4, 4, 4, 10]
    assert [item.at_ms for item in log.changes] == [1, 2, 3, 4, *[5_000] * 6]


@pytest.mark.parametrize("keeps_repeats", [False, True])
def test_popularity_by_events_is_that_of_a_plain_count(bundle: Bundle, keeps_repeats: bool) -> None:
    log = make_log(5)
    outcome = evaluate(
        log, bundle, keeps_repeats=keeps_repeats, rows=("popular_fast", "popular_slow")
    )
    assert len(log) > 2 * Decayed.half_life
    for name, row in (("popular_fast", Decayed), ("popular_slow", DecayedSlowly)):
        plain = run_row(log, bundle, row, keeps=keeps_repeats).rows["row"].ranks
        found = outcome.rows[name].ranks
        assert (found == plain).all() and np.isfinite(plain).any()
    assert (outcome.rows["popular_fast"].ranks != outcome.rows["popular_slow"].ranks).any()
