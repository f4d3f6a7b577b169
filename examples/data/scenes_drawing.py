"""Draws a layout: a background, and the sprites on it. For speed, a process resizes each sprite once per size."""

from functools import lru_cache

import numpy as np
from PIL import Image
from scenes_layout import Background, Box, Layout
from scenes_sprites import Sprite

STRIPES = 8  # per side; dots likewise
MARK = -26  # how much darker stripes and dots are than the background
FADE = 34.0  # how much lighter a fading background becomes towards one end


def render(layout: Layout, size: int) -> Image.Image:
    """The image of a layout, RGB, `size` pixels per side."""
    canvas = Image.fromarray(paint_background(layout.background, size))
    for group in layout.groups:
        for box in group.boxes:
            left, top, width, height = pixel_box(box, size)
            sprite = resized(group.sprite, width, height)
            if group.flipped:
                sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            canvas.paste(sprite, (left, top), sprite)
    return canvas


def pixel_box(box: Box, size: int) -> tuple[int, int, int, int]:
    """(x, y, width, height) in whole pixels, inside the image."""
    width, height = max(1, round(box[2] * size)), max(1, round(box[3] * size))
    left, top = round(box[0] * size), round(box[1] * size)
    return min(max(left, 0), size - width), min(max(top, 0), size - height), width, height


@lru_cache(maxsize=65_536)
def resized(sprite: Sprite, width: int, height: int) -> Image.Image:
    """The sprite at another size, RGBA."""
    return sprite.image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def paint_background(background: Background, size: int) -> np.ndarray:
    """RGB (size, size, 3)."""
    shade = np.array(background.shade, np.float32)
    change = pattern(background.pattern, background.turn, size)  # (size, size, 1)
    return np.clip(shade + change, 0, 255).astype(np.uint8)


@lru_cache(maxsize=64)
def pattern(name: str, turn: int, size: int) -> np.ndarray:
    """What a pattern adds to the shade, (size, size, 1): it varies down the image or, if `turn`, across it."""
    along = np.arange(size, dtype=np.float32) / size
    if name == "fading":
        change = np.repeat(along[:, None] * FADE, size, 1)
    elif name == "striped":
        change = np.repeat(np.where(along[:, None] * STRIPES % 1 < 0.5, MARK, 0.0), size, 1)
    elif name == "dotted":
        across = along * STRIPES % 1 - 0.5  # distance to the middle of a cell
        change = np.where(across[:, None] ** 2 + across[None] ** 2 < 0.08, MARK, 0.0)
    else:
        change = np.zeros((size, size))
    return np.ascontiguousarray(change.T if turn else change, dtype=np.float32)[..., None]
