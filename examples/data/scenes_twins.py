"""Twins: two scenes that differ in one thing, each with captions that are false of the other.

In a batch together (`rows_together: 2`) they are the negatives that contrast and matching cannot tell apart by
anything but that thing. A thing more or less makes no twin: what is said of the fewer things holds of the more too.
"""

from scenes_captions import Caption, draw_captions
from scenes_layout import Layout, draw_layout, generator
from scenes_queries import modify
from scenes_statements import truth

TWIN_KINDS = ("swap", "move", "mirror", "size", "count", "background")
CAPTIONS = 4  # of each
DRAWN = 12  # true captions, of which those are kept that the other scene belies

Told = tuple[Layout, list[Caption]]


def draw_twins(seed: int, split: str, index: int) -> tuple[Told, Told]:
    """Couple `index` of a split, each scene with one to four captions: a pure function, as `scene`."""
    rng = generator("twins", seed, split, index)
    while True:
        # Kinds that rarely fit are asked for as often as the others: a scene is drawn until one allows the change.
        kind = TWIN_KINDS[index % len(TWIN_KINDS)]
        layout = draw_layout(rng.getrandbits(32), split, index)
        change = modify(rng, kind, layout, split)
        if change is None:
            continue

        # What is told of each must be false of the other beyond dispute.
        told = []
        for one, other in ((change.before, change.after), (change.after, change.before)):
            captions = [
                caption for caption in draw_captions(rng, one, DRAWN) if truth(caption.statement, other) is False
            ]
            told.append((one, captions[:CAPTIONS]))
        if all(captions for _, captions in told):
            return tuple(told)
