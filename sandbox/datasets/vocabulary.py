"""The vocabulary of the generated data set: genres, moods, occupations, and their titles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Genre:
    """A genre, its neighbouring genre, and the nouns and places of its titles."""

    name: str
    neighbour: str
    nouns: tuple[str, ...]
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mood:
    """A mood, its adjectives, and the years of its films (first, one after the last)."""

    name: str
    adjectives: tuple[str, ...]
    years: tuple[int, int]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.replace("_", " ") for word in text.split())


GENRES = (
    Genre(
        "Adventure",
        "Fantasy",
        _words("Expedition River Compass Summit Caravan Jungle Map Voyage Island Trail"),
        _words("Patagonia the_Amazon Samarkand Zanzibar the_Andes Borneo"),
    ),
    Genre(
        "Comedy",
        "Romance",
        _words("Wedding Uncle Landlord Holiday Neighbour Cousin Picnic Waiter Mix-Up Dentist"),
        _words("Brighton Naples Hoboken Clermont Bruges Malmö"),
    ),
    Genre(
        "Crime",
        "Thriller",
        _words("Heist Witness Alibi Detective Ledger Verdict Safe Informer Racket Fingerprint"),
        _words("Marseille Chicago the_Docks Odessa Soho Palermo"),
    ),
    Genre(
        "Documentary",
        "Drama",
        _words("Archive Harvest Glacier Factory Bees Lighthouse Migration Election Seeds Tide"),
        _words("Iceland the_Sahel Bengal the_Baltic Kyoto Bolivia"),
    ),
    Genre(
        "Drama",
        "Romance",
        _words("Daughter Inheritance Silence Letter Orchard Winter Promise Father Lesson House"),
        _words("Lisbon Vermont Kraków Tehran Montreal Dublin"),
    ),
    Genre(
        "Fantasy",
        "Adventure",
        _words("Dragon Crown Sorcerer Oracle Amulet Griffin Prophecy Sword Spell Giant"),
        _words("Avelorn the_Hollow_Hills Mirewood the_North_Gate Eldermere the_Ninth_Realm"),
    ),
    Genre(
        "Horror",
        "Thriller",
        _words("Cellar Scarecrow Curse Graveyard Doll Fog Asylum Whisper Crypt Shadow"),
        _words("Blackwater Hill_House Raven_Lake the_Marsh Gallows_Hill St._Agnes"),
    ),
    Genre(
        "Musical",
        "Comedy",
        _words("Melody Chorus Cabaret Trumpet Waltz Songbird Stage Rhythm Piano Encore"),
        _words("Vienna Broadway Havana Montmartre Memphis Bahia"),
    ),
    Genre(
        "Romance",
        "Drama",
        _words("Kiss Rendezvous Sweetheart Summer Moonlight Café Goodbye Dance Heart Valentine"),
        _words("Paris Verona Santorini Venice Seville Prague"),
    ),
    Genre(
        "Sci-Fi",
        "Thriller",
        _words("Android Orbit Nebula Signal Starship Machine Colony Reactor Paradox Probe"),
        _words("Titan Sector_Nine Europa Mars Proxima Station_Four"),
    ),
    Genre(
        "Thriller",
        "Crime",
        _words("Courier Deadline Hostage Conspiracy Cipher Ransom Escape Double Passenger Target"),
        _words("Berlin the_Border Tangier Geneva Istanbul the_Embassy"),
    ),
    Genre(
        "Western",
        "Adventure",
        _words(
            "Gunslinger Sheriff Stagecoach Canyon Mustang Saloon Outlaw Railroad Rancher Showdown"
        ),
        _words("Abilene Dry_Creek Laredo Silver_City Tombstone_Pass Red_Rock"),
    ),
)
MOODS = (
    Mood(
        "modern",
        _words("Electric Broken Neon Wild Secret Fearless Burning Reckless Perfect Stolen"),
        (1998, 2024),
    ),
    Mood(
        "classic",
        _words("Golden Gentle Forgotten Old Quiet Grand Crimson Velvet Honest Faithful"),
        (1948, 1985),
    ),
)
OCCUPATIONS = ("student", "engineer", "teacher", "nurse", "writer", "cook", "lawyer", "gardener")
_NAMES = _words("Clara Hugo Mina Oscar Ines Victor Alma Felix Rosa Emil Nora Anton")


def make_title(draw: Callable[[], float], genre: Genre, mood: Mood, titles: set[str]) -> str:
    """Make a title that is not in `titles` and add it; sequels get a number.

    draw: a uniform number from 0 to below 1 at each call
    """

    def pick(words: tuple[str, ...]) -> str:
        return words[int(draw() * len(words))]

    shape = draw()
    if shape < 0.4:
        title = f"The {pick(mood.adjectives)} {pick(genre.nouns)}"
    elif shape < 0.65:
        title = f"The {pick(genre.nouns)} of {pick(genre.places)}"
    elif shape < 0.8:
        title = f"{pick(_NAMES)}'s {pick(mood.adjectives)} {pick(genre.nouns)}"
    elif shape < 0.9:
        title = f"{pick(mood.adjectives)} {pick(genre.places)}".replace(" the ", " ")
    else:
        title = f"{pick(genre.nouns)} in {pick(genre.places)}"
    numbered, part = title, 1
    while numbered in titles:
        part += 1
        numbered = f"{title} {part}"
    titles.add(numbered)
    return numbered
