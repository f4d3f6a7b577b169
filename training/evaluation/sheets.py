"""Shared code of the evaluators that draw: evaluation mode, scenes of four pictures, sheets of heat maps.

Shapes: B pictures, N = h*w patches (row-major), L positions, D width, P projection, H x W pixels.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from oner.processing.image_processing_vl import open_image

Row = Mapping[str, Any]


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of `width` x `height` inches, outside pyplot: nothing is left open behind it.

    Raises:
        ImportError: matplotlib is missing; the message names the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'oner[plots]'") from error
    return Figure(figsize=(width, height), dpi=120, facecolor="white")


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards the previous mode is restored, also after an error."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def on_device(batch: Mapping[str, Any], model: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of a processor's batch on the model's device; pictures in the model's floating type."""
    # the first floating-point weight, since quantised ones do not give the type of activations
    like = next(p for p in model.parameters() if p.is_floating_point())
    return {
        name: value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }


def patch_grid(pixel_values: Tensor, model: torch.nn.Module) -> tuple[int, int]:
    """(h, w), the patches down and across of `pixel_values` (B, 3, H, W)."""
    size = model.config.patch_size
    down, across = size if isinstance(size, list | tuple) else (size, size)
    return pixel_values.shape[-2] // down, pixel_values.shape[-1] // across


def describe(model: torch.nn.Module) -> str:
    """A short name of the model for titles: its directory or Hub name, else class, depth and width.

    A directory called `model`, as the trainings write it, says nothing: it is shown with the run's name before it.
    """
    parts = str(getattr(model.config, "name_or_path", "") or "").rstrip("/").split("/")
    name = "/".join(parts[-2:] if parts[-1] == "model" else parts[-1:])

    # class, depth and width for models without a name
    config = model.config
    shape = f"{getattr(config, 'num_hidden_layers', '?')} layers of {getattr(config, 'hidden_size', '?')}"
    return f"{name} ({shape})" if name else f"{type(model).__name__} ({shape})"


def pictures_as_seen(images: Sequence[Any], processor: Any, **options: Any) -> Tensor:
    """The pictures after resizing and cropping, in the colours they had: (B, H, W, 3) in [0, 1].

    Drawing a map over these, rather than over the files, keeps patch and picture aligned whatever the processor cuts.
    `options` are the processor's.
    """
    # undo the processor's normalisation
    pixels = processor(images=list(images), return_tensors="pt", **options)["pixel_values"].float().cpu()
    mean = torch.tensor(processor.image_processor.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(1, 3, 1, 1)
    return (pixels * std + mean).clamp(0, 1).permute(0, 2, 3, 1)  # (B, H, W, 3)


def upsample(maps: Tensor, height: int, width: int) -> Tensor:
    """Bilinear enlargement of (B, h, w) maps to (B, height, width)."""
    return F.interpolate(maps[:, None].float(), (height, width), mode="bilinear", align_corners=False)[:, 0]


def spread(maps: Tensor) -> Tensor:
    """Min-max of each (h, w) map to [0, 1], for display only; a constant map becomes all 0."""
    low = maps.amin((-2, -1), keepdim=True)  # (B, 1, 1)
    high = maps.amax((-2, -1), keepdim=True)  # (B, 1, 1)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def wrapped(text: str, width: int = 24, lines: int = 2) -> str:
    """`text` broken into at most `lines` lines of `width` letters, with an ellipsis where it was cut."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …")) or "(empty)"


@dataclass(frozen=True)
class Panel:
    """One cell of a sheet: a picture (H, W, 3) in [0, 1], an optional map (h, w) over it, the text above and below,
    and boxes ((x, y, width, height) in pixels, colour) around parts of it; or, where the picture is None, words."""

    picture: Tensor | None
    heat: Tensor | None = None
    above: str = ""
    below: str = ""
    boxes: Sequence[tuple[Sequence[float], str]] = ()
    words: str = ""


def heat_sheet(rows: Sequence[Sequence[Panel]], title: str, cell: float = 1.9) -> Any:
    """A matplotlib Figure with a line of panels for each row; each map is min-maxed and laid over its picture.

    Rows may differ in length. The picture is faded under its map, so that the map's colours stay readable.

    Raises:
        ValueError: there is nothing to draw.
        ImportError: matplotlib is missing.
    """
    if not rows or not any(len(row) for row in rows):
        raise ValueError("a sheet needs at least one panel, got none")

    # sizes in inches; `gap` is the room for text between two lines of panels
    lines = len(rows)
    columns = max(len(row) for row in rows)
    gap = 0.6
    width = max(cell * columns + 0.15 * (columns - 1) + 0.2, 5.0)
    heading = textwrap.fill(title, int(width * 12))
    head = 0.17 * (heading.count("\n") + 1) + 0.55  # room for the heading and for two lines over the first panels
    height = head + cell * lines + gap * (lines - 1) + 0.3

    figure = new_figure(width, height)
    grid = figure.add_gridspec(
        lines, columns, left=0.1 / width, right=1 - 0.1 / width, bottom=0.3 / height, top=1 - head / height,
        wspace=0.15 / cell, hspace=gap / cell,
    )  # fmt: skip
    figure.text(0.5, 1 - 0.08 / height, heading, ha="center", va="top", fontsize=10, parse_math=False)
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            draw_panel(figure.add_subplot(grid[i, j]), panel)
    return figure


def draw_panel(axes: Any, panel: Panel) -> None:
    """One picture and its map, or words, on matplotlib `axes`."""
    axes.set_xticks([])
    axes.set_yticks([])

    # the picture, in grey where a map lies over it
    if panel.picture is None:
        axes.text(0.04, 0.5, panel.words, va="center", fontsize=7, transform=axes.transAxes, parse_math=False)
    elif panel.heat is None:
        axes.imshow(panel.picture.numpy(), interpolation="bicubic")
    else:
        height, width = panel.picture.shape[:2]
        axes.imshow(panel.picture.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
        heat = spread(upsample(panel.heat[None].float().cpu(), height, width))[0]
        axes.imshow(heat.numpy(), cmap="RdYlBu_r", vmin=0, vmax=1, alpha=0.68, interpolation="bilinear")

    # boxes may reach over the edge, which must not rescale the axes
    for (x, y, across, down), colour in panel.boxes:
        corners = ([x, x + across, x + across, x, x], [y, y, y + down, y + down, y])
        axes.plot(*corners, color=colour, linewidth=1.4, clip_on=False, scalex=False, scaley=False)
    for side in axes.spines.values():
        side.set(color="0.8", linewidth=0.6)
    axes.set_title(panel.above, fontsize=8, pad=3, parse_math=False)
    axes.set_xlabel(panel.below, fontsize=7, labelpad=2, color="0.35", parse_math=False)


@dataclass(frozen=True)
class Scene:
    """A picture of four pictures, the caption of each quarter (row-major), and which quarter is asked for."""

    image: Image.Image
    words: tuple[str, str, str, str]
    asked: int


def quarter(height: int, width: int, index: int) -> tuple[slice, slice]:
    """Rows and columns of quarter `index` (0 1 / 2 3) of a (height, width) map; an odd middle line is in none."""
    down, across = height // 2, width // 2
    rows = slice(0, down) if index < 2 else slice(height - down, height)

    # an odd line in the middle belongs to no quarter
    return rows, slice(0, across) if index % 2 == 0 else slice(width - across, width)


def one_of_each_id(rows: Sequence[Row], count: int, seed: int = 0) -> list[Row]:
    """`count` rows in seeded order, ids that have not come yet before ids that have; a row without an id is its own.

    Reads no more rows than it needs when there are `count` different ids.
    """
    seen: set[Any] = set()
    new: list[Row] = []
    known: list[Row] = []
    for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist():
        row = rows[index]
        key = _key(row, index)
        (known if key in seen else new).append(row)
        seen.add(key)
        if len(new) == count:
            break
    return (new + known)[:count]


def own_and_foreign_captions(rows: Sequence[Row], count: int, seed: int = 0) -> tuple[list[Any], list[list[str]]]:
    """`count` pictures, and for each the captions to ask of it: first its own, then those of two others."""
    chosen = one_of_each_id(rows, count, seed)
    captions = [str(row["captions"][0]) for row in chosen]
    number = len(chosen)

    # the captions of the two pictures that follow; equal ones are asked once
    texts = [list(dict.fromkeys(captions[(i + step) % number] for step in range(3))) for i in range(number)]
    return [row["image"] for row in chosen], texts


def images_and_texts(
    queries: Sequence[tuple[Any, Sequence[str]]] | None, rows: Sequence[Row], count: int, seed: int = 0
) -> tuple[list[Any], list[list[str]]]:
    """The images of a sheet and the texts to ask of each: those of `queries`, or else drawn from the rows."""
    if queries is not None:
        return [image for image, _ in queries], [list(texts) for _, texts in queries]
    return own_and_foreign_captions(rows, count, seed)


def _key(row: Row, index: int) -> Any:
    return ("row", index) if row.get("id") is None else row["id"]


def draw_scenes(rows: Sequence[Row], count: int, seed: int = 0, side: int = 128) -> list[Scene]:
    """`count` scenes of four pictures with four different ids, `side` pixels a quarter, one asked for at random.

    The cheapest picture with several meanings and a known place for each (the paper's Figure 1 shows real ones).

    Raises:
        ValueError: the rows hold fewer than four different ids.
    """
    # rows by id, since the four of a scene must differ
    pool = one_of_each_id(rows, 4 * count, seed)
    by_id: dict[Any, list[Row]] = {}
    for index, row in enumerate(pool):
        by_id.setdefault(_key(row, index), []).append(row)
    if len(by_id) < 4:
        raise ValueError(f"a scene needs rows of 4 different ids, got {len(by_id)}")

    # every draw comes from one generator, so that a seed gives the same scenes
    edge = side // 16  # white between the pictures
    ids = list(by_id)
    generator = torch.Generator().manual_seed(seed)
    scenes = []
    for _ in range(count):
        canvas = Image.new("RGB", (2 * side, 2 * side), "white")
        captions = []
        for place, which in enumerate(torch.randperm(len(ids), generator=generator)[:4].tolist()):
            same = by_id[ids[which]]
            row = same[int(torch.randint(len(same), (), generator=generator))]
            picture = open_image(row["image"]).resize((side - 2 * edge,) * 2, Image.Resampling.LANCZOS)
            canvas.paste(picture, (side * (place % 2) + edge, side * (place // 2) + edge))
            captions.append(str(row["captions"][0]))
        scenes.append(Scene(canvas, tuple(captions), int(torch.randint(4, (), generator=generator))))
    return scenes
