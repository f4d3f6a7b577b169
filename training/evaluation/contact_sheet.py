"""Draws contact sheets of search results with Pillow: a query above its answers.

Any kind of index item can be shown: a path, a row of a table, or a text.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from oner.processing.data.same_pictures import ROW
from oner.processing.data.sources import open_rows
from oner.processing.image_processing_vl import open_image
from oner.processing.retrieval_page import caption_of
from oner.processing.retrieval_sources import SHEET_MARK

from .fonts import font

COLUMNS, CELL, GAP, PICTURE = 4, 224, 16, 168
PAPER, CARD, INK, GREY, EDGE, ACCENT = "#f4f2ee", "#ffffff", "#22252a", "#7a7f87", "#dedbd4", "#c2410c"

READING = "open_rows"  # of an item from a table whose columns or split are named: what it is opened with
# a sheet asks for pictures and not for ids, so that rows of one picture are no news
open_table = lru_cache(partial(open_rows, bad_rows="skip", id_column=ROW))


def save_sheet(sheet: Image.Image, file: str | Path) -> None:
    """Writes a sheet; a PNG is marked as a sheet, so that no index includes it as a picture."""
    says = PngInfo()
    says.add_text("Software", SHEET_MARK.decode())
    sheet.save(file, **({"pnginfo": says} if Path(file).suffix.lower() == ".png" else {}))


def picture_of(item: Any) -> Image.Image | None:
    try:
        if isinstance(item, dict) and "table" in item:
            item = open_table(item["table"], **item.get(READING, {}))[item["row"]]["image"]
        elif isinstance(item, dict):
            item = item.get("image")
        return open_image(item)
    except (ValueError, IndexError):
        return None  # a text, or a picture that no longer exists


def draw_sheet(query: dict[str, str], answers: list[dict[str, Any]], total: int) -> Image.Image:
    """The query above, its answers below in a grid, each with its rank, caption and score."""
    columns = min(COLUMNS, max(3, len(answers)))
    width, head = GAP + columns * (CELL + GAP), CELL if "image" in query else 112
    cell_height = PICTURE + 92
    rows = -(-len(answers) // columns)
    sheet = Image.new("RGB", (width, GAP + head + GAP + rows * (cell_height + GAP)), PAPER)
    draw, note = ImageDraw.Draw(sheet), f"{len(answers)} nearest of {total}"
    draw_query(sheet, draw, query, note, (GAP, GAP, width - GAP, GAP + head))
    for place, answer in enumerate(answers):
        left = GAP + place % columns * (CELL + GAP)
        top = head + 2 * GAP + place // columns * (cell_height + GAP)
        card(draw, (left, top, left + CELL, top + cell_height))
        paste(sheet, draw, picture_of(answer["item"]), (left + (CELL - PICTURE) // 2, top + 12))
        caption = caption_of(answer["item"])
        face = font(16, caption)
        lines = wrap(caption, face, CELL - 24, 2)
        middle = top + PICTURE + 42 - 10 * (len(lines) - 1)
        for number, line in enumerate(lines):
            draw.text((left + CELL // 2, middle + 20 * number), line, INK, face, anchor="mm")
        draw.text((left + CELL // 2, top + cell_height - 18), f"{answer['score']:+.3f}", GREY, font(14), anchor="mm")
        draw.text((left + 10, top + 8), str(place + 1), ACCENT if place == 0 else GREY, font(14))
    return sheet


def draw_query(sheet: Image.Image, draw: ImageDraw.ImageDraw, query: dict, note: str, box: tuple) -> None:
    card(draw, box)
    left, top, right, bottom = box
    if "image" in query:
        paste(sheet, draw, open_image(query["image"]), (left + 28, (top + bottom - PICTURE) // 2))
        left += PICTURE + 28
    left += 28
    kind = "words + picture, one query" if len(query) == 2 else "words" if "text" in query else "picture"
    words = f"“{query['text']}”" if "text" in query else Path(query["image"]).name
    face = font(30, words)
    lines = wrap(words, face, right - left - 28, 2 if "image" in query else 1)
    middle = (top + bottom) // 2 - 18 * (len(lines) - 1)
    draw.text((left, middle - 34), kind.upper(), ACCENT, font(13), anchor="lm")
    for number, line in enumerate(lines):
        draw.text((left, middle + 36 * number), line, INK, face, anchor="lm")
    draw.text((left, middle + 36 * len(lines)), note, GREY, font(15), anchor="lm")


def card(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int]) -> None:
    draw.rounded_rectangle(box, radius=10, fill=CARD, outline=EDGE)


def paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, picture: Image.Image | None, corner: tuple[int, int]) -> None:
    """Fits a picture into a square of side PICTURE, keeping its aspect ratio."""
    if picture is None:
        draw.text((corner[0] + PICTURE // 2, corner[1] + PICTURE // 2), "no picture", GREY, font(15), anchor="mm")
        return
    scale = PICTURE / max(picture.size)
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    sheet.paste(picture, (corner[0] + (PICTURE - picture.width) // 2, corner[1] + (PICTURE - picture.height) // 2))


def wrap(text: str, face: Any, width: int, most: int) -> list[str]:
    """Wraps a text into at most `most` lines of `width` pixels; a longer text ends in an ellipsis."""
    lines, words = [""], " ".join(text.split()).split(" ")
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and face.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    for number, line in enumerate(lines):
        while face.getlength(lines[number]) > width:
            line = line[:-1]
            lines[number] = line.rstrip() + "…"
    return lines


def retrieval_sheet(lines: Sequence[tuple[str, Sequence[tuple[Any, bool]]]], title: str) -> Image.Image:
    """
    Words at the left of what they found, a line each; `lines` hold the words, and pictures as `open_image` takes them,
    with whether they are right, best first.

    Raises:
        ValueError: a picture cannot be read.
    """
    columns = max(len(found) for _, found in lines)
    side = PICTURE + 2 * GAP
    sheet = Image.new("RGB", (2 * CELL + columns * side + GAP, 48 + len(lines) * side), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 24), title, GREY, font(15), anchor="lm")
    for number, (words, found) in enumerate(lines):
        top = 48 + number * side
        face = font(20, words)
        written = wrap(words, face, 2 * CELL - 3 * GAP, 4)
        for place, line in enumerate(written):
            draw.text((GAP, top + side // 2 + 26 * place - 13 * (len(written) - 1)), line, INK, face, anchor="lm")
        for place, (picture, right) in enumerate(found):
            left = 2 * CELL + place * side
            card(draw, (left, top, left + side - GAP // 2, top + side - GAP // 2))
            if right:
                frame = (left, top, left + side - GAP // 2, top + side - GAP // 2)
                draw.rounded_rectangle(frame, radius=10, outline=ACCENT, width=4)
            paste(sheet, draw, open_image(picture), (left + 3 * GAP // 4, top + 3 * GAP // 4))
    return sheet
