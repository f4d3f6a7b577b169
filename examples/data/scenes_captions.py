"""English captions of a scene, from a small grammar, and hard captions: one thing changed, and no longer true."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scenes_concepts import NUMBERS, concept_table, confusable
from scenes_layout import COLOURS, Layout, pool
from scenes_statements import (
    OPPOSITE,
    PLACES,
    Phrase,
    Statement,
    background_claims,
    places_of,
    relations,
    truth,
)

SHORTEST, LONGEST = 8, 16  # words of a caption
# kind of hard caption: what was changed
KINDS = ("thing", "relation", "order", "size", "count", "place", "background")
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
ATTEMPTS = 40


@dataclass(frozen=True)
class Caption:
    """A text and the statement that it makes."""

    text: str
    statement: Statement


@dataclass(frozen=True)
class HardCaption:
    """A false text: caption number `of` with one thing changed, of a kind in `KINDS`."""

    text: str
    kind: str
    of: int
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
    """`number` true captions of 8 to 16 words, different where the scene gives so many."""
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
    # "a cow and a hammer at the top" would seem to place the cow too: what has no place comes last.
    phrases.sort(key=lambda phrase: phrase.place is None)
    return Statement(style, tuple(phrases), colour=colour, pattern=pattern)


class Teller:
    """Draws the phrases of one caption, which agree in whether they tell sizes and in how they say "a"."""

    def __init__(self, rng: random.Random, layout: Layout):
        self.rng = rng
        self.layout = layout
        self.sized = rng.random() < 0.7
        self.word = rng.choices((None, "one", "a single"), (0.8, 0.1, 0.1))[0]

    def phrase(self, number: int, place_told: float = 0.0) -> Phrase:
        """Group `number`, with its place at that probability."""
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
    # A second subject must stand so to the object, a second object so to every subject.
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


def draw_hard_captions(rng: random.Random, layout: Layout, captions: list[Caption], split: str) -> list[HardCaption]:
    """Of every kind that the captions allow, one false caption; which caption it is made from is drawn."""
    hard: list[HardCaption] = []
    for kind in KINDS:
        for of in rng.sample(range(len(captions)), len(captions)):
            statement = change(rng, kind, captions[of].statement, layout, split)
            if statement is not None and truth(statement, layout) is False:
                hard.append(HardCaption(write(statement), kind, of, statement))
                break
    return hard


def change(rng: random.Random, kind: str, statement: Statement, layout: Layout, split: str) -> Statement | None:
    """The statement with one thing changed; None if it has no such thing."""
    # Of the statement as a whole, or of any of its things.
    if kind == "thing":
        old = rng.choice(statement.phrases)
        return statement.with_phrase(old, replace(old, hexcode=draw_absent(rng, layout, split)))
    if kind == "relation":
        return replace(statement, relation=OPPOSITE[statement.relation]) if statement.relation else None
    if kind == "order":
        return (
            replace(statement, subjects=statement.objects, objects=statement.subjects) if statement.relation else None
        )
    if kind == "background":
        others = [name for name in COLOURS if name != statement.colour]
        return replace(statement, colour=rng.choice(others)) if statement.colour else None
    # The others change a phrase that tells a size, a count or a place.
    tells = {"size": "size", "place": "place", "count": "count"}[kind]
    phrases = [phrase for phrase in statement.phrases if getattr(phrase, tells) is not None]
    if not phrases:
        return None
    old = rng.choice(phrases)
    if kind == "size":
        new = replace(old, size="big" if old.size == "small" else "small")
    elif kind == "place":
        new = replace(old, place=rng.choice([place for place in PLACES if place != old.place]))
    else:
        count = rng.choice([count for count in range(1, len(NUMBERS)) if count != old.count])
        new = replace(old, count=count, word="a single" if count == 1 else None)
    return statement.with_phrase(old, new)


def draw_absent(rng: random.Random, layout: Layout, split: str) -> str:
    """A concept that is not in the scene, nor like one that is."""
    while True:
        hexcode = rng.choice(pool(split))
        if not any(confusable(hexcode, one) for one in layout.concepts):
            return hexcode
