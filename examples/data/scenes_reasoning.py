"""Sentences about two images, as in NLVR2: for each pair of images, a true one and a false one.

Both sentences of a pair have the same form and refer to the same images, so that text alone gives nothing away.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from scenes_captions import RELATIONS, say
from scenes_concepts import NUMBERS, concept_table
from scenes_hard import draw_absent
from scenes_layout import COLOURS, Group, Layout, draw_layout, generator
from scenes_queries import QUERY_KINDS, modify, redraw
from scenes_statements import OPPOSITE, Phrase, relations

SIDES = ("left", "right")
SPELT = (*NUMBERS, "five", "six", "seven", "eight")
ALIKE = 0.7  # how often the second image is the first with one change


@dataclass(frozen=True)
class Pair:
    """Two layouts, and a true and a false sentence of one form about them."""

    pictures: tuple[Layout, Layout]
    true: str
    false: str
    form: str


def draw_pair(seed: int, split: str, index: int) -> Pair:
    """Pair `index` of a split: a pure function, like `scene`."""
    rng = generator("reasoning", seed, split, index)
    while True:
        # Two scenes, mostly alike.
        first = draw_layout(rng.getrandbits(32), split, index)
        second = draw_layout(rng.getrandbits(32), split, index)
        if rng.random() < ALIKE:
            changed = modify(rng, rng.choice(QUERY_KINDS), first, split)
            second = redraw(rng, first if changed is None else changed.after, split)
        pictures = (first, second) if rng.random() < 0.5 else (second, first)

        # One form that allows both a true and a false sentence.
        absent = draw_absent(rng, Layout(first.groups + second.groups, first.background), split)
        said: dict[str, dict[bool, list[str]]] = {}
        for form, sentence, true in _sentences(rng, pictures, absent):
            said.setdefault(form, {True: [], False: []})[true].append(sentence)
        forms = [form for form, sentences in said.items() if sentences[True] and sentences[False]]
        if forms:
            form = rng.choice(forms)
            return Pair(pictures, rng.choice(said[form][True]), rng.choice(said[form][False]), form)


def _sentences(rng: random.Random, pictures: tuple[Layout, Layout], absent: str) -> Iterator[tuple[str, str, bool]]:
    """Yields (form, sentence, whether it is true) about the things of both images and one absent thing."""
    found = [{group.hexcode: group for group in picture.groups} for picture in pictures]
    # Only numbers that occur here: a number that is often false would give itself away.
    shown = {*found[0], *found[1]}
    counts = {hexcode: [one[hexcode].count for one in found if hexcode in one] for hexcode in sorted(shown)}
    numbers = [count for each in counts.values() for count in each]
    totals = [sum(each) for each in counts.values()]
    # Sentences about each thing, about the backgrounds, about each image.
    for hexcode in sorted({*shown, absent}):
        groups = tuple(one.get(hexcode) for one in found)
        yield from _of_presence(hexcode, groups, numbers)
        yield from _of_numbers(hexcode, groups, totals)
        if all(groups):
            yield from _of_sizes(hexcode, groups)
    yield from _of_backgrounds(pictures)
    for side, picture in zip(SIDES, pictures, strict=True):
        yield from _of_relations(rng, side, picture)


def _of_presence(
    hexcode: str, groups: tuple[Group | None, ...], numbers: list[int]
) -> Iterator[tuple[str, str, bool]]:
    thing = concept_table()[hexcode]
    shown = sum(group is not None for group in groups)
    yield "both", f"both pictures show at least one {thing.name}", shown == 2
    yield "one", f"exactly one of the pictures shows {thing.named(1)}", shown == 1
    yield "none", f"neither of the pictures shows {thing.named(1)}", shown == 0
    for side, group in zip(SIDES, groups, strict=True):
        for count in numbers:
            phrase = say(Phrase(hexcode, count, word="a single" if count == 1 else None))
            yield "side", f"the {side} picture shows {phrase}", group is not None and group.count == count


def _of_numbers(hexcode: str, groups: tuple[Group | None, ...], totals: list[int]) -> Iterator[tuple[str, str, bool]]:
    thing = concept_table()[hexcode]
    counts = [group.count if group else 0 for group in groups]
    for total in totals:
        are = "is" if total == 1 else "are"
        noun = thing.name if total == 1 else thing.plural
        yield "total", f"there {are} {SPELT[total]} {noun} in the two pictures together", sum(counts) == total
    for side, more in zip(SIDES, (counts[0] > counts[1], counts[1] > counts[0]), strict=True):
        other = SIDES[1 - SIDES.index(side)]
        yield "more", f"there are more {thing.plural} in the {side} picture than in the {other} one", more


def _of_sizes(hexcode: str, groups: tuple[Group | None, ...]) -> Iterator[tuple[str, str, bool]]:
    thing = concept_table()[hexcode]
    if groups[0].size == groups[1].size or groups[0].count != groups[1].count:
        return
    noun, are = (thing.name, "is") if groups[0].count == 1 else (thing.plural, "are")
    for side, group in zip(SIDES, groups, strict=True):
        yield "bigger", f"the {noun} {are} bigger in the {side} picture", group.size == "big"


def _of_backgrounds(pictures: tuple[Layout, Layout]) -> Iterator[tuple[str, str, bool]]:
    colours = [picture.background.colour for picture in pictures]
    for colour in COLOURS:
        yield "only", f"only one of the pictures has a background that is {colour}", colours.count(colour) == 1
        yield "ground", f"both pictures have a background that is {colour}", colours.count(colour) == 2


def _of_relations(rng: random.Random, side: str, picture: Layout) -> Iterator[tuple[str, str, bool]]:
    known = relations(picture)
    if not known:
        return
    first, relation, second = rng.choice(known)
    one, other = picture.groups[first], picture.groups[second]
    are = "is" if one.count == 1 else "are"
    for true in (True, False):
        words = RELATIONS[relation if true else OPPOSITE[relation]][0]
        told, beside = (say(Phrase(group.hexcode, group.count)) for group in (one, other))
        yield "beside", f"in the {side} picture {told} {are} {words} {beside}", true
