"""A font that has the letters of a text: Pillow's own has little beyond ASCII."""

from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from PIL import ImageFont
from transformers.utils import logging

logger = logging.get_logger(__name__)

# files that Pillow finds among the system's by their names alone: Linux, Windows, macOS
USUAL = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "arial.ttf", "Arial Unicode.ttf")
NOWHERE = chr(0x10FFFF)  # no character, which every font draws as it draws what it lacks


def font(size: int, text: str = "") -> Any:
    """
    Pillow's own font at `size` pixels, or the first installed one that has every character of `text`; the one that has
    most of them where none has all, which is said once.
    """
    needed = frozenset(one for one in text if one.isprintable() and not one.isspace())
    return _loaded(_file_with(needed), size)


@lru_cache
def _loaded(file: str | None, size: int) -> Any:
    return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)


@lru_cache
def _file_with(needed: frozenset[str]) -> str | None:
    best = None
    missing = _lacking(None, needed)
    if not missing:
        return best
    for file in _installed():
        lacking = _lacking(file, needed)
        if len(lacking) < len(missing):
            best = file
            missing = lacking
        if not missing:
            return best
    shown = "".join(sorted(missing))[:20]
    advice = "install one of the script" if _has_matplotlib() else "pip install matplotlib, which finds more fonts"
    logger.warning_once(f"no font was found that has {shown!r}: drawn as boxes; {advice}")
    return best


def _has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


def _installed() -> Iterator[str]:
    """Files of fonts: matplotlib's DejaVu, then the system's, by name; without matplotlib those that are usual."""
    if not _has_matplotlib():
        yield from USUAL
        return
    from matplotlib import font_manager

    yield from (font_manager.findfont("DejaVu Sans"), *sorted(font_manager.findSystemFonts()))


def _lacking(file: str | None, needed: frozenset[str]) -> frozenset[str]:
    """Those characters that a font draws as its box; all, of one that Pillow cannot read."""
    try:
        face = _loaded(file, 12)
        box = bytes(face.getmask(NOWHERE))
        return frozenset(one for one in needed if bytes(face.getmask(one)) == box)
    except (OSError, ValueError):
        return needed
