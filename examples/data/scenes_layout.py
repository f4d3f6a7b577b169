"""Layouts: the contents of a scene and their places, before drawing. A pure function of (seed, split, index).

A scene holds one to four groups; a group is one to four things of one concept, big or small, in one drawing style.
Lengths are shares of the image's side, boxes are (x, y, width, height).
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from scenes_concepts import confusable, held_out_pairs, is_held_out
from scenes_sprites import Sprite, load_sprites

# split -> its sprites; "seen" has other scenes with the contents of training, "unseen_pairs" a held-out pair in each
SPLITS = {
    "train": "train",
    "seen": "train",
    "unseen_pairs": "train",
    "unseen_style": "unseen_style",
    "unseen_concepts": "unseen_concepts",
}
SIZES = {"small": (0.22, 0.25, 0.28), "big": (0.42, 0.46, 0.5, 0.54)}  # the longer side of a thing
GROUPS = ((1, 2, 3, 4), (0.15, 0.45, 0.25, 0.15))  # numbers of groups, and how often
COUNTS = {1: (0.4, 0.25, 0.2, 0.15), 2: (0.65, 0.15, 0.12, 0.08), 3: (0.75, 0.15, 0.1, 0.0), 4: (0.85, 0.15, 0.0, 0.0)}
MOST_THINGS = 6
COLOURS = {
    "white": (252, 252, 252),
    "gray": (196, 198, 202),
    "yellow": (255, 240, 140),
    "orange": (255, 196, 128),
    "pink": (255, 192, 214),
    "green": (172, 226, 158),
    "blue": (158, 204, 252),
    "purple": (206, 180, 246),
}
PATTERNS = (("plain", "fading", "striped", "dotted"), (0.5, 0.2, 0.15, 0.15))
CONTRAST = 60.0  # minimum Euclidean distance in RGB between a thing's rim and the background
TRIES = 40

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Background:
    """A colour of `COLOURS`, a pattern of `PATTERNS`, the painted shade, and the direction of the pattern."""

    colour: str
    pattern: str
    shade: tuple[int, int, int]
    turn: int


@dataclass(frozen=True, eq=False)
class Group:
    """Things of one concept, with the same drawing, size and orientation."""

    sprite: Sprite
    size: str
    flipped: bool
    boxes: tuple[Box, ...]

    @property
    def hexcode(self) -> str:
        return self.sprite.hexcode

    @property
    def count(self) -> int:
        return len(self.boxes)

    @cached_property
    def hull(self) -> Box:
        """The smallest box around all of its things."""
        left, top = min(box[0] for box in self.boxes), min(box[1] for box in self.boxes)
        right, bottom = max(box[0] + box[2] for box in self.boxes), max(box[1] + box[3] for box in self.boxes)
        return left, top, right - left, bottom - top


@dataclass(frozen=True, eq=False)
class Layout:
    """Groups, painted in this order, on a background."""

    groups: tuple[Group, ...]
    background: Background

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(group.hexcode for group in self.groups)


def generator(purpose: str, seed: int, split: str, index: int) -> random.Random:
    """A separate random generator for each purpose, so that captions do not depend on how places are drawn."""
    return random.Random(f"{purpose} {seed} {split} {index}")


@cache
def pool(split: str) -> tuple[str, ...]:
    """The concepts (hexcodes) of a split.

    Raises:
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    seen = load_sprites(SPLITS[split])
    return tuple(hexcode for hexcode in seen if split != "unseen_style" or hexcode in load_sprites("train"))


def draw_layout(seed: int, split: str, index: int, groups: int | None = None) -> Layout:
    """What scene `index` of a split shows.

    Args:
        groups: how many groups; random if None.
    """
    rng = generator("layout", seed, split, index)
    number = groups or rng.choices(*GROUPS)[0]
    concepts = draw_concepts(rng, split, number)
    sprites = [rng.choice(load_sprites(SPLITS[split])[hexcode]) for hexcode in concepts]
    # Groups may be too big to fit: after three failed attempts, each is one small thing.
    attempt = 0
    while (placed := _place(rng, sprites, calm=attempt >= 3)) is None:
        attempt += 1
    return Layout(placed, draw_background(rng, sprites))


def draw_concepts(rng: random.Random, split: str, number: int) -> tuple[str, ...]:
    """Different concepts that may occur together in this split; "unseen_pairs" has a held-out pair first."""
    # The first concept, or the held-out pair.
    if split == "unseen_pairs":
        number = max(number, 2)
        pairs = held_out_pairs(pool(split))
        chosen = list(pairs[rng.randrange(len(pairs))])
        rng.shuffle(chosen)
    else:
        chosen = [rng.choice(pool(split))]
    # The rest, by rejection: nine of ten pairs are allowed.
    while len(chosen) < number:
        other = rng.choice(pool(split))
        if all(may_meet(split, other, one) for one in chosen):
            chosen.append(other)
    return tuple(chosen)


def may_meet(split: str, first: str, second: str) -> bool:
    """Whether two concepts may occur in one scene: not easily confused, and no held-out pair if the split has none."""
    if confusable(first, second):
        return False
    return split in ("unseen_pairs", "unseen_concepts") or not is_held_out(first, second)


def draw_background(rng: random.Random, sprites: list[Sprite]) -> Background:
    """A colour that contrasts with the rim of every thing; the one with the most contrast if there is none."""
    # Colours in random order, each with a slightly different shade.
    names = list(COLOURS)
    rng.shuffle(names)
    shades = {name: tuple(min(255, c + rng.randint(-9, 9)) for c in COLOURS[name]) for name in names}

    def contrast(name: str) -> float:
        return min(math.dist(sprite.rim, shades[name]) for sprite in sprites)

    colour = next((name for name in names if contrast(name) >= CONTRAST), None) or max(names, key=contrast)
    return Background(colour, rng.choices(*PATTERNS)[0], shades[colour], rng.randrange(2))


def _place(rng: random.Random, sprites: list[Sprite], calm: bool) -> tuple[Group, ...] | None:
    """The groups, each with its things; None if one does not fit. `calm`: one small thing each."""
    overlap = 0.0 if rng.random() < 0.6 else rng.uniform(0.05, 0.3)
    groups: list[Group] = []
    hulls: list[Box] = []
    total = 0
    for place, sprite in enumerate(sprites):
        # Number and size: three and more things are small, and so are two if there are more than two groups.
        room = MOST_THINGS - total - (len(sprites) - place - 1)
        count = 1 if calm else min(room, rng.choices((1, 2, 3, 4), COUNTS[len(sprites)])[0])
        total += count
        big_fits = count == 1 or (count == 2 and len(sprites) <= 2)
        size = "big" if big_fits and not calm and rng.random() < 0.5 else "small"
        group = find_place(rng, sprite, size, count, hulls, overlap)
        if group is None:
            return None
        groups.append(group)
        hulls.append(group.hull)
    return tuple(groups)


def find_place(
    rng: random.Random, sprite: Sprite, size: str, count: int, hulls: Sequence[Box], overlap: float
) -> Group | None:
    """A group that shares at most `overlap` with any of the hulls, facing either way; None if it does not fit."""
    # Its things at the origin, then random places until it overlaps no other group too much.
    offsets = _cluster(rng, sprite, size, count)
    width = max(box[0] + box[2] for box in offsets)
    height = max(box[1] + box[3] for box in offsets)
    for _ in range(TRIES):
        hull = (rng.uniform(0, 1 - width), rng.uniform(0, 1 - height), width, height)
        if all(shared(hull, other) <= overlap for other in hulls):
            boxes = tuple((hull[0] + x, hull[1] + y, w, h) for x, y, w, h in offsets)
            return Group(sprite, size, rng.random() < 0.5, boxes)
    return None


def _cluster(rng: random.Random, sprite: Sprite, size: str, count: int) -> list[Box]:
    """Boxes of a group's things, with its upper left corner at the origin: a slightly uneven row, column or square."""
    # Two big things side by side must fit into the image.
    side = rng.choice(SIZES[size][:2] if size == "big" and count > 1 else SIZES[size])
    width, height = (side, side / sprite.aspect) if sprite.aspect >= 1 else (side * sprite.aspect, side)
    gap = rng.uniform(0.03, 0.04 if size == "big" else 0.06)
    columns = rng.choice({1: (1,), 2: (1, 2), 3: (1, 2, 3), 4: (2,)}[count])
    return [
        (
            number % columns * (width + gap) + rng.uniform(0, 0.01),
            number // columns * (height + gap) + rng.uniform(0, 0.01),
            width,
            height,
        )
        for number in range(count)
    ]


def shared(first: Box, second: Box) -> float:
    """The area that two boxes share, divided by that of the smaller one."""
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min(first[2] * first[3], second[2] * second[3])
