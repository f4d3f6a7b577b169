"""English captions of a scene, from a small grammar."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from scenes_concepts import concept_table
from scenes_layout import Layout
from scenes_statements import (
    Phrase,
    Statement,
    background_claims,
    places_of,
    relations,
)

SHORTEST, LONGEST = 8, 16  # words of a caption
STYLES = ("plain", "picture", "there", "verb")
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below",),
}
PLACE_WORDS = {
    "left": "on the left",
    "right": "on the right",
    "middle": "in the middle",
    **{
        place: f"at the {place}" for place in ("top", "bottom", "top left", "top right", "bottom left", "bottom right")
    },
}
SINGLE = ((None, "one", "a single"), (0.8, 0.1, 0.1))  # determiner of one thing (None: "a"), and how often
ATTEMPTS = 40


@dataclass(frozen=True)
class Caption:
    """A text and the statement that it makes."""

    text: str
    statement: Statement


def write(statement: Statement) -> str:
    """The statement in English."""
    # Opening, subjects.
    words, style = [], statement.style
    subjects = [say(phrase) for phrase in statement.subjects]
    several = len(statement.subjects) > 1 or statement.subjects[0].count > 1
    verb = style == "verb" and statement.relation is not None
    if style == "picture":
        words.append("a picture of")
    elif style == "there" or (style == "verb" and not verb):
        words.append("there are" if statement.subjects[0].count > 1 else "there is")
    words.append(listed(subjects))
    # Relation and objects, others, background.
    if statement.relation:
        words += [
            ("are" if several else "is") if verb else "",
            RELATIONS[statement.relation][-1 if style == "plain" else 0],
        ]
        words.append(listed([say(phrase) for phrase in statement.objects]))
    if statement.others:
        words += ["with" if statement.relation else "and", listed([say(phrase) for phrase in statement.others])]
    if statement.colour:
        ground = " ".join(filter(None, (statement.pattern, statement.colour)))
        words.append(f"on {'an' if ground[0] in 'aeiou' else 'a'} {ground} background")
    return " ".join(filter(None, words))


def say(phrase: Phrase) -> str:
    """'a small dog at the top left'."""
    text = concept_table()[phrase.hexcode].named(phrase.count, phrase.size or "", phrase.word)
    return f"{text} {PLACE_WORDS[phrase.place]}" if phrase.place else text


def listed(items: list[str]) -> str:
    """'a, b and c'."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]


def draw_captions(rng: random.Random, layout: Layout, number: int) -> list[Caption]:
    """Up to `number` different true captions of 8 to 16 words."""
    captions: list[Caption] = []
    for _ in range(ATTEMPTS):
        if len(captions) == number:
            break
        statement = draw_statement(rng, layout)
        text = write(statement)
        fits = SHORTEST <= len(text.split()) <= LONGEST
        if fits and all(text != other.text for other in captions):
            captions.append(Caption(text, statement))
    return captions


def draw_statement(rng: random.Random, layout: Layout) -> Statement:
    """A true statement about a layout: one group and where it is, several in relation, or each at its place."""
    order = list(range(len(layout.groups)))
    rng.shuffle(order)
    style = rng.choice(STYLES)
    known = relations(layout)
    colour, pattern = background_claims(layout.background)
    pattern = pattern if rng.random() < 0.6 else None
    if rng.random() >= (0.75 if len(order) == 1 else 0.35):
        colour = pattern = None

    # One group alone; groups in relation; groups each at its place.
    teller = Teller(rng, layout)
    if len(order) == 1:
        return Statement(style, (teller.phrase(0, 0.8),), colour=colour, pattern=pattern)
    if known and rng.random() < 0.7:
        subjects, relation, objects, others = _related_groups(rng, order, known)
        return Statement(
            style,
            tuple(map(teller.phrase, subjects)),
            relation,
            tuple(map(teller.phrase, objects)),
            tuple(teller.phrase(number, 1.0) for number in others),
            colour,
            pattern,
        )
    told = order[: rng.choice((2, 2, 3) if len(order) < 4 else (2, 3, 4))]
    placed = rng.choice((0.0, 0.9, 0.9)) if len(told) < 4 else 0.0
    phrases = [teller.phrase(number, placed) for number in told]
    # "a cow and a hammer at the top" would seem to place the cow too: phrases without a place come last.
    phrases.sort(key=lambda phrase: phrase.place is None)
    return Statement(style, tuple(phrases), colour=colour, pattern=pattern)


class Teller:
    """Draws the phrases of one caption, which share whether sizes may be given and the determiner of single things."""

    def __init__(self, rng: random.Random, layout: Layout):
        self.rng = rng
        self.layout = layout
        self.sized = rng.random() < 0.7
        self.word = rng.choices(*SINGLE)[0]

    def phrase(self, number: int, place_told: float = 0.0) -> Phrase:
        """Group `number`, with its place at probability `place_told`."""
        group = self.layout.groups[number]
        places = places_of(group) if self.rng.random() < place_told else ()
        place = self.rng.choice(places) if places else None
        size = group.size if self.sized and self.rng.random() < 0.75 else None
        return Phrase(group.hexcode, group.count, size, place, self.word if group.count == 1 else None)


def _related_groups(
    rng: random.Random, order: list[int], known: Sequence[tuple[int, str, int]]
) -> tuple[list[int], str, list[int], list[int]]:
    """(subjects, relation, objects, others): one or two groups in relation to one or two, and perhaps one more."""
    first, relation, second = rng.choice(known)
    subjects, objects = [first], [second]
    # A second subject must be in the same relation to the object, a second object to every subject.
    rest = [number for number in order if number not in (first, second)]
    more = [number for number in rest if (number, relation, second) in known]
    if more and rng.random() < 0.4:
        subjects.append(more[0])
        rest.remove(more[0])
    more = [number for number in rest if all((one, relation, number) in known for one in subjects)]
    if more and rng.random() < 0.4:
        objects.append(more[0])
        rest.remove(more[0])
    return subjects, relation, objects, rest[: rng.choice((0, 1))]
