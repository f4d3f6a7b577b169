"""Statements about a scene, and whether they are true: the basis of captions and hard captions.

`truth` has three values: True and False are certain, None means that people might disagree (a thing that is slightly
left of another and far above it; a group near the middle of the image).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from scenes_layout import Background, Box, Group, Layout

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
APART = 0.12  # minimum distance of centres along the axis of a relation
SLANT = 0.6  # and its minimum ratio to the distance across that axis
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
    """`count` things of one concept; `size` and `place` if they are mentioned. `word` replaces the article."""

    hexcode: str
    count: int
    size: str | None = None
    place: str | None = None
    word: str | None = None


@dataclass(frozen=True)
class Statement:
    """`subjects` [are in `relation` to `objects`], [with `others`], [on a background]; all of it is claimed.

    Attributes:
        style: which of the grammar's forms to use.
        colour, pattern: of the background, if they are mentioned.
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
        """The statement with `new` in place of `old`."""
        parts = ("subjects", "objects", "others")
        return replace(self, **{part: tuple(new if p is old else p for p in getattr(self, part)) for part in parts})


def truth(statement: Statement, layout: Layout) -> bool | None:
    """Whether the statement is true for the layout; None if that is debatable. Numbers are exact."""
    # Each thing: is it present, in that number, size and place?
    found = {group.hexcode: group for group in layout.groups}
    answers: list[bool | None] = []
    for phrase in statement.phrases:
        group = found.get(phrase.hexcode)
        if group is None:
            return False
        answers.append(group.count == phrase.count and phrase.size in (None, group.size))
        if phrase.place is not None:
            answers.append(stands_at(group, phrase.place))
    # The relation of every subject to every object.
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
    """Whether all things of a group are "left", "right", "above" or "below" all of another's; None if debatable."""
    answers = [_beside(box, relation, beside) for box in one.boxes for beside in other.boxes]
    return _all(answers) if any(answer is not False for answer in answers) else False


@lru_cache(maxsize=256)
def relations(layout: Layout) -> tuple[tuple[int, str, int], ...]:
    """All certain (group, relation, group)."""
    numbers = range(len(layout.groups))
    return tuple(
        (i, relation, j)
        for i in numbers
        for j in numbers
        for relation in OPPOSITE
        if i != j and related(layout.groups[i], relation, layout.groups[j])
    )


def stands_at(group: Group, place: str) -> bool | None:
    """Whether a group is at a place of the image, by the centre of its hull; None if debatable."""
    x, y, width, height = group.hull
    answers = [
        _in_third(middle, third)
        for middle, third in zip((x + width / 2, y + height / 2), PLACES[place], strict=True)
        if third is not None
    ]
    return _all(answers)


@lru_cache(maxsize=1024)
def places_of(group: Group) -> tuple[str, ...]:
    """The places where the group certainly is."""
    return tuple(place for place in PLACES if stands_at(group, place))


def background_claims(background: Background) -> tuple[str, str | None]:
    """Colour and, if captions can name it, pattern."""
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
    # The last third is the first one mirrored.
    middle = middle if third < 0 else 1 - middle
    return True if middle <= EDGE else (False if middle >= OTHER_SIDE else None)


def _all(answers: list[bool | None]) -> bool | None:
    if False in answers:
        return False
    return None if None in answers else True
