"""Draws the effect of bootstrapped guidance (Table 3 of the OneR paper): an image's top classes before and after.

Shapes: n pictures, C classes, K candidates. Scores are cosines.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from oner.processing.image_processing_vl import open_image

from .sheets import new_figure

LISTED = 5
RIGHT = "#1a7f37"
OTHER = "0.25"
MOVE = "0.8"


@dataclass(frozen=True)
class Guided:
    """One image of the sheet: its classes before and after guidance, best first, with the scores of the first ones."""

    picture: Any
    label: int
    before: Sequence[int]
    before_scores: Sequence[float]
    after: Sequence[int]
    after_scores: Sequence[float]


def guided_examples(
    images: Sequence[Any], labels: Tensor, scores: Tensor, reranked: Tensor, guided: Tensor, count: int
) -> list[Guided]:
    """`count` evenly spaced images, preferably those whose right class guidance could move.

    Args:
        images, labels: (n).
        scores: (n, C) before guidance.
        reranked: (n, C) after guidance, see `zero_shot.rerank`.
        guided: (n, K) scores that re-rank the K candidates, which are the highest of `scores`.
    """
    candidates = guided.shape[1]
    old = scores.argsort(dim=1, descending=True, stable=True)  # (n, C)
    new = reranked.argsort(dim=1, descending=True, stable=True)  # (n, C)

    # guidance moves candidates only: first the pictures whose right class is one
    within = (old[:, :candidates] == labels.to(old.device)[:, None]).any(1).tolist()
    movable = [row for row, inside in enumerate(within) if inside]
    others = [row for row, inside in enumerate(within) if not inside]
    count = min(count, len(within))
    chosen = _spread(movable, count)
    chosen += _spread(others, count - len(chosen))

    return [
        Guided(
            images[row],
            int(labels[row]),
            old[row].tolist(),
            scores[row, old[row, :candidates]].tolist(),
            new[row].tolist(),
            guided[row].sort(descending=True).values.tolist(),
        )
        for row in chosen
    ]


def _spread(places: Sequence[int], count: int) -> list[int]:
    count = min(count, len(places))
    return [places[number * len(places) // count] for number in range(count)]


def guidance_sheet(examples: Sequence[Guided], names: Sequence[str], title: str, columns: int = 2) -> Any:
    """A Figure with a cell per image: its first five classes before and after guidance, joined by lines.

    The right class is green and bold; if it is not among the five, it is below them with its rank.

    Args:
        names: Names of all classes.

    Raises:
        ValueError: there is nothing to draw.
        ImportError: matplotlib is not installed.
    """
    if not examples:
        raise ValueError("a sheet needs at least one picture, got none")

    # sizes in inches: one cell per image, and a heading above them
    columns = min(columns, len(examples))
    lines = -(-len(examples) // columns)
    width = 6.6 * columns + 0.2
    cell = 1.75
    heading = textwrap.fill(title, int(width * 11))
    head = 0.2 * (heading.count("\n") + 1) + 0.25
    height = head + cell * lines + 0.1
    figure = new_figure(width, height)
    figure.text(0.5, 1 - 0.08 / height, heading, ha="center", va="top", fontsize=10, parse_math=False)
    grid = figure.add_gridspec(
        lines, 2 * columns, width_ratios=[1.3, 5.2] * columns, left=0.1 / width, right=1 - 0.1 / width,
        bottom=0.1 / height, top=1 - head / height, wspace=0.03, hspace=0.12,
    )  # fmt: skip

    # in each cell the image, and beside it the two lists
    for place, example in enumerate(examples):
        line, column = divmod(place, columns)
        axes = figure.add_subplot(grid[line, 2 * column])
        axes.imshow(open_image(example.picture), interpolation="bicubic")
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set(color="0.8", linewidth=0.6)
        _lists(figure.add_subplot(grid[line, 2 * column + 1]), example, names)
    return figure


def _lists(axes: Any, example: Guided, names: Sequence[str]) -> None:
    """Draws the two lists of an image on `axes`, at heights 0 (heading) to 6 (the right class below the five)."""
    axes.set_xlim(0, 1)
    axes.set_ylim(6.6, -0.5)
    axes.axis("off")

    # class -> height, for each list
    heights = []
    sides = (
        ("before", 0.44, "right", example.before, example.before_scores),
        ("after guidance", 0.56, "left", example.after, example.after_scores),
    )
    for heading, x, side, order, scores in sides:
        axes.text(x, 0, heading, ha=side, va="center", fontsize=7, color="0.5")

        # the first five, and the right class
        shown = {number: row + 1 for row, number in enumerate(order[:LISTED])}
        if example.label not in shown:
            shown[example.label] = LISTED + 1

        # name and score; after guidance only candidates have a score, others show their rank
        for number, row in shown.items():
            right = number == example.label
            rank = order.index(number)
            name = textwrap.shorten(names[number], 30, placeholder=" …")
            score = f"{scores[rank]:.2f}" if rank < len(scores) else f"rank {rank + 1}"
            score = f"{score}, rank {rank + 1}" if LISTED <= rank < len(scores) else score
            words = f"{name}  ({score})"
            colour, weight = (RIGHT, "bold") if right else (OTHER, "normal")
            axes.text(x, row, words, ha=side, va="center", fontsize=7.5, color=colour, weight=weight, parse_math=False)
        heights.append(shown)

    # lines between the two positions of a class in both lists
    for number in heights[0].keys() & heights[1].keys():
        right = number == example.label
        axes.plot(
            (0.45, 0.55), (heights[0][number], heights[1][number]), color=RIGHT if right else MOVE,
            linewidth=1.8 if right else 0.8, zorder=2 if right else 1, solid_capstyle="round",
        )  # fmt: skip
