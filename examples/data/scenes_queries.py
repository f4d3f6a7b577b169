"""Composed retrieval: a reference image and a modifying text retrieve a target image among hard distractors.

    kind        text, for instance             the target is the reference, but
    add         "with a small dog"             with one more group
    remove      "without the apple"            with one group less
    swap        "with a dog instead of the cat"  with another concept in place of a group
    move        "with the dog on the other side" with a group mirrored to the other side, left or right
    mirror      "mirrored"                     mirrored
    size        "with a big dog"               with a group in the other size
    count       "with three dogs"              with another number of things in a group
    background  "on a blue background"         on another colour

All images of a query except the reference are redrawn, with other drawings of the same concepts if there are any and
in another shade, so that pixels of the reference do not help. The distractors always include the redrawn reference
(which the image alone would find) and the change made to another scene (which the text alone would find).
"""

import math
import random
from dataclasses import dataclass, replace

from scenes_captions import say
from scenes_concepts import article, concept_table
from scenes_hard import draw_absent
from scenes_layout import (
    COLOURS,
    CONTRAST,
    SIZES,
    SPLITS,
    Group,
    Layout,
    draw_layout,
    find_place,
    generator,
    may_meet,
    shared,
)
from scenes_sprites import Sprite, load_sprites
from scenes_statements import Phrase, stands_at

QUERY_KINDS = ("add", "remove", "swap", "move", "mirror", "size", "count", "background")
OTHERS = 9  # distractors per query
WORDS_ALONE = 3  # of these, how many are other scenes that match the text
CROWDED = 0.25  # maximum overlap of two groups
NUDGE = 0.02  # maximum shift of a redrawn group


@dataclass(frozen=True)
class Query:
    """A reference, a text, and the images to choose from: first the target, second the unchanged reference.

    Attributes:
        names: role of each image of `gallery`: "target", "reference", "words alone" or the kind of another change.
    """

    id: str
    kind: str
    words: str
    reference: Layout
    gallery: tuple[Layout, ...]
    names: tuple[str, ...]


def query(seed: int, split: str, index: int, kind: str | None = None) -> Query:
    """
    Composed query `index` of a split: a pure function, like `scene`.

    Args:
        kind: one of `QUERY_KINDS`; random if None.

    Raises:
        ValueError: no such kind or split.
    """
    if kind not in (None, *QUERY_KINDS):
        raise ValueError(f"kind must be one of {', '.join(QUERY_KINDS)}, got {kind!r}")
    # Scenes are drawn until one allows the change.
    rng = generator("query", seed, split, index)
    kind = kind or rng.choice(QUERY_KINDS)
    while True:
        drawn = draw_layout(
            rng.getrandbits(32), split, index, rng.choice((2, 2, 3) if kind == "add" else (1, 2, 2, 3))
        )
        change = _taken_away(rng, drawn) if kind == "add" else modify(rng, kind, drawn, split)
        if change is not None:
            break
    # The gallery: its images are redrawn, unlike the reference.
    reference = change.before
    gallery, names = _choices(rng, change, split, index)
    return Query(f"query-{split}-{seed}-{index}", kind, change.words, reference, gallery, names)


@dataclass(frozen=True)
class Change:
    """`words` turn `before` into `after`; `touched` is the group that they mention, as in `after`, if any."""

    before: Layout
    after: Layout
    words: str
    touched: Group | None = None


def _taken_away(rng: random.Random, layout: Layout) -> Change:
    """The change that adds a group: the scene is the target, the scene without that group the reference."""
    number = rng.randrange(len(layout.groups))
    group = layout.groups[number]
    size = group.size if rng.random() < 0.5 else None
    return Change(_without(layout, number), layout, f"with {say(Phrase(group.hexcode, group.count, size))}", group)


def modify(rng: random.Random, kind: str, layout: Layout, split: str) -> Change | None:
    """A change of the layout; None if it allows none of this kind."""
    number = rng.randrange(len(layout.groups))
    group = layout.groups[number]
    rest = [one for one in layout.groups if one is not group]
    if kind == "add":
        return _added(rng, layout, split)
    if kind == "remove":
        return Change(layout, _without(layout, number), f"without {the(group)}") if rest else None
    if kind == "mirror":
        return _mirrored(rng, layout)
    if kind == "background":
        return _recoloured(rng, layout)
    # The other kinds replace a group by another.
    if kind == "swap":
        hexcode = draw_absent(rng, layout, split)
        if not all(may_meet(split, hexcode, one.hexcode) for one in rest):
            return None
        new = refitted(group, rng.choice(load_sprites(SPLITS[split])[hexcode]))
        words = f"with {say(Phrase(hexcode, group.count))} instead of {the(group)}"
    elif kind == "move":
        new = _turned(group)
        words = f"with {the(group)} on the other side"
        if not (stands_at(group, "left") or stands_at(group, "right")):
            return None
    elif kind == "size":
        size = "big" if group.size == "small" else "small"
        new = refitted(replace(group, size=size), group.sprite, rng.choice(SIZES[size]))
        words = f"with {say(Phrase(group.hexcode, 1, size))}"
        if group.count > 1:
            return None
    else:
        counts = [count for count in (1, 2, 3, 4) if count != group.count and (count < 3 or group.size == "small")]
        count = rng.choice(counts)
        new = find_place(rng, group.sprite, group.size, count, [one.hull for one in rest], CROWDED)
        words = f"with {say(Phrase(group.hexcode, count, word='a single' if count == 1 else None))}"
    # No room for it.
    if new is None or any(shared(new.hull, one.hull) > CROWDED for one in rest):
        return None
    return Change(layout, _with_group(layout, number, new), words, new)


def _added(rng: random.Random, layout: Layout, split: str) -> Change | None:
    """Adds a group, if there is room."""
    hexcode = draw_absent(rng, layout, split)
    if len(layout.groups) == 4 or not all(may_meet(split, hexcode, one) for one in layout.concepts):
        return None
    sprite = rng.choice(load_sprites(SPLITS[split])[hexcode])
    new = find_place(rng, sprite, rng.choice(tuple(SIZES)), 1, [one.hull for one in layout.groups], CROWDED)
    if new is None:
        return None
    return Change(layout, replace(layout, groups=(*layout.groups, new)), f"with {say(Phrase(hexcode, 1))}", new)


def _mirrored(rng: random.Random, layout: Layout) -> Change | None:
    """Mirrors the layout, if that can be seen: a group is on the left or right."""
    if not any(stands_at(group, side) for group in layout.groups for side in ("left", "right")):
        return None
    turned = replace(layout, groups=tuple(map(_turned, layout.groups)))
    return Change(layout, turned, rng.choice(("mirrored", "the other way around", "seen in a mirror")))


def _recoloured(rng: random.Random, layout: Layout) -> Change | None:
    """Changes the background to another colour that contrasts with every thing."""
    old = layout.background
    rims = [group.sprite.rim for group in layout.groups]
    fitting = [
        colour
        for colour, shade in COLOURS.items()
        if colour != old.colour and all(math.dist(rim, shade) >= CONTRAST for rim in rims)
    ]
    if not fitting:
        return None
    colour = rng.choice(fitting)
    background = replace(old, colour=colour, shade=COLOURS[colour])
    words = f"on {article(colour)} {colour} background"
    return Change(layout, replace(layout, background=background), words)


def _choices(rng: random.Random, change: Change, split: str, index: int) -> tuple[tuple[Layout, ...], tuple[str, ...]]:
    """The target, the reference, and distractors: other scenes that match the text, other changes, further changes."""
    chosen = [("target", change.after), ("reference", change.before)]
    known = {facts(layout) for _, layout in chosen}

    def consider(name: str, layout: Layout | None) -> None:
        if layout is not None and facts(layout) not in known:
            known.add(facts(layout))
            chosen.append((name, layout))

    # Other scenes that match the text.
    while len(chosen) < 2 + WORDS_ALONE:
        other = draw_layout(rng.getrandbits(32), split, index, max(2, len(change.after.groups)))
        consider("words alone", _in_another_scene(other, change, split))
    # Other changes, of the reference and of the target; those of the target keep the group that the text mentions.
    attempt = 0
    while len(chosen) < 1 + OTHERS:
        attempt += 1
        base = change.before if attempt % 2 else change.after
        kind = rng.choice(QUERY_KINDS)
        made = modify(rng, kind, base, split)
        if made is None or made.words == change.words:
            continue
        if base is change.after and change.touched is not None and change.touched not in made.after.groups:
            continue
        consider(kind, made.after)
    return tuple(redraw(rng, layout, split) for _, layout in chosen), tuple(name for name, _ in chosen)


def _in_another_scene(other: Layout, change: Change, split: str) -> Layout | None:
    """Another scene that matches the text: with the group that it mentions, or on the colour."""
    # Same background as the target, so that it does not distinguish them.
    other = replace(other, background=change.after.background)
    if change.touched is None:
        gone = set(change.before.concepts) - set(change.after.concepts)
        return None if gone & set(other.concepts) else other
    rest = other.groups[1:]
    if not all(may_meet(split, change.touched.hexcode, group.hexcode) for group in rest):
        return None
    if any(shared(change.touched.hull, group.hull) > CROWDED for group in rest):
        return None
    return replace(other, groups=(*rest, change.touched))


def redraw(rng: random.Random, layout: Layout, split: str) -> Layout:
    """The same scene with other drawings if there are any, slightly moved, in another shade of the colour."""
    groups = []
    for group in layout.groups:
        # Another drawing, if the concept has more than one.
        drawings = load_sprites(SPLITS[split])[group.hexcode]
        sprite = rng.choice([one for one in drawings if one is not group.sprite] or drawings)
        groups.append(moved(refitted(group, sprite), rng.uniform(-NUDGE, NUDGE), rng.uniform(-NUDGE, NUDGE)))
    shade = tuple(min(255, channel + rng.randint(-9, 9)) for channel in COLOURS[layout.background.colour])
    return Layout(tuple(groups), replace(layout.background, shade=shade))


def facts(layout: Layout) -> tuple:
    """The facts by which a person would distinguish scenes: things, numbers, sizes, sides, background."""
    sides = (
        (group.hexcode, group.count, group.size, stands_at(group, "left"), stands_at(group, "right"))
        for group in layout.groups
    )
    return layout.background.colour, tuple(sorted(sides, key=str))


def refitted(group: Group, sprite: Sprite, side: float | None = None) -> Group:
    """The group in another drawing, with another longer side if one is given; things keep their centres."""
    boxes = []
    for x, y, width, height in group.boxes:
        longest = side or max(width, height)
        w, h = (longest, longest / sprite.aspect) if sprite.aspect >= 1 else (longest * sprite.aspect, longest)
        boxes.append((x + (width - w) / 2, y + (height - h) / 2, w, h))
    return moved(replace(group, sprite=sprite, boxes=tuple(boxes)), 0, 0)


def moved(group: Group, right: float, down: float) -> Group:
    """The group shifted, but kept inside the image."""
    x, y, width, height = group.hull
    # Not beyond the edges.
    right = min(max(right, -x), 1 - x - width)
    down = min(max(down, -y), 1 - y - height)
    return replace(group, boxes=tuple((bx + right, by + down, w, h) for bx, by, w, h in group.boxes))


def the(group: Group) -> str:
    """'the dog', 'the dogs'."""
    concept = concept_table()[group.hexcode]
    return f"the {concept.name if group.count == 1 else concept.plural}"


def _turned(group: Group) -> Group:
    """The group mirrored, to the other side of the image."""
    boxes = tuple((1 - x - width, y, width, height) for x, y, width, height in group.boxes)
    return replace(group, flipped=not group.flipped, boxes=boxes)


def _without(layout: Layout, number: int) -> Layout:
    return replace(layout, groups=layout.groups[:number] + layout.groups[number + 1 :])


def _with_group(layout: Layout, number: int, group: Group) -> Layout:
    return replace(layout, groups=(*layout.groups[:number], group, *layout.groups[number + 1 :]))
