"""A data set from a seed: films with readable titles, users with tastes, and what they clicked.

Its structure, which a tower can learn and a test can switch off:

* 24 tastes, each a genre in a mood; a film belongs to one, and its title, categories, tags and year
  follow from it;
* popularity within a taste follows Zipf's law, and each taste rises and falls in slow waves;
* a user has two or three tastes, drawn by occupation and age; they drift, and a session stays
  mostly in one;
* films and users appear all along the history, so some are new at any moment.

The only source of randomness is `random.Random.random()`, whose sequence Python guarantees: the
same seed gives the same data set under every Python, numpy and machine.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from dataclasses import dataclass, field
from itertools import accumulate

from eddyline.schema.events import Click, Item, Kind, UserProfile
from sandbox.datasets.dataset import Dataset, OnProgress
from sandbox.datasets.vocabulary import GENRES, MOODS, OCCUPATIONS, Genre, Mood, make_title

LICENCE = ""
DAY_MS = 86_400_000
# 2023-01-01 to 2023-06-30, UTC: half a year, about as long as MovieLens-100K.
START_MS = 1_672_531_200_000
SPAN_MS = 180 * DAY_MS
# This share of the catalogue exists from the start; the rest appears along the history.
OLD_SHARE = 0.9
# Probability that the next click of a session stays in the taste of the last.
STAY = 0.7
# Mean time between two clicks of a session.
CLICK_GAP_MS = 120_000
TRIES_FOR_UNSEEN = 8


@dataclass(slots=True)
class _Taste:
    """A genre in a mood, with its films in order of popularity."""

    genre: Genre
    mood: Mood
    films: list[str] = field(default_factory=list)
    cumulative: list[float] = field(default_factory=list)


def generate(
    *,
    seed: int = 1,
    items: int = 2_000,
    users: int = 1_000,
    clicks: int = 60_000,
    randomness: float = 0.0,
    on_progress: OnProgress | None = None,
) -> Dataset:
    """A data set of these sizes.

    randomness: 0 … 1, the share of clicks that go to any film at all; at 1 there is nothing to
                learn, not even popularity
    Raises ValueError for a size below 1 or a randomness outside 0 … 1.
    """
    if min(items, users, clicks) < 1 or not 0 <= randomness <= 1:
        raise ValueError("sizes start at 1, randomness lies between 0 and 1")
    rng = random.Random(f"eddyline-{seed}")
    tastes = [_Taste(genre, mood) for mood in MOODS for genre in GENRES]
    films = _films(rng, tastes, items)
    profiles, user_tastes = _users(rng, tastes, users)
    history = _History(rng, tastes, films, randomness)
    made: list[tuple[int, str, int, str, Kind]] = []
    for number, (user_id, count) in enumerate(
        zip(profiles, _shares(rng, users, clicks), strict=True)
    ):
        made += history.of(user_id, user_tastes[user_id], count)
        if on_progress and (number % 50 == 0 or number == users - 1):
            on_progress("generating a data set", number + 1, users)
    made.sort()  # (at_ms, user_id, position in the user's history, …)
    events = [
        Click(event_id=f"gen-{seed}-{n}", user_id=user_id, item_id=film, at_ms=at_ms, kind=kind)
        for n, (at_ms, user_id, _, film, kind) in enumerate(made)
    ]
    return Dataset("generated", LICENCE, list(films.values()), profiles, events)


def _films(rng: random.Random, tastes: list[_Taste], count: int) -> dict[str, Item]:
    """The catalogue by id; fills the tastes with their films and popularities."""
    films: dict[str, Item] = {}
    titles: set[str] = set()
    for number in range(1, count + 1):
        taste = tastes[_below(rng, len(tastes))]
        year = taste.mood.years[0] + _below(rng, taste.mood.years[1] - taste.mood.years[0])
        categories = [taste.genre.name]
        if rng.random() < 0.4:
            categories.append(taste.genre.neighbour)
        new = rng.random() >= OLD_SHARE
        film = Item(
            item_id=f"f{number}",
            title=make_title(rng.random, taste.genre, taste.mood, titles),
            categories=categories,
            tags=[taste.mood.name],
            attributes={"year": year},
            at_ms=START_MS + (int(rng.random() * SPAN_MS * 0.95) if new else 0),
        )
        films[film.item_id] = film
        taste.films.append(film.item_id)
    for taste in tastes:
        weights = (1 / (rank + 2) for rank in range(len(taste.films)))
        taste.cumulative = list(accumulate(weights))
    return films


def _users(
    rng: random.Random, tastes: list[_Taste], count: int
) -> tuple[dict[str, UserProfile], dict[str, list[int]]]:
    """(profiles, indices of each user's tastes, the strongest first), by user id."""
    profiles: dict[str, UserProfile] = {}
    user_tastes: dict[str, list[int]] = {}
    for number in range(1, count + 1):
        user_id = f"p{number}"
        job = _below(rng, len(OCCUPATIONS))
        age = 16 + int(60 * rng.random() * rng.random())
        # Each occupation prefers three genres, the young the first mood, the old the second.
        mood = 0 if rng.random() < (0.85 if age < 35 else 0.25) else 1
        genre = (job * 3 + _below(rng, 3)) % len(GENRES)
        favourite = mood * len(GENRES) + genre
        if rng.random() < 0.3:
            favourite = _below(rng, len(tastes))
        others = [_below(rng, len(tastes)) for _ in range(1 + _below(rng, 2))]
        user_tastes[user_id] = [favourite, *others]
        profiles[user_id] = UserProfile(
            user_id=user_id, attributes={"age": age, "occupation": OCCUPATIONS[job]}, at_ms=START_MS
        )
    return profiles, user_tastes


def _shares(rng: random.Random, users: int, clicks: int) -> list[int]:
    """How many clicks each user makes: a few make very many; the sum is exactly `clicks`."""
    weights = [math.exp(0.8 * _bell(rng)) for _ in range(users)]
    bounds = [round(clicks * total / sum(weights)) for total in accumulate(weights)]
    return [high - low for low, high in zip([0, *bounds], bounds, strict=False)]


class _History:
    """Draws the clicks of one user after the other."""

    def __init__(
        self, rng: random.Random, tastes: list[_Taste], films: dict[str, Item], randomness: float
    ) -> None:
        self._rng = rng
        self._tastes = tastes
        self._films = films
        self._ids = list(films)
        self._randomness = randomness

    def of(
        self, user_id: str, tastes: list[int], count: int
    ) -> list[tuple[int, str, int, str, Kind]]:
        """(at_ms, user, position, film, kind) of `count` clicks, in the order of time."""
        rng = self._rng
        first = rng.random() * 0.9
        sessions = sorted(first + rng.random() * (1 - first) for _ in range(1 + count // 6))
        chosen = sorted(_below(rng, len(sessions)) for _ in range(count))
        seen: set[str] = set()
        made: list[tuple[int, str, int, str, Kind]] = []
        at_ms, session, taste = 0, -1, tastes[0]
        for position, number in enumerate(chosen):
            moment = sessions[number]
            if number != session:
                session, taste = number, self._taste(tastes, moment)
                at_ms = max(at_ms, START_MS + int(moment * SPAN_MS))
            elif rng.random() > STAY:
                taste = self._taste(tastes, moment)
            at_ms += 1_000 + int(-math.log(1 - rng.random()) * CLICK_GAP_MS)
            film, kind = self._film(taste, at_ms, seen)
            seen.add(film)
            made.append((at_ms, user_id, position, film, kind))
        return made

    def _taste(self, tastes: list[int], moment: float) -> int:
        """Draw one of a user's tastes: the first mostly early, the others later, by fashion."""
        rng = self._rng
        weights = []
        for rank, taste in enumerate(tastes):
            drift = (1 - moment) if rank == 0 else moment / (len(tastes) - 1)
            fashion = 1 + 0.5 * math.sin(2 * math.pi * (moment * 1.5 + taste / len(self._tastes)))
            weights.append((0.2 + drift) * fashion)
        total = list(accumulate(weights))
        return tastes[bisect(total, rng.random() * total[-1], hi=len(total) - 1)]

    def _film(self, number: int, at_ms: int, seen: set[str]) -> tuple[str, Kind]:
        """(a released film, unseen if a few tries find one; the kind of the event)."""
        rng = self._rng
        taste = self._tastes[number]
        noise = rng.random() < self._randomness or not taste.films
        film = ""
        for _ in range(TRIES_FOR_UNSEEN):
            if noise:
                film = self._ids[_below(rng, len(self._ids))]
            else:
                at = bisect(taste.cumulative, rng.random() * taste.cumulative[-1])
                film = taste.films[min(at, len(taste.films) - 1)]
            if film not in seen and self._films[film].at_ms <= at_ms:
                break
        else:
            film = self._any_released(film, at_ms)
        opinion = rng.random()
        if opinion < (0.2 if noise else 0.08):
            return film, "dislike"
        return film, "like" if opinion > 0.6 else "click"

    def _any_released(self, film: str, at_ms: int) -> str:
        """The film itself if it is released; else the next film that is."""
        at = self._ids.index(film)
        for other in (*self._ids[at:], *self._ids[:at]):
            if self._films[other].at_ms <= at_ms:
                return other
        return film


def _below(rng: random.Random, bound: int) -> int:
    """An integer from 0 to below the bound."""
    return int(rng.random() * bound)


def _bell(rng: random.Random) -> float:
    """About a normal deviate: the sum of twelve uniforms, less six."""
    return sum(rng.random() for _ in range(12)) - 6
