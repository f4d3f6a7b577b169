"""Twins: two scenes that differ in one thing, each with captions that are false for the other.

In one batch (`rows_together: 2`) they are negatives for contrast and matching that differ in nothing but that thing.
Adding or removing a thing makes no twin: captions of the scene with fewer things are true for the other, too.
"""

from scenes_captions import Caption, draw_captions
from scenes_layout import Layout, draw_layout, generator
from scenes_queries import modify
from scenes_statements import truth

TWIN_KINDS = ("swap", "move", "mirror", "size", "count", "background")
CAPTIONS = 4  # per scene, at most
DRAWN = 12  # true captions, of which those that are false for the other scene are kept

Told = tuple[Layout, list[Caption]]


def draw_twins(seed: int, split: str, index: int) -> tuple[Told, Told]:
    """Twins `index` of a split, each scene with one to four captions: a pure function, like `scene`."""
    rng = generator("twins", seed, split, index)
    while True:
        # Kinds that rarely fit are as frequent as the others: scenes are drawn until one allows the change.
        kind = TWIN_KINDS[index % len(TWIN_KINDS)]
        layout = draw_layout(rng.getrandbits(32), split, index)
        change = modify(rng, kind, layout, split)
        if change is None:
            continue

        # Captions of each must be certainly false for the other.
        told = []
        for one, other in ((change.before, change.after), (change.after, change.before)):
            captions = [
                caption for caption in draw_captions(rng, one, DRAWN) if truth(caption.statement, other) is False
            ]
            told.append((one, captions[:CAPTIONS]))
        if all(captions for _, captions in told):
            return tuple(told)
