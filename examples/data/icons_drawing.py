"""Icons drawn: SVG bodies as small PNG on white, and which drawings look alike."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

SIDE = 16  # of the small copies that are compared
ALIKE = 0.04  # root mean square difference of two of them, of black and white 1
CHUNK = 128  # with 200,000 others, 100 MB


def svg(icon: Mapping[str, Any], size: int) -> str:
    """A whole document of an icon's body; what is not square stands in the middle of a square."""
    box = f"{icon['left']} {icon['top']} {icon['width']} {icon['height']}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{size}" height="{size}">{icon["body"]}</svg>'
    )


def draw(icon: Mapping[str, Any], size: int) -> bytes | str:
    """
    PNG (size, size) of an icon on white, currentColor in black, in greys where it has no colour; or why not.

    Raises:
        ImportError: without resvg-py.
    """
    import resvg_py

    # No fonts of this machine: letters set as text are not drawn, here as elsewhere.
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
    """(SIDE * SIDE,) greys, whole numbers in 0..255."""
    image = Image.open(BytesIO(png)).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(image, np.float32).reshape(-1)


def have_twins(copies: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) whether one of the others (M, D) looks like each of the copies (N, D)."""
    found = np.zeros(len(copies), bool)
    if not len(others):
        return found
    # Sums of 256 products of 8 bits are exact in float32: the answer depends on no machine.
    limit = (255 * ALIKE) ** 2 * copies.shape[1]
    squares = np.square(others).sum(1)  # (M,)
    for start in range(0, len(copies), CHUNK):
        some = copies[start : start + CHUNK]
        distances = squares - 2 * some @ others.T  # (n, M), but for the square of each
        found[start : start + CHUNK] = distances.min(1) + np.square(some).sum(1) < limit
    return found
