"""Draws icons, from SVG bodies to small PNG on white, and finds drawings that look alike."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

SIDE = 16  # side of the small copies that are compared
ALIKE = 0.04  # root mean square difference below which copies look alike; 1 for black and white
CHUNK = 128  # with 200,000 others, 100 MB


def svg(icon: Mapping[str, Any], size: int) -> str:
    """A complete SVG document of an icon's body; an icon that is not square is centred in a square."""
    box = f"{icon['left']} {icon['top']} {icon['width']} {icon['height']}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{size}" height="{size}">{icon["body"]}</svg>'
    )


def draw(icon: Mapping[str, Any], size: int) -> bytes | str:
    """
    PNG (size, size) of an icon on white, currentColor in black, greyscale if it has no colour; or the reason for none.

    Raises:
        ImportError: resvg-py is not installed.
    """
    import resvg_py

    # No system fonts: text elements are drawn on no machine, so the result is the same on all.
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg(icon, size), background="#ffffff", skip_system_fonts=True)
    except ValueError as error:
        return f"not drawn: {str(error).splitlines()[0]}"
    pixels = np.asarray(Image.open(BytesIO(png)).convert("RGB"))  # (size, size, 3)
    if pixels.min() == pixels.max():
        return "blank"
    grey = np.ptp(pixels, axis=-1).max() == 0
    buffer = BytesIO()
    Image.fromarray(pixels[..., 0] if grey else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def small_copy(png: bytes) -> np.ndarray:
    """Small greyscale copy, (SIDE * SIDE,), whole numbers in 0..255."""
    image = Image.open(BytesIO(png)).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(image, np.float32).reshape(-1)


def have_twins(copies: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each of the copies (N, D), whether one of the others (M, D) looks like it. -> (N,)."""
    found = np.zeros(len(copies), bool)
    if not len(others):
        return found
    # Sums of 256 products of 8 bits are exact in float32: the result is the same on every machine.
    limit = (255 * ALIKE) ** 2 * copies.shape[1]
    squares = np.square(others).sum(1)  # (M,)
    for start in range(0, len(copies), CHUNK):
        some = copies[start : start + CHUNK]
        distances = squares - 2 * some @ others.T  # (n, M), without the squares of `some`
        found[start : start + CHUNK] = distances.min(1) + np.square(some).sum(1) < limit
    return found
