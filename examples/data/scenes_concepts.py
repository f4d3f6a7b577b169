"""The concepts of the scenes, their English names, and the pairs of them that training never shows together.

`scenes_concepts.csv` holds `hexcode, name, plural, alike`. Two concepts with the same word in `alike` (rooster and
chicken, house and hut) are easily confused: they are never swapped for each other, nor drawn in one scene.
"""

import csv
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations
from pathlib import Path
from zlib import crc32

TABLE = Path(__file__).resolve().parent / "scenes_concepts.csv"
ONE_PAIR_IN = 10  # one pair of concepts in this many is held out
NUMBERS = ("no", "one", "two", "three", "four")
# Words whose first sound differs from their first letter.
CONSONANTS = ("unicorn",)
VOWELS = ("hourglass",)


@dataclass(frozen=True)
class Concept:
    """A thing that can be drawn, and its English name."""

    hexcode: str
    name: str
    plural: str
    alike: str

    def named(self, count: int, adjective: str = "", number: str | None = None) -> str:
        """'a dog', 'an owl', 'a small owl', 'two small owls'; `number` takes the place of the article or numeral."""
        noun = " ".join(filter(None, (adjective, self.name if count == 1 else self.plural)))
        return f"{number or (article(noun) if count == 1 else NUMBERS[count])} {noun}"


def article(noun: str) -> str:
    """'a' or 'an'."""
    if noun.startswith(VOWELS):
        return "an"
    return "an" if noun[0].lower() in "aeiou" and not noun.startswith(CONSONANTS) else "a"


@lru_cache(maxsize=1)
def concept_table() -> dict[str, Concept]:
    """Every concept by its hexcode."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {row["hexcode"]: Concept(**row) for row in csv.DictReader(file)}


def confusable(first: str, second: str) -> bool:
    """Whether two concepts (hexcodes) are equal or easily confused."""
    table = concept_table()
    return first == second or bool(table[first].alike) and table[first].alike == table[second].alike


@cache
def is_held_out(first: str, second: str) -> bool:
    """Whether training never shows these two (hexcodes) together. Independent of their order and of any seed."""
    return crc32("|".join(sorted((first, second))).encode()) % ONE_PAIR_IN == 0


@cache
def held_out_pairs(concepts: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The pairs of these concepts that training never shows together."""
    pairs = combinations(sorted(concepts), 2)
    return tuple(pair for pair in pairs if is_held_out(*pair) and not confusable(*pair))
