"""Training: examples, determinism, learning, data sources, and real ratings if present."""

import csv
import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from eddyline.errors import BundleError, Rejected
from eddyline.kafka import topics as kafka_topics
from eddyline.schema import events
from eddyline.schema.erasure import Erasure, digest
from eddyline.schema.events import Click, Item, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.schema.records import BuiltRecord
from eddyline.settings.loader import Settings
from embeddings.bundle import bundle
from embeddings.data import sources
from embeddings.data.examples import TrainingData, make_examples, split
from embeddings.evaluation.next_item import evaluate
from embeddings.models.base import Progress, Recipe
from embeddings.training import __main__ as command
from embeddings.training.trainer import train

MOVIELENS = Path(__file__).resolve().parents[4] / "shared" / "data" / "ml-latest-small"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def click(user: str, item: str, at_ms: int, **more: object) -> Click:
    return Click(user_id=user, item_id=item, at_ms=at_ms, **more)


def clicks_in_genres(
    structure: float, *, users: int = 60, per_user: int = 30, seed: int = 1
) -> TrainingData:
    """structure: probability that a user stays in the genre of their last item; 0 is noise."""
    rng = np.random.default_rng(seed)
    genres = ["Drama", "Comedy", "War", "Western"]
    items = [
        Item(item_id=f"i{n:03}", title=f"Film {n}", categories=[genres[n % 4]]) for n in range(120)
    ]
    clicks = []
    for user in range(users):
        genre = user % 4
        for at in range(per_user):
            if rng.random() >= structure:
                genre = int(rng.integers(4))
            item = genre + 4 * int(rng.integers(30))
            clicks.append(
                click(f"u{user:02}", f"i{item:03}", at * 1_000 + user, event_id=f"{user}-{at}")
            )
    return TrainingData(items, {f"u{n:02}": {"age": 20 + n} for n in range(0, users, 2)}, clicks)


def test_history_is_strictly_before_and_newest_first() -> None:
    rows = {"a": 0, "b": 1, "c": 2, "d": 3}
    some = [
        click("u", "c", 30),
        click("u", "a", 10),
        click("v", "d", 5),
        click("u", "b", 20),
        click("u", "d", 20),
        click("u", "a", 25, kind="dislike"),
        click("u", "gone", 26),
        click("u", "b", 40),
    ]
    found = make_examples(some, rows)
    histories, counts = found.histories(np.arange(len(found)), 3)
    listed = [
        (found.user_ids[u], int(t), h[:n].tolist())
        for u, t, h, n in zip(found.users, found.targets, histories, counts, strict=True)
    ]
    assert listed == [
        ("v", 3, []),
        ("u", 0, []),
        ("u", 1, [0]),
        ("u", 3, [0]),
        ("u", 2, [3, 1, 0]),
        ("u", 1, [2, 3, 1]),
    ]
    assert (histories[0] == -1).all()


def test_no_click_makes_no_example() -> None:
    found = make_examples([click("u", "gone", 1)], {"a": 0})
    assert len(found) == 0
    assert found.histories(np.arange(0), 3)[0].shape == (0, 3)


def test_split_is_by_time_then_user_then_position() -> None:
    some = [click("b", "1", 5), click("a", "2", 5), click("a", "3", 5), click("c", "4", 1)]
    first, rest = split(some, 0.5)
    assert [c.item_id for c in first + rest] == ["4", "2", "3", "1"]
    assert len(first) == 2
    assert split(some, 1.0)[1] == []


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_a_seed_out_of_bounds_is_refused(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--file", "none.jsonl", "--no-publish", "--seed", seed])
    assert "argument --seed: must be from 0 to 4294967295" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_a_seed_at_its_bound_trains(tmp_path: Path, seed: int) -> None:
    assert command._arguments(["--seed", str(seed)]).seed == seed
    data = TrainingData([Item(item_id="a")], {}, [click("u", "a", 1)])
    train(data, tmp_path / "g", "1", recipe=Recipe(epochs=1, seed=seed))


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    data = clicks_in_genres(0.8)
    shuffled = dataclasses.replace(data, items=data.items[::-1])
    for name, some, seed in (("a", data, 3), ("b", shuffled, 3), ("c", data, 4)):
        train(some, tmp_path / name, "1", recipe=Recipe(epochs=1, seed=seed))
    for path in sorted((tmp_path / "a").glob("*.npy")):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    vectors = "item_vectors.npy"
    assert (tmp_path / "a" / vectors).read_bytes() != (tmp_path / "c" / vectors).read_bytes()


def lift(folder: Path, structure: float) -> float:
    """The hit rate at 10 on held-out clicks, over 120 items."""
    data = clicks_in_genres(structure)
    before, held_out = split(data.clicks, 0.8)
    train(dataclasses.replace(data, clicks=before), folder, "1", recipe=Recipe(epochs=12))
    result = evaluate(bundle.load(folder), data.profiles, before, held_out, micro=True)
    assert result.with_embedding is not None
    assert result.towers.events == result.popularity.events == len(held_out)
    return result.towers.hit_rate_10


def test_it_learns_structure(tmp_path: Path) -> None:
    assert lift(tmp_path / "g", 0.95) > 0.2


def test_it_finds_nothing_in_noise(tmp_path: Path) -> None:
    # About 24 of the 120 items are excluded as seen. Chance is 10/96 = 0.104 ± 0.032 (95 %, 360
    # events).
    assert lift(tmp_path / "g", 0.0) < 0.15


def test_progress_report_and_bundle_agree(tmp_path: Path) -> None:
    data = clicks_in_genres(0.8)
    with_unavailable = dataclasses.replace(
        data,
        items=[
            *data.items[:-1],
            Item(item_id="i119", title="Out", available=False),
            Item(item_id="never clicked", at_ms=1_234),
        ],
        versions={"i003": (2, 17)},
        cut={"0": 4, "2": 20},
    )
    seen: list[Progress] = []
    report = train(
        with_unavailable, tmp_path / "g", "9", recipe=Recipe(epochs=2), on_progress=seen.append
    )
    assert [p.step for p in seen] == list(range(1, seen[0].steps + 1))
    assert {p.epoch for p in seen} == {1, 2}
    assert len(report.losses) == 2
    loaded = bundle.load(tmp_path / "g")
    assert (report.generation, loaded.generation, dict(loaded.cut)) == ("9", "9", {"0": 4, "2": 20})
    assert report.items == len(loaded.item_ids) == 120
    assert "i119" not in loaded.rows  # unavailable: weights, but no vector in the index
    assert "i119" in loaded.item_tower.identities
    assert "never clicked" not in loaded.item_tower.identities
    row = loaded.rows["i003"]
    assert (loaded.item_partitions[row], loaded.item_offsets[row]) == (2, 17)
    assert loaded.item_offsets[loaded.rows["i004"]] == -1
    assert loaded.item_at_ms is not None
    assert loaded.item_at_ms[loaded.rows["never clicked"]] == 1_234


def test_dense_vectors_of_items_are_learned_from(tmp_path: Path) -> None:
    data = clicks_in_genres(0.8)
    rng = np.random.default_rng(1)
    items = [
        Item(item_id=i.item_id, vector=(rng.normal(size=5) * 9 + 30).tolist() if n % 3 else None)
        for n, i in enumerate(data.items)
    ]
    train(dataclasses.replace(data, items=items), tmp_path / "g", "1", recipe=Recipe(epochs=1))
    loaded = bundle.load(tmp_path / "g")
    np.testing.assert_allclose(loaded.item_tower.encode(items), loaded.item_vectors, atol=1e-6)
    moved = Item(item_id=items[1].item_id, vector=[0.0] * 5)
    assert not np.allclose(loaded.item_tower.encode([moved])[0], loaded.item_vectors[1], atol=1e-3)


@pytest.mark.parametrize(
    "data",
    [
        TrainingData([], {}, []),
        TrainingData([Item(item_id="a")], {}, []),
        TrainingData([Item(item_id="a", available=False)], {}, [click("u", "a", 1)]),
        TrainingData([Item(item_id="a")], {}, [click("u", "b", 1)]),
    ],
)
def test_training_without_data_is_refused(tmp_path: Path, data: TrainingData) -> None:
    with pytest.raises(BundleError, match="nothing to train on"):
        train(data, tmp_path / "g", "1", recipe=Recipe(epochs=1))
    assert list(tmp_path.iterdir()) == []


def test_one_item_and_one_click_are_enough(tmp_path: Path) -> None:
    report = train(
        TrainingData([Item(item_id="a")], {}, [click("u", "a", 1)]),
        tmp_path / "g",
        "1",
        recipe=Recipe(epochs=1),
    )
    assert (report.items, report.events) == (1, 1)


SETTINGS = Settings(at_ms_min=0, clicks_partitions=4, items_partitions=2, dedupe_window_events=3)
NOW = 10_000


def record(
    offset: int, key: str | None, value: bytes | None, partition: int | None = None
) -> BuiltRecord:
    partition = partition_of(key or "", 4) if partition is None else partition
    own = None if key is None else key.encode()
    return BuiltRecord("topic", partition, offset, NOW, own, value)


def assembled(
    clicks: list[BuiltRecord] = [], items: list[BuiltRecord] = [], users: list[BuiltRecord] = []
) -> TrainingData:
    topics = {kafka_topics.CLICKS: clicks, kafka_topics.ITEMS: items, kafka_topics.USERS: users}
    return sources.assemble(SETTINGS, topics, cut={"0": 9})


def test_items_and_profiles_are_their_last_record() -> None:
    def item(offset: int, item_id: str, title: str | None) -> BuiltRecord:
        value = None if title is None else events.encode(Item(item_id=item_id, title=title))
        return record(offset, item_id, value, partition_of(item_id, 2))

    users = [
        record(0, "u", events.encode(UserProfile(user_id="u", attributes={"age": 3}))),
        record(1, "v", events.encode(UserProfile(user_id="v"))),
        record(2, "v", None),
    ]
    data = assembled(
        items=[
            item(0, "a", "old"),
            item(1, "b", "gone"),
            item(2, "a", "new"),
            item(3, "b", None),
            item(4, "c", "c"),
        ],
        users=users,
    )
    assert [(i.item_id, i.title) for i in data.items] == [("a", "new"), ("c", "c")]
    assert dict(data.versions) == {"a": (partition_of("a", 2), 2), "c": (partition_of("c", 2), 4)}
    assert dict(data.profiles) == {"u": {"age": 3}}
    assert dict(data.cut) == {"0": 9}


def test_resent_misplaced_and_broken_clicks_are_counted_and_skipped() -> None:
    def sent(offset: int, event_id: str | None, **more: int) -> BuiltRecord:
        return record(offset, "u", events.encode(click("u", "a", 5, event_id=event_id)), **more)

    own = partition_of("u", 4)
    clicks = [
        sent(0, "e0"),
        sent(1, None),
        sent(2, "e0"),
        sent(3, "e0"),
        sent(4, "e0"),
        sent(5, None),
        record(6, "u", b"{"),
        record(7, None, events.encode(click("u", "a", 5)), own),
        record(8, "u", events.encode(click("u", "a", NOW + 10**9))),
        sent(9, "e9", partition=(own + 1) % 4),
    ]
    data = assembled(clicks=clicks)
    # The window is 3 offsets wide: the fourth re-send lies outside and is accepted, as in ingest.
    assert [c.event_id for c in data.clicks] == ["e0", f"{own}/1", "e0", f"{own}/5", f"{own}/7"]
    assert dict(data.rejected) == {
        "re-sent": 2,
        "malformed_json": 1,
        "far_future": 1,
        "misplaced": 1,
    }


def test_clicks_before_a_forget_are_not_learned_from() -> None:
    def sent(offset: int, user: str, at_ms: int) -> BuiltRecord:
        return record(offset, user, events.encode(click(user, "a", at_ms)))

    forget = record(3, "u", events.encode(events.Forget(user_id="u", forget_until_ms=50)))
    merge = record(4, "v", events.encode(events.Merge(user_id="v", merge_into="u", at_ms=55)))
    clicks = [sent(0, "u", 49), sent(1, "u", 50), sent(2, "v", 40), forget, merge, sent(5, "u", 51)]
    data = assembled(clicks=clicks)
    assert sorted((c.user_id, c.at_ms) for c in data.clicks) == [("u", 51), ("v", 40)]
    assert not data.rejected


@pytest.mark.parametrize(("appended_ms", "kept"), [(9_000, [51, 50]), (8_999, [51])])
def test_an_erasure_of_the_archive_covers_late_clicks(appended_ms: int, kept: list[int]) -> None:
    """Its Forget is in the archive only: the rows from before it are not there any more."""
    values = [events.encode(click("u", "a", at_ms)) for at_ms in (51, 50)]
    clicks = [
        BuiltRecord("clicks", 0, n, appended_ms, b"u", value) for n, value in enumerate(values)
    ]
    one = msgspec.structs.replace(SETTINGS, clicks_partitions=1)
    data = sources.assemble(
        one,
        {kafka_topics.CLICKS: clicks, kafka_topics.ITEMS: [], kafka_topics.USERS: []},
        cut={},
        erasures={digest("u"): Erasure(50, -1, 8_999)},
    )
    assert [c.at_ms for c in data.clicks] == kept


def test_of_a_long_log_the_newest_clicks_are_kept() -> None:
    clicks = [record(n, "u", events.encode(click("u", "a", n))) for n in range(50)]
    topics = {kafka_topics.CLICKS: clicks, kafka_topics.ITEMS: [], kafka_topics.USERS: []}
    data = sources.assemble(SETTINGS, topics, cut={}, clicks_max=4 * 10)
    assert [c.at_ms for c in data.clicks] == list(range(40, 50))


def test_a_file_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "export.jsonl"
    lines = [
        b'{"topic": "items", "value": ' + events.encode(Item(item_id="e\u0301")) + b"}",
        b'{"topic": "users", "value": ' + events.encode(UserProfile(user_id="u ")) + b"}",
        b'{"topic": "clicks", "value": ' + events.encode(click("u ", "\u00e9 ", 5)) + b"}",
        b'{"topic": "clicks", "value": {"user_id": "u"}}',
    ]
    path.write_bytes(b"\n".join(lines))
    data = sources.from_file(SETTINGS, path)
    assert ([i.item_id for i in data.items], list(data.profiles)) == (["\u00e9"], ["u"])
    assert [(one.user_id, one.item_id) for one in data.clicks] == [("u", "\u00e9")]
    assert dict(data.rejected) == {"bad_field": 1}
    assert (dict(data.versions), dict(data.cut)) == ({}, {})
    path.write_text('{"topic": "answers", "value": {}}', encoding="utf-8")
    with pytest.raises(Rejected, match=r"export\.jsonl:1: topic 'answers'"):
        sources.from_file(SETTINGS, path)


@pytest.mark.slow
@pytest.mark.long
def test_on_real_ratings_it_beats_popularity(tmp_path: Path) -> None:
    if not MOVIELENS.exists():
        pytest.skip(f"no {MOVIELENS}: the MovieLens files are not part of this repository")
    with (MOVIELENS / "movies.csv").open(encoding="utf-8") as file:
        items = [
            Item(item_id=r["movieId"], title=r["title"], categories=r["genres"].split("|"))
            for r in csv.DictReader(file)
        ]
    with (MOVIELENS / "ratings.csv").open(encoding="utf-8") as file:
        clicks = [
            click(r["userId"], r["movieId"], int(r["timestamp"]) * 1000)
            for r in csv.DictReader(file)
        ]
    clicks = split(clicks, 0.4)[0]
    before, held_out = split(clicks, 0.9)
    train(TrainingData(items, {}, before), tmp_path / "g", "1", recipe=Recipe(epochs=2))
    result = evaluate(bundle.load(tmp_path / "g"), {}, before, held_out, events_max=1_000)
    assert result.towers.hit_rate_100 > result.popularity.hit_rate_100
