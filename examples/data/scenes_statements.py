"""Statements about a scene, and whether they are true: what captions are written from and hard captions are made by.

`truth` knows three answers: True and False are beyond dispute, None is where two people might differ (a thing that is
a little left of another and far above it; a group near the middle of the picture).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from scenes_layout import Background, Box, Group, Layout

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
APART = 0.12  # least distance of centres, along the axis that a relation is about
SLANT = 0.6  # and its least ratio to the distance across
# place -> where its centre lies along x and y: -1 first third, 0 middle, 1 last third, None anywhere
PLACES = {
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
    "left": (-1, None),
    "right": (1, None),
    "top": (None, -1),
    "bottom": (None, 1),
    "middle": (0, 0),
}
EDGE, OTHER_SIDE, MIDDLE = 0.37, 0.5, 0.09


@dataclass(frozen=True)
class Phrase:
    """Things spoken of: `count` of one concept; `size` and `place` if they are told. `word` replaces the article."""

    hexcode: str
    count: int
    size: str | None = None
    place: str | None = None
    word: str | None = None


@dataclass(frozen=True)
class Statement:
    """`subjects` [stand in `relation` to `objects`], [with `others`], [on a background]; all of it is claimed.

    Attributes:
        style: which of the grammar's forms says it.
        colour, pattern: of the background, where they are told.
    """

    style: str
    subjects: tuple[Phrase, ...]
    relation: str | None = None
    objects: tuple[Phrase, ...] = ()
    others: tuple[Phrase, ...] = ()
    colour: str | None = None
    pattern: str | None = None

    @property
    def phrases(self) -> tuple[Phrase, ...]:
        return self.subjects + self.objects + self.others

    def with_phrase(self, old: Phrase, new: Phrase) -> "Statement":
        """The same with another phrase in one's place."""
        parts = ("subjects", "objects", "others")
        return replace(self, **{part: tuple(new if p is old else p for p in getattr(self, part)) for part in parts})


def truth(statement: Statement, layout: Layout) -> bool | None:
    """Whether the statement holds of the layout; None if it is open to dispute. Numbers are exact."""
    # Each thing: is it there, as many, of that size, at that place?
    found = {group.hexcode: group for group in layout.groups}
    answers: list[bool | None] = []
    for phrase in statement.phrases:
        group = found.get(phrase.hexcode)
        if group is None:
            return False
        answers.append(group.count == phrase.count and phrase.size in (None, group.size))
        if phrase.place is not None:
            answers.append(stands_at(group, phrase.place))
    # Every subject to every object.
    if statement.relation is not None:
        answers += [
            related(found[one.hexcode], statement.relation, found[other.hexcode])
            for one in statement.subjects
            for other in statement.objects
        ]
    # The background.
    answers.append(statement.colour in (None, layout.background.colour))
    answers.append(statement.pattern in (None, layout.background.pattern))
    return _all(answers)


def related(one: Group, relation: str, other: Group) -> bool | None:
    """Whether all things of a group stand "left", "right", "above" or "below" all of another's."""
    answers = [_beside(box, relation, beside) for box in one.boxes for beside in other.boxes]
    return _all(answers) if any(answer is not False for answer in answers) else False


@lru_cache(maxsize=256)
def relations(layout: Layout) -> tuple[tuple[int, str, int], ...]:
    """(group, relation, group) of everything that is beyond dispute."""
    numbers = range(len(layout.groups))
    return tuple(
        (i, relation, j)
        for i in numbers
        for j in numbers
        for relation in OPPOSITE
        if i != j and related(layout.groups[i], relation, layout.groups[j])
    )


def stands_at(group: Group, place: str) -> bool | None:
    """Whether all things of a group stand at a place of the picture."""
    x, y, width, height = group.hull
    answers = [
        _in_third(middle, third)
        for middle, third in zip((x + width / 2, y + height / 2), PLACES[place], strict=True)
        if third is not None
    ]
    return _all(answers)


@lru_cache(maxsize=1024)
def places_of(group: Group) -> tuple[str, ...]:
    """The places where it stands beyond dispute."""
    return tuple(place for place in PLACES if stands_at(group, place))


def background_claims(background: Background) -> tuple[str, str | None]:
    """Colour and, where it has a name, pattern."""
    return background.colour, background.pattern if background.pattern in ("striped", "dotted") else None


def _beside(one: Box, relation: str, other: Box) -> bool | None:
    axis = 0 if relation in ("left", "right") else 1
    ahead = -1 if relation in ("left", "above") else 1
    # Along the axis of the relation, and across it.
    centres = [(box[axis] + box[axis + 2] / 2, box[1 - axis] + box[3 - axis] / 2) for box in (one, other)]
    along = (centres[0][0] - centres[1][0]) * ahead
    across = abs(centres[0][1] - centres[1][1])
    if along <= -APART:
        return False
    return True if along >= APART and along >= SLANT * across else None


def _in_third(middle: float, third: int) -> bool | None:
    if third == 0:
        return True if abs(middle - 0.5) <= MIDDLE else (False if abs(middle - 0.5) > 2 * MIDDLE else None)
    # The last third is the first one seen in a mirror.
    middle = middle if third < 0 else 1 - middle
    return True if middle <= EDGE else (False if middle >= OTHER_SIDE else None)


def _all(answers: list[bool | None]) -> bool | None:
    if False in answers:
        return False
    return None if None in answers else True
