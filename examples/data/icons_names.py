"""Selects icons and parses their names: `bell-off-outline-24` is "bell off", drawn in outline.

A concept is the sorted words of a name, without style, pixel size and numbers that only distinguish alternates: icons
of one concept are positives of each other, within a set and across sets.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

# Reserved for other measurements: never opened, neither here nor by a person.
RESERVED = ("hugeicons", "healthicons", "keyline-icons")
RESERVED_PREFIX = "streamline"
RESERVED_AUTHOR = "Streamline"  # two smaller sets, `covid` and `guidance`, are by the same author
PERMISSIVE = (
    "MIT", "Apache-2.0", "ISC", "BSD-3-Clause", "Unlicense", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "OFL-1.1",
)  # fmt: skip
CATEGORIES_LEFT_OUT = {
    "Emoji": "emoji, embedded elsewhere with their splits",
    "Logos": "trademarks, which no words describe",
    "Programming": "mostly products' names",
}
SETS_LEFT_OUT = {name: "country codes for names" for name in ("flag", "circle-flags", "flagpack", "cif")} | {
    name: CATEGORIES_LEFT_OUT["Logos"] for name in ("fa6-brands", "fa-brands")
}
ANIMATED = "Contains Animations"
# Whole sets that training never shows: all sets of pixel art, one in flat colours, three in crayon, three more.
UNSEEN_SETS = (
    "dinkie-icons", "memory", "picon", "pixel", "pixelarticons", "flat-color-icons",
    "pepicons-pencil", "pepicons-pop", "pepicons-print", "carbon", "clarity", "iconoir",
)  # fmt: skip
ONE_NAME_IN = 40  # one concept in this many is held out, in every set

# Word -> drawing style.
STYLES = {
    "outline": "outline", "outlined": "outline", "line": "outline", "linear": "outline", "stroke": "outline",
    "o": "outline", "filled": "filled", "fill": "filled", "solid": "filled", "f": "filled", "duotone": "duotone",
    "twotone": "duotone", "duo": "duotone", "bold": "bold", "thin": "thin", "light": "light", "sharp": "sharp",
    "rounded": "rounded", "round": "rounded", "broken": "broken",
}  # fmt: skip
IN_LABELS = STYLES | {"tone": "duotone"}  # "Two-Tone"
ALWAYS_STYLE = ("outline", "outlined", "filled", "solid", "duotone", "twotone")  # the others may also name things
COMMON = 0.1  # a word is a style of a set, declared or not, if more than this share of its names end in it
PIXELS = ("10", "12", "14", "15", "16", "20", "24", "28", "32", "48", "96")
NUMERALS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ALTERNATES = ("alt", "variant", "new", "simple", "small", "minimalistic", "v2", *NUMERALS)
# Words after which a number has a meaning.
COUNTED = frozenset(
    "number numeric counter dice filter looks level rating signal clock time hours h heading step play forward replay "
    "rewind column columns row rows grid cellular square circle hexagon box numbers digit timer".split()
)


@dataclass(frozen=True)
class Name:
    """A parsed name.

    Attributes:
        style: "outline", "filled", "bold duotone" and so on; "" if neither the name nor its set gives one.
        drawing: the name without its pixel size: several sizes are one drawing.
        pixels: the pixel size, 0 if not given.
    """

    words: tuple[str, ...]
    style: str
    drawing: str
    pixels: int

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def concept(self) -> str:
        return concept_of(self.words)


def concept_of(words: Iterable[str]) -> str:
    """One name for the same words in any order: "circle-user" and "user-circle"."""
    return "-".join(sorted(words))


def is_held_out(concept: str) -> bool:
    """Whether training shows no icon of this concept and no caption that names it. Independent of any seed."""
    return crc32(concept.encode()) % ONE_NAME_IN == 0


def is_reserved(name: str, facts: Mapping[str, Any]) -> bool:
    """Whether a set must not be opened."""
    author = facts.get("author", {}).get("name")
    return name in RESERVED or name.startswith(RESERVED_PREFIX) or author == RESERVED_AUTHOR


def why_left_out(name: str, facts: Mapping[str, Any]) -> str | None:
    """Why a set is left out, according to its entry in collections.json; None if it is used."""
    licence = facts["license"].get("spdx", facts["license"]["title"])
    category = facts.get("category")
    if is_reserved(name, facts):
        return "reserved"
    if licence not in PERMISSIVE:
        return f"licence {licence}"
    if facts.get("hidden"):
        return "deprecated set"
    if category in CATEGORIES_LEFT_OUT:
        return CATEGORIES_LEFT_OUT[category]
    if ANIMATED in facts.get("tags", ()):
        return "animated"
    return SETS_LEFT_OUT.get(name)


@dataclass
class Naming:
    """How one set names its icons.

    Args:
        names: the names of all its icons.
        prefixes, suffixes: the styles that the set declares, each with a label; "" stands for names without one.
    """

    names: Iterable[str]
    prefixes: Mapping[str, str] = field(default_factory=dict)
    suffixes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Longest first, so that "outline-sharp" is not read as "sharp".
        self._starts = sorted(filter(None, self.prefixes), key=len, reverse=True)
        self._ends = sorted(filter(None, self.suffixes), key=len, reverse=True)
        last = Counter(name.rpartition("-")[2] for name in self.names)
        self._sized = 2 * sum(last[size] for size in PIXELS) > last.total()
        # Styles that the set has, declared or not.
        stems = [self._declared(name)[0] for name in self.names]
        last = Counter(stem.rpartition("-")[2] for stem in stems)
        self._styles = {word for word in STYLES if word in ALWAYS_STYLE or last[word] > COMMON * len(stems)}
        self._stems = set(stems)

    def read(self, name: str) -> Name | None:
        """Parses a name; None if it contains no word."""
        stem, said, pixels = self._declared(name)
        tokens = stem.split("-")
        styles = said.split()
        drawing = name.removesuffix(f"-{pixels}") if pixels else name
        drawing = re.sub(rf"-{pixels}-", "-", drawing) if pixels else drawing
        # Undeclared styles: those of the set, and others if the set also has the name without them.
        while len(tokens) > 1 and tokens[-1] in STYLES:
            if tokens[-1] not in self._styles and "-".join(tokens[:-1]) not in self._stems:
                break
            styles.append(STYLES[tokens.pop()])
        words = tuple(filter(None, self._without_alternate(tokens)))
        if not any(re.search("[a-z]{2}", word) for word in words):
            return None
        return Name(words, " ".join(sorted(set(styles))), drawing, int(pixels or 0))

    def _declared(self, name: str) -> tuple[str, str, str]:
        """A name without its declared prefix or suffix, the declared style, and the pixel size."""
        label = self.suffixes.get("", "") or self.prefixes.get("", "")
        start = next((one for one in self._starts if name.startswith(f"{one}-")), None)
        if start is not None:
            name, label = name[len(start) + 1 :], self.prefixes[start]
        end = next((one for one in self._ends if name.endswith(f"-{one}")), None)
        if end is not None:
            name, label = name[: -len(end) - 1], self.suffixes[end]
        # The size is part of the suffix ("24-filled"), or at the end of most names of the set.
        pixels = next((part for part in (end or "").split("-") if part in PIXELS), "")
        if not pixels and self._sized and name.rpartition("-")[2] in PIXELS:
            name, _, pixels = name.rpartition("-")
        return name, style_of(label), pixels

    def _without_alternate(self, tokens: list[str]) -> list[str]:
        """The tokens without numbers or words that only distinguish drawings of the same thing."""
        tokens = list(tokens)
        # "boulder2" beside "boulder"
        glued = re.fullmatch(r"([a-z]{3,})(\d{1,2})", tokens[-1])
        if glued and "-".join([*tokens[:-1], glued[1]]) in self._stems:
            tokens[-1:] = glued.groups()
        while len(tokens) > 1 and (tokens[-1].isdigit() or tokens[-1] in ALTERNATES):
            base = "-".join(tokens[:-1])
            siblings = (base, f"{base}-1", f"{base}-01", f"{base}-one", f"{base}-2", f"{base}2")
            if tokens[-2] in COUNTED or not any(one in self._stems for one in siblings):
                break
            tokens.pop()
        return tokens


def style_of(label: str) -> str:
    """The style that a label such as "BoldDuotone", "24 Filled" or "Outline 24x24" names; "" for "Regular"."""
    words = re.findall("[A-Z]?[a-z]+", label)
    return " ".join(sorted({IN_LABELS[word.lower()] for word in words if word.lower() in IN_LABELS}))
