"""A font that has the letters of a text: Pillow's own has Latin ones alone."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from PIL import ImageFont
from transformers.utils import logging

logger = logging.get_logger(__name__)

# what Pillow's own font has: Latin with its accents, and marks of punctuation
LATIN = frozenset([*range(0x20, 0x180), *map(ord, "‘’“”–—…•")])


def font(size: int, text: str = "") -> Any:
    """
    Pillow's own font at `size` pixels, or the first installed one that has every character of `text`; the one that has
    most of them where none has all, which is said once.
    """
    needed = frozenset(ord(character) for character in text if character.isprintable())
    file = None if needed <= LATIN else _file_with(needed)
    return _loaded(file, size)


@lru_cache
def _loaded(file: str | None, size: int) -> Any:
    return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)


@lru_cache
def _file_with(needed: frozenset[int]) -> str | None:
    best, most = None, len(needed & LATIN)
    for file, characters in _installed():
        found = len(needed & characters)
        if found == len(needed):
            return file
        if found > most:
            best, most = file, found
    missing = "".join(map(chr, sorted(needed - (_characters(best) if best else LATIN))))
    logger.warning_once(f"no installed font has {missing[:20]!r}: drawn as boxes; install one of the script")
    return best


def _installed() -> Iterator[tuple[str, frozenset[int]]]:
    """Files and their characters: matplotlib's DejaVu, then the system's, by name; none without matplotlib."""
    try:
        from matplotlib import font_manager
    except ImportError:
        return
    for file in [font_manager.findfont("DejaVu Sans"), *sorted(font_manager.findSystemFonts())]:
        if characters := _characters(file):
            yield file, characters


@lru_cache
def _characters(file: str) -> frozenset[int]:
    """Code points that a font file has; none of one that FreeType or Pillow cannot read."""
    from matplotlib.ft2font import FT2Font

    try:
        ImageFont.truetype(file, 12)
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
