"""Reads captions of scenes as a person would, and checks them against boxes and pixels; shares no code with them.

What is compared: names, numbers and sizes with the boxes of things, relations and places with their middles, the
colour of the background with the picture's pixels.
"""

import csv
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SCENES = Path(__file__).resolve().parents[1] / "examples" / "data"
NUMBERS = {"a": 1, "an": 1, "one": 1, "a single": 1, "two": 2, "three": 3, "four": 4}
RELATION = re.compile(r" (?:(?:is|are) )?(to the left of|left of|to the right of|right of|above|below) ")
GROUND = re.compile(r" on an? (?:(striped|dotted) )?(\w+) background$")
PLACE = re.compile(
    r" (?:(?:at|on|in) the (top left|top right|bottom left|bottom right|left|right|top|bottom|middle))$"
)
PHRASE = re.compile(r"^(a single|an|a|one|two|three|four) (?:(big|small) )?(.+)$")
RGB = {
    "white": (252, 252, 252),
    "gray": (196, 198, 202),
    "yellow": (255, 240, 140),
    "orange": (255, 196, 128),
    "pink": (255, 192, 214),
    "green": (172, 226, 158),
    "blue": (158, 204, 252),
    "purple": (206, 180, 246),
}


@dataclass
class Seen:
    """What a picture shows: boxes by name of thing, the picture itself, and how its background is painted."""

    boxes: dict[str, list[tuple[int, int, int, int]]]
    image: Image.Image
    pattern: str

    @classmethod
    def of(cls, scene: Any) -> "Seen":
        boxes: dict[str, list] = {}
        for thing in scene.objects:
            boxes.setdefault(thing.name, []).append(tuple(thing.box))
        return cls(boxes, scene.image, scene.layout.background.pattern)


def digest(scene: Any) -> str:
    """Of all that is told of a scene, and of its pixels."""
    known = [[caption.text for caption in scene.captions], [hard.text for hard in scene.hard]]
    known += [[thing.box for thing in scene.objects], scene.relations]
    return hashlib.sha256(json.dumps(known).encode() + scene.image.tobytes()).hexdigest()


def names() -> dict[str, tuple[str, bool]]:
    """Every singular and plural: (the singular, whether it is a plural)."""
    with (SCENES / "scenes_concepts.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    known = {row["plural"]: (row["name"], True) for row in rows}
    return known | {row["name"]: (row["name"], row["name"] == row["plural"]) for row in rows}


NAMES = names()


def wrong(text: str, seen: Seen) -> list[str]:
    """What the text says that is not so; nothing of a true caption."""
    text = re.sub(r"^(a picture of|there is|there are) ", "", text)
    faults = []
    if ground := GROUND.search(text):
        text = text[: ground.start()]
        if ground[2] not in colours(seen) or ground[1] not in (None, seen.pattern):
            faults.append(f"background {ground[0]}")
    relation = RELATION.search(text)
    if relation is None:
        for phrase in split(text):
            faults += read(phrase, seen)[1]
        return faults
    before, after = text[: relation.start()], text[relation.end() :]
    after, _, others = after.partition(" with ")
    for phrase in split(others):
        faults += read(phrase, seen)[1]
    for first in split(before):
        for second in split(after):
            one, one_faults = read(first, seen)
            other, other_faults = read(second, seen)
            faults += one_faults + other_faults
            if one and other and not stand(one, relation[1].split()[-2 if "of" in relation[1] else -1], other):
                faults.append(f"{first} {relation[1]} {second}")
    return faults


def split(text: str) -> list[str]:
    """'a, b and c' -> a, b, c."""
    return [part for part in re.split(r", | and ", text) if part]


def read(phrase: str, seen: Seen) -> tuple[list, list[str]]:
    """The boxes that a phrase speaks of, and what it says wrong of them."""
    place = PLACE.search(phrase)
    if place:
        phrase = phrase[: place.start()]
    match = PHRASE.match(phrase)
    assert match, f"cannot read {phrase!r}"
    number, size, noun = NUMBERS[match[1]], match[2], match[3]
    assert noun in NAMES, f"no thing is called {noun!r}"
    name, plural = NAMES[noun]
    assert plural or number == 1, f"{phrase!r}: a plural is missing"
    assert number > 1 or noun == name, f"{phrase!r}: not one thing"
    if match[1] in ("a", "an"):
        following = size or noun
        assert (match[1] == "an") == sounds_like_a_vowel(following), f"{phrase!r}: the article"
    boxes = seen.boxes.get(name, [])
    faults = [] if len(boxes) == number else [f"{phrase}: {len(boxes)} are there"]
    side = seen.image.width
    if boxes and size and any((max(box[2:]) > 0.35 * side) != (size == "big") for box in boxes):
        faults.append(f"{phrase}: not {size}")
    if boxes and place and not lies(boxes, place[1], side):
        faults.append(f"{phrase}: not {place[1]}")
    return boxes, faults


def sounds_like_a_vowel(word: str) -> bool:
    return word == "hourglass" or (word[0].lower() in "aeiou" and word != "unicorn")


def stand(one: list, relation: str, other: list) -> bool:
    """Whether every middle of the first lies to that side of every middle of the second."""
    axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    return all((middle(a)[axis] - middle(b)[axis]) * sign > 0 for a in one for b in other)


def lies(boxes: list, place: str, side: int) -> bool:
    """Whether the middle of all the boxes lies there."""
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    x, y = (left + right) / 2 / side, (top + bottom) / 2 / side
    if place == "middle":
        return abs(x - 0.5) < 0.15 and abs(y - 0.5) < 0.15
    tests = {"left": x < 0.45, "right": x > 0.55, "top": y < 0.45, "bottom": y > 0.55}
    return all(tests[word] for word in place.split())


def middle(box: tuple) -> tuple[float, float]:
    return box[0] + box[2] / 2, box[1] + box[3] / 2


def colours(seen: Seen) -> list[str]:
    """The colours that the background may be called, by the pixels outside of all boxes."""
    pixels = np.asarray(seen.image).astype(float)
    free = np.ones(pixels.shape[:2], bool)
    for boxes in seen.boxes.values():
        for x, y, width, height in boxes:
            free[y : y + height, x : x + width] = False
    ground = np.median(pixels[free], 0)
    # A fading ground is lighter than its colour in places, a striped or dotted one darker.
    lightest = {"fading": 34, "plain": 0}.get(seen.pattern, 0)
    darkest = {"striped": -26, "dotted": -26}.get(seen.pattern, 0)
    light = np.arange(darkest, lightest + 1)[:, None]
    shades = {name: np.minimum(np.array(rgb) + light, 255) for name, rgb in RGB.items()}
    return [name for name, shade in shades.items() if np.abs(shade - ground).max(1).min() <= 10]
