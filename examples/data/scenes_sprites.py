"""Sprites of the scenes: the embedded emoji, cut out of their white paper to be pasted onto a background.

A sprite is a drawing of one concept in one style, RGBA, cropped so that its pixels touch all four edges of its box.
"""

from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from scenes_concepts import concept_table

EMOJI = Path(__file__).resolve().parent / "emoji"
COLUMNS = ["hexcode", "vendor", "license", "image"]
# The style that training never shows, OpenMoji, has its own file.
STYLE_FILES = {
    "train": ("train", "train_extra"),
    "unseen_style": ("test_style",),
    "unseen_concepts": ("test_concept",),
}
LEFT_OUT = ("streamline",)  # a set of drawings that is reserved for other measurements
BATCH = 16  # drawings cut out at a time: they fit into the CPU's cache
PAPER = 245  # a pixel at least this bright in all channels may be paper


@dataclass(frozen=True, eq=False)
class Sprite:
    """One drawing: `image` RGBA (height, width), `rim` the mean RGB of its outline, which needs contrast."""

    hexcode: str
    style: str
    license: str
    image: Image.Image
    rim: tuple[float, float, float]

    @property
    def aspect(self) -> float:
        return self.image.width / self.image.height


def cut_out(pixels: np.ndarray) -> np.ndarray:
    """RGBA (N, H, W, 4) of drawings on white (N, H, W, 3): paper that touches the border becomes transparent.

    White inside an outline stays. A pixel p at the rim is treated as a mixture p = a c + (1 - a) 255, where c is the
    darkest pixel next to it, and gets the colour c and the opacity a, so that no white fringe is left.
    """
    # Paper: white pixels that are connected to the border.
    pixels = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)  # (N, H + 2, W + 2, 3)
    red, green, blue = (np.ascontiguousarray(pixels[..., channel]) for channel in range(3))
    bright = np.minimum(np.minimum(red, green), blue) >= PAPER
    paper = np.zeros_like(bright)
    paper[:, 0] = True
    while not np.array_equal(grown := _grown(paper) & bright, paper):
        paper = grown

    # Rim: pixels next to paper; their colour is that of their darkest neighbour.
    rim = _grown(paper) & ~paper
    light = np.where(paper, 765, red.astype(np.int16) + green + blue)
    places = np.arange(light.size).reshape(light.shape)
    darkest, source = light.copy(), places.copy()
    for axis, step in ((1, 1), (1, -1), (2, 1), (2, -1)):
        beside = np.roll(light, step, axis)
        darker = rim & (beside < darkest)
        darkest[darker] = beside[darker]
        source[darker] = np.roll(places, step, axis)[darker]

    # Opacity: how far the pixel is from white to that colour.
    gone = (765 - light) / np.maximum(765 - darkest, 1)
    alpha = np.where(paper, 0, np.where(rim, np.clip(gone, 0, 1), 1))
    colour = pixels.reshape(-1, 3)[source]
    cut = np.concatenate([colour, np.rint(alpha * 255).astype(np.uint8)[..., None]], -1)
    return cut[:, 1:-1, 1:-1]  # (N, H, W, 4)


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask (N, H, W) with the four neighbours of each of its pixels."""
    grown = mask.copy()
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    grown[:, :, 1:] |= mask[:, :, :-1]
    grown[:, :, :-1] |= mask[:, :, 1:]
    return grown


@cache
def load_sprites(part: str) -> dict[str, tuple[Sprite, ...]]:
    """Sprites of each concept (hexcode), in a fixed order.

    Args:
        part: "train", the styles and concepts of training; "unseen_style"; "unseen_concepts".
    """
    rows = []
    for name in STYLE_FILES[part]:
        rows += pq.read_table(EMOJI / f"{name}.parquet", columns=COLUMNS).to_pylist()
    rows = [row for row in rows if row["hexcode"] in concept_table() and row["vendor"] not in LEFT_OUT]
    rows.sort(key=lambda row: (row["hexcode"], row["vendor"]))
    opened = [np.asarray(Image.open(BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
    cut = (
        pixels for start in range(0, len(opened), BATCH) for pixels in cut_out(np.stack(opened[start : start + BATCH]))
    )
    sprites: dict[str, list[Sprite]] = {}
    for row, pixels in zip(rows, cut, strict=True):
        sprites.setdefault(row["hexcode"], []).append(_cropped(row, pixels))
    return {hexcode: tuple(found) for hexcode, found in sprites.items()}


def _cropped(row: dict[str, Any], pixels: np.ndarray) -> Sprite:
    """The sprite of a row, cropped from its RGBA pixels (H, W, 4)."""
    solid = pixels[..., 3] >= 128
    top, bottom = np.flatnonzero(solid.any(1))[[0, -1]]
    left, right = np.flatnonzero(solid.any(0))[[0, -1]]
    pixels, solid = pixels[top : bottom + 1, left : right + 1], solid[top : bottom + 1, left : right + 1]
    inside = np.pad(solid, 1)
    rim = solid & _grown(~inside[None])[0, 1:-1, 1:-1]
    colour = tuple(float(channel) for channel in pixels[rim][:, :3].mean(0))
    return Sprite(row["hexcode"], row["vendor"], row["license"], Image.fromarray(pixels), colour)
