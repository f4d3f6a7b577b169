"""Scenes composed of the embedded emoji, with complete annotations. Made on the fly, or written as parquet.

    python examples/data/scenes.py runs/scenes --pairs 40000                      train.parquet
    python examples/data/scenes.py runs/scenes --pairs 1000 --split unseen_pairs unseen_style
    python examples/data/scenes.py runs/scenes --pairs 1000 --split seen --queries 500    with composed queries
    python examples/data/scenes.py runs/scenes_single --pairs 40000 --groups 1    one kind of thing per image
    python examples/data/scenes.py runs/scenes --pairs 0 --twins 40000            train_twins.parquet

In a program: `scene(seed, split, index)` is a pure function; it draws the same scene at any size and on any machine.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image
from scenes_captions import Caption, draw_captions
from scenes_concepts import concept_table
from scenes_drawing import pixel_box, render
from scenes_hard import HardCaption, draw_hard_captions
from scenes_languages import LANGUAGES
from scenes_layout import SPLITS, Layout, draw_layout, generator, pool
from scenes_rows import as_row, in_order, query_rows, triple_row, write_queries, write_rows
from scenes_statements import relations
from scenes_tasks import write_tasks
from scenes_twins import draw_twins

SIZE = 64
CAPTIONS = 4


@dataclass(frozen=True)
class Thing:
    """One thing of a scene: `box` (x, y, width, height) in pixels fits it exactly, though others may hide part of it.

    `group` is the index of its group in the scene: things of one group share concept, size and drawing.
    """

    hexcode: str
    name: str
    box: tuple[int, int, int, int]
    size: str
    style: str
    group: int


@dataclass(frozen=True)
class Scene:
    """An image and its annotations.

    Attributes:
        relations: (group, "left" | "right" | "above" | "below", group), where unambiguous.
        hard: false captions, each with one thing changed, at most one of each kind.
        layout: what all of this is made from, with lengths as shares of the image's side.
    """

    id: str
    image: Image.Image
    captions: tuple[Caption, ...]
    hard: tuple[HardCaption, ...]
    objects: tuple[Thing, ...]
    relations: tuple[tuple[int, str, int], ...]
    layout: Layout

    @property
    def texts(self) -> list[str]:
        return [caption.text for caption in self.captions]

    @property
    def concepts(self) -> tuple[str, ...]:
        """Hexcode of each group."""
        return self.layout.concepts


def scene(
    seed: int,
    split: str,
    index: int,
    size: int = SIZE,
    captions: int = CAPTIONS,
    groups: int | None = None,
    hard: bool = True,
) -> Scene:
    """
    Scene `index` of a split: "train", "seen", "unseen_pairs", "unseen_style" or "unseen_concepts".

    Args:
        seed: of everything; scenes of different seeds, splits or indices are independent.
        size: pixels per side; the layout is the same at every size.
        captions: how many true captions; a scene of one thing may have fewer.
        groups: how many groups of things, 1 to 4; random if None.
        hard: whether hard captions are made too; the rest of the scene does not depend on it.

    Raises:
        ValueError: no such split.
    """
    # Each part has its own random generator, so that it does not depend on the others.
    layout = draw_layout(seed, split, index, groups)
    written = draw_captions(generator("captions", seed, split, index), layout, captions)
    rng = generator("hard captions", seed, split, index)
    false = draw_hard_captions(rng, layout, written, split) if hard else []
    return pictured(f"{split}-{seed}-{index}", layout, size, written, false)


def pictured(
    name: str, layout: Layout, size: int, captions: Sequence[Caption], hard: Sequence[HardCaption] = ()
) -> Scene:
    """The scene of a layout and its captions."""
    return Scene(
        name, render(layout, size), tuple(captions), tuple(hard), things(layout, size), relations(layout), layout
    )


def things(layout: Layout, size: int) -> tuple[Thing, ...]:
    """All things of a layout, in the order in which they are painted."""
    return tuple(
        Thing(
            group.hexcode,
            concept_table()[group.hexcode].name,
            pixel_box(box, size),
            group.size,
            group.sprite.style,
            number,
        )
        for number, group in enumerate(layout.groups)
        for box in group.boxes
    )


def arguments() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="output folder")
    parser.add_argument("--pairs", type=int, default=1000, help="scenes per split, or 0 (default %(default)s)")
    parser.add_argument("--split", nargs="+", choices=list(SPLITS), default=["train"], help="default train")
    parser.add_argument("--groups", type=int, choices=(1, 2, 3, 4), help="groups of things per scene; default: random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=SIZE, help="pixels per side (default %(default)s)")
    parser.add_argument(
        "--queries", type=int, default=0, metavar="N", help="composed queries per split, with galleries"
    )
    parser.add_argument(
        "--triples", type=int, default=0, metavar="N", help="composed queries for training, with targets"
    )
    parser.add_argument("--twins", type=int, default=0, metavar="N", help="N scenes and a twin of each, per split")
    parser.add_argument("--tasks", type=int, default=0, metavar="N", help="scenes for fine-tuning, in OUTPUT/tasks")
    parser.add_argument("--languages", nargs="+", choices=[*LANGUAGES, "all"], default=[], help="besides English")
    parser.add_argument("--workers", type=int, default=1, help="processes (default %(default)s)")
    return parser


def main(given: list[str] | None = None) -> None:
    """The command."""
    args = arguments().parse_args(given)
    args.output.mkdir(parents=True, exist_ok=True)
    for split in args.split:
        pool(split)  # sprites are cut out once, before the processes fork
        given = {"seed": args.seed, "split": split, "size": args.size}
        languages = list(LANGUAGES) if args.languages == ["all"] else args.languages
        # Pairs, then composed queries with their galleries.
        if args.pairs:
            make = partial(scene_row, **given, groups=args.groups, languages=languages)
            pairs = in_order(make, args.pairs, args.workers)
            write_rows(args.output / f"{split}.parquet", pairs, args.pairs)
        if args.queries:
            queries = in_order(partial(query_rows, **given), args.queries, args.workers)
            write_queries(args.output, split, queries, args.queries)
        if args.triples:
            triples = in_order(partial(triple_row, **given), args.triples, args.workers)
            write_rows(args.output / f"{split}_triples.parquet", triples, args.triples)
        if args.twins:
            couples = in_order(partial(twin_rows, **given, languages=languages), args.twins, args.workers)
            write_rows(args.output / f"{split}_twins.parquet", chain.from_iterable(couples), 2 * args.twins)
    # Tasks: a quarter as many scenes for evaluation, a thousand at most.
    if args.tasks:
        for split in ("train", "unseen_style"):
            pool(split)
        evaluating = min(1000, -(-args.tasks // 4))
        write_tasks(args.output / "tasks", args.seed, args.size, args.tasks, evaluating, args.workers)


def scene_row(
    index: int, seed: int, split: str, size: int, groups: int | None = None, languages: Sequence[str] = ()
) -> dict[str, Any]:
    """The row of scene `index`."""
    return as_row(scene(seed, split, index, size, groups=groups), languages)


def twin_rows(index: int, seed: int, split: str, size: int, languages: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a scene and its twin."""
    return [
        as_row(pictured(f"twin-{split}-{seed}-{index}-{number}", layout, size, captions), languages)
        for number, (layout, captions) in enumerate(draw_twins(seed, split, index))
    ]


if __name__ == "__main__":
    main()
