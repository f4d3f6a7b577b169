"""Draws the log of a run with Pillow, because every run draws its log and matplotlib is an optional extra."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from .contact_sheet import EDGE, GREY, INK, PAPER, font

WIDTH, HEIGHT, MARGIN, LABELS = 900, 380, 56, 190
COLOURS = ("#22252a", "#c2410c", "#0f766e", "#7c3aed", "#b45309", "#1d4ed8", "#be185d", "#4d7c0f")
# fields of a log line that are not losses
OTHERS = ("step", "epoch", "learning_rate", "nonfinite_steps")

Points = list[tuple[float, float]]


def read_series(log: Path) -> tuple[dict[str, Points], dict[str, Points]]:
    """Losses, and recalls at 10, by name, as (step, value)."""
    losses: dict[str, Points] = {}
    recalls: dict[str, Points] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        for name, value in values.items():
            if not isinstance(value, int | float) or name in OTHERS or name.endswith("_per_second"):
                continue
            if "loss" in values:
                losses.setdefault(name, []).append((values["step"], value))
            elif name.endswith(("_r@10", "top1", "accuracy")):
                recalls.setdefault(name, []).append((values["step"], value))
    return losses, recalls


def draw_log(log: Path) -> Image.Image:
    """
    Draws the losses over steps, and below them the recalls if the run was evaluated more than once.

    Raises:
        ValueError: the log has no losses.
    """
    losses, recalls = read_series(log)
    if not losses:
        raise ValueError(f"{log}: no line has a loss")
    panels = [("loss, and its parts", losses)]
    # a single evaluation is not a curve
    if any(len(points) > 1 for points in recalls.values()):
        panels.append(("recall among the first ten", recalls))
    sheet = Image.new("RGB", (WIDTH, HEIGHT * len(panels)), PAPER)
    for number, (title, series) in enumerate(panels):
        draw_panel(ImageDraw.Draw(sheet), series, title, number * HEIGHT)
    return sheet


def draw_panel(draw: ImageDraw.ImageDraw, series: Mapping[str, Points], title: str, top: int) -> None:
    """Draws axes from zero up, and curves with their names at the right ends."""
    left, right, bottom = MARGIN, WIDTH - LABELS, top + HEIGHT - MARGIN
    last = max(step for points in series.values() for step, _ in points)
    highest = max(max(value for points in series.values() for _, value in points), 1e-9)

    # axes, with a grid line at each quarter
    draw.text((left, top + MARGIN // 2), title, INK, font(16), anchor="lm")
    for quarter in range(5):
        y = bottom - (bottom - top - MARGIN) * quarter / 4
        draw.line([(left, y), (right, y)], EDGE)
        draw.text((left - 8, y), f"{highest * quarter / 4:.3g}", GREY, font(12), anchor="rm")
        x = left + (right - left) * quarter / 4
        draw.text((x, bottom + 16), f"{last * quarter / 4:.0f}", GREY, font(12), anchor="mm")
    draw.text((right, bottom + 34), "steps", GREY, font(12), anchor="rm")

    # curves, and their names without overlap
    ends = {}
    for number, (name, points) in enumerate(series.items()):
        places = [
            (left + (right - left) * step / last, bottom - (bottom - top - MARGIN) * max(value, 0.0) / highest)
            for step, value in points
        ]
        colour = COLOURS[number % len(COLOURS)]
        draw.line(places, colour, 3 if number == 0 else 2, joint="curve")
        x, y = places[-1]
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        ends[name] = (y, colour, points[-1][1])
    for (name, (_, colour, value)), y in zip(*spread_labels(ends, bottom), strict=True):
        draw.text((right + 10, y), f"{name.rpartition('/')[2]} {value:.3g}", colour, font(13), anchor="lm")


def spread_labels(ends: Mapping[str, tuple], bottom: float, room: int = 17) -> tuple[Sequence, list[float]]:
    """Ends of curves from bottom to top, and heights for their names, at least `room` apart."""
    ordered = sorted(ends.items(), key=lambda item: -item[1][0])
    heights: list[float] = []
    for _, (y, *_) in ordered:
        heights.append(min(y, heights[-1] - room if heights else bottom))
    return ordered, heights
