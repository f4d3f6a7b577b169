"""Hard captions: true captions with one thing changed, so that they are clearly false for the image.

Text alone must not reveal which caption is true. So a change is proposed as often as its reverse, and accepted with
the Metropolis probability min(1, p(new) / p(old)), where p is the frequency in scenes: true and false captions then
mention each number, size, place and colour equally often. A rejected change is not drawn again: the scene has no hard
caption of that kind. "a dog" may also describe two dogs, so the number of a single thing is changed only if the
caption says "one" or "a single".
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from scenes_captions import SINGLE, Caption, write
from scenes_concepts import confusable
from scenes_layout import COLOURS, Layout, pool
from scenes_statements import OPPOSITE, Phrase, Statement, truth

# How often (count, size) occurs among the groups of a scene, by its number of groups: measured over 30,000 scenes.
FREQUENCY = {
    1: {(1, "big"): 0.202, (1, "small"): 0.204, (2, "big"): 0.133, (2, "small"): 0.121, (3, "small"): 0.188,
        (4, "small"): 0.153},
    2: {(1, "big"): 0.297, (1, "small"): 0.385, (2, "big"): 0.058, (2, "small"): 0.088, (3, "small"): 0.115,
        (4, "small"): 0.057},
    3: {(1, "big"): 0.284, (1, "small"): 0.483, (2, "small"): 0.158, (3, "small"): 0.075},
    4: {(1, "big"): 0.242, (1, "small"): 0.635, (2, "small"): 0.122},
}  # fmt: skip
COLOUR_FREQUENCY = {
    "white": 0.147,
    "gray": 0.092,
    "yellow": 0.144,
    "orange": 0.119,
    "pink": 0.124,
    "green": 0.124,
    "blue": 0.132,
    "purple": 0.119,
}
CORNERS = ("top left", "top right", "bottom left", "bottom right")
ACROSS = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


@dataclass(frozen=True)
class HardCaption:
    """A false text: caption number `of` with one thing changed, of a kind in `KINDS`."""

    text: str
    kind: str
    of: int
    statement: Statement


def draw_hard_captions(rng: random.Random, layout: Layout, captions: list[Caption], split: str) -> list[HardCaption]:
    """At most one false caption of each kind, made from a random caption that allows the change."""
    hard: list[HardCaption] = []
    for kind in KINDS:
        fitting = [of for of, caption in enumerate(captions) if can_change(kind, caption.statement)]
        if not fitting:
            continue
        of = rng.choice(fitting)
        statement = change(rng, kind, captions[of].statement, layout, split)
        if statement is not None:
            hard.append(HardCaption(write(statement), kind, of, statement))
    return hard


def can_change(kind: str, statement: Statement) -> bool:
    """Whether the statement mentions what a change of this kind affects."""
    if kind in ("relation", "order"):
        return statement.relation is not None
    if kind == "background":
        return statement.colour is not None
    return bool(_changeable(kind, statement))


def change(rng: random.Random, kind: str, statement: Statement, layout: Layout, split: str) -> Statement | None:
    """The statement with one thing changed, false for the layout; None if the change is not accepted."""
    changed = CHANGES[kind](rng, statement, layout, split)
    return changed if changed is not None and truth(changed, layout) is False else None


def draw_absent(rng: random.Random, layout: Layout, split: str) -> str:
    """A concept that is not in the scene, and not easily confused with one that is."""
    while True:
        hexcode = rng.choice(pool(split))
        if not any(confusable(hexcode, one) for one in layout.concepts):
            return hexcode


def _changeable(kind: str, statement: Statement) -> list[Phrase]:
    """The phrases that mention what a change of this kind affects."""
    if kind == "count":
        return [phrase for phrase in statement.phrases if phrase.count > 1 or phrase.word]
    if kind == "place":
        return [phrase for phrase in statement.phrases if phrase.place in (*CORNERS, *ACROSS)]
    return [phrase for phrase in statement.phrases if kind == "thing" or phrase.size]


def _thing(rng: random.Random, statement: Statement, layout: Layout, split: str) -> Statement:
    old = rng.choice(statement.phrases)
    return statement.with_phrase(old, replace(old, hexcode=draw_absent(rng, layout, split)))


def _relation(rng: random.Random, statement: Statement, layout: Layout, split: str) -> Statement:
    return replace(statement, relation=OPPOSITE[statement.relation])


def _order(rng: random.Random, statement: Statement, layout: Layout, split: str) -> Statement:
    return replace(statement, subjects=statement.objects, objects=statement.subjects)


def _background(rng: random.Random, statement: Statement, layout: Layout, split: str) -> Statement | None:
    colour = rng.choice([name for name in COLOURS if name != statement.colour])
    if not _accepts(rng, COLOUR_FREQUENCY[colour], COLOUR_FREQUENCY[statement.colour]):
        return None
    return replace(statement, colour=colour)


def _place(rng: random.Random, statement: Statement, layout: Layout, split: str) -> Statement:
    """Another corner for a corner, the opposite side for a side: these are equally frequent."""
    old = rng.choice(_changeable("place", statement))
    place = ACROSS.get(old.place) or rng.choice([corner for corner in CORNERS if corner != old.place])
    return statement.with_phrase(old, replace(old, place=place))


def _size(rng: random.Random, statement: Statement, layout: Layout, split: str) -> Statement | None:
    old = rng.choice(_changeable("size", statement))
    size = "big" if old.size == "small" else "small"
    shown = FREQUENCY[len(layout.groups)]
    if not _accepts(rng, shown.get((old.count, size), 0.0), shown[old.count, old.size]):
        return None
    return statement.with_phrase(old, replace(old, size=size))


def _count(rng: random.Random, statement: Statement, layout: Layout, split: str) -> Statement | None:
    """Another number; "one" and "a single" count as two states, each as frequent as in captions."""
    old = rng.choice(_changeable("count", statement))
    shown = FREQUENCY[len(layout.groups)]

    def often(count: int) -> float:
        return sum(shown.get((count, size), 0.0) for size in (("big", "small") if old.size is None else (old.size,)))

    # Other phrases about single things fix the determiner, which is the same throughout a caption.
    alike = [phrase.word for phrase in statement.phrases if phrase is not old and phrase.count == 1]
    states = {(count, None): often(count) for count in (2, 3, 4)}
    for word, share in zip(*SINGLE, strict=True):
        if word is not None and (not alike or alike[0] == word):
            states[1, word] = often(1) * (1.0 if alike else share)
    now = (old.count, old.word if old.count == 1 else None)
    count, word = rng.choice([state for state in states if state != now])
    if not _accepts(rng, states[count, word], states[now]):
        return None
    return statement.with_phrase(old, replace(old, count=count, word=word))


def _accepts(rng: random.Random, new: float, old: float) -> bool:
    return rng.random() * old < new


CHANGES: dict[str, Callable[[random.Random, Statement, Layout, str], Statement | None]] = {
    "thing": _thing,
    "relation": _relation,
    "order": _order,
    "size": _size,
    "count": _count,
    "place": _place,
    "background": _background,
}
KINDS = tuple(CHANGES)
