"""Turns localisation maps into boxes: scores of boxes, the best rectangle, IoU, and an overlay image.

h x w cells of a map, H x W pixels of an image, n boxes. A box is (x, y, width, height) in pixels, as in COCO.
Source: ALBEF's and SIMLA's evaluation of RefCOCO+ (dataset/utils.py); the rectangle search is ours.
"""

from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

Box = Sequence[float]

# low to high: dark blue, light blue, yellow, red
_COLOURS = np.array([[49, 54, 149], [116, 173, 209], [254, 224, 144], [165, 0, 38]], dtype=np.float64)


def resize_map(cells: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(h, w) -> (H, W), bicubic as in the official evaluation; it may overshoot, also below zero."""
    return F.interpolate(cells[None, None].float(), (height, width), mode="bicubic", align_corners=False)[0, 0]


def box_reason(box: Box) -> str | None:
    """Why a box is invalid; None if it is valid."""
    numbers = isinstance(box, Sequence) and len(box) >= 4 and all(isinstance(side, Real) for side in box[:4])
    if not numbers or not all(np.isfinite(box[:4])):
        return f"a box is (x, y, width, height), got {box!r:.60}"
    return None if box[2] > 0 and box[3] > 0 else f"a box needs a width and a height above 0, got {list(box[:4])}"


def score_boxes(pixels: torch.Tensor, boxes: Sequence[Box], exponent: float = 0.5) -> torch.Tensor:
    """
    The sum of a map (H, W) inside each box, divided by area ** `exponent`: a compromise between the sum, which favours
    large boxes, and the mean, which favours small ones. Corners are truncated to whole pixels. -> (n,)

    Raises:
        ValueError: there are no boxes, or one is invalid.
    """
    if not len(boxes):
        raise ValueError("there are no boxes to score")
    scores = []
    for box in boxes:
        if (reason := box_reason(box)) is not None:
            raise ValueError(reason)
        # truncated to whole pixels inside the image
        x, y, width, height = box[:4]
        inside = pixels[max(int(y), 0) : max(int(y + height), 0), max(int(x), 0) : max(int(x + width), 0)]
        scores.append(inside.sum() / (width * height) ** exponent)
    return torch.stack(scores)


def box_iou(one: Box, other: Box) -> float:
    """Intersection over union, with pixels counted inclusively as in the official evaluation: boxes that share only
    one row or column of pixels do not overlap."""
    left = max(one[0], other[0])
    top = max(one[1], other[1])
    right = min(one[0] + one[2] - 1, other[0] + other[2] - 1)
    bottom = min(one[1] + one[3] - 1, other[1] + other[3] - 1)
    both = (right - left + 1) * (bottom - top + 1) if left < right and top < bottom else 0
    return both / (one[2] * one[3] + other[2] * other[3] - both)


def best_rectangle(cells: torch.Tensor, exponent: float = 0.5) -> tuple[int, int, int, int]:
    """The rectangle of cells (top, left, bottom, right) with the highest sum / area ** `exponent` of all rectangles;
    bottom and right are exclusive. It is the choice among the boxes of a perfect detector."""
    height, width = cells.shape
    total = F.pad(cells.double().cumsum(0).cumsum(1), (1, 0, 1, 0))  # (h + 1, w + 1)
    rows = torch.triu_indices(height + 1, height + 1, 1)  # (2, rectangles down), first and end
    columns = torch.triu_indices(width + 1, width + 1, 1)  # (2, rectangles across)
    bands = total[rows[1]] - total[rows[0]]  # (rectangles down, w + 1)
    sums = bands[:, columns[1]] - bands[:, columns[0]]  # (rectangles down, rectangles across)
    areas = (rows[1] - rows[0])[:, None] * (columns[1] - columns[0])[None]  # (rectangles down, rectangles across)
    best = int((sums / areas.double() ** exponent).argmax())
    down, across = divmod(best, sums.shape[1])
    return int(rows[0, down]), int(columns[0, across]), int(rows[1, down]), int(columns[1, across])


def rectangle_box(cells: torch.Tensor, height: int, width: int, exponent: float = 0.5) -> tuple[float, ...]:
    """`best_rectangle` of a map (h, w) as a box in its image of H x W pixels."""
    top, left, bottom, right = best_rectangle(cells, exponent)
    down = height / cells.shape[0]
    across = width / cells.shape[1]
    return left * across, top * down, (right - left) * across, (bottom - top) * down


def overlay_map(picture: Image.Image, cells: torch.Tensor, box: Box | None = None) -> Image.Image:
    """The image in grey, overlaid with its map, scaled from blue (minimum) to red (maximum), and the box."""
    # the map in colours, scaled to its own range
    width, height = picture.size
    heat = resize_map(cells.cpu(), height, width).clamp_min(0)  # (H, W)
    heat = ((heat - heat.min()) / (heat.max() - heat.min()).clamp_min(1e-12)).numpy().astype(np.float64)
    stops = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(heat, stops, _COLOURS[:, channel]) for channel in range(3)], axis=-1)  # (H, W, 3)
    grey = np.asarray(picture.convert("L"), dtype=np.float64)[..., None]
    drawn = Image.fromarray((0.45 * grey + 0.55 * colours).round().astype(np.uint8))

    # the part of the box inside the image
    if box is not None:
        line = max(1, round(min(width, height) / 120))
        x, y, across, down = box[:4]
        corners = (max(x, 0), max(y, 0), min(x + across, width) - 1, min(y + down, height) - 1)
        if corners[0] <= corners[2] and corners[1] <= corners[3]:
            ImageDraw.Draw(drawn).rectangle(corners, outline=(0, 255, 0), width=line)
    return drawn


__all__ = ["best_rectangle", "box_iou", "box_reason", "overlay_map", "rectangle_box", "resize_map", "score_boxes"]
