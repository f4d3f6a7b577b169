"""Search pictures by words, by a picture, or by both as one query, and draw the answers as a contact sheet.

    python examples/search.py "red fruit" --index photos/
    python examples/search.py --image photo.png --index photos/
    python examples/search.py "made of glass" --image photo.png --index examples/data/emoji/test_style.parquet

The index of a folder or table is kept in a hidden directory beside it and used again until a file's name, size or
time changes, or the model does.
"""

import argparse
import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, pipeline

from oner.processing.data.sources import open_rows
from oner.processing.image_processing_vl import open_image
from oner.processing.pipeline_image_text_retrieval import ImageTextRetrievalPipeline, list_pictures
from oner.processing.retrieval_index import INDEX_FILE, RetrievalIndexError
from oner.training.publishing.model_loading import load_model

DEFAULT_MODEL = Path(__file__).parents[2] / "examples" / "checkpoints" / "oner-emoji"
TABLES = (".parquet", ".csv", ".tsv", ".jsonl")
COLUMNS, CELL, GAP, PICTURE = 4, 224, 16, 168
PAPER, CARD, INK, GREY, EDGE, ACCENT = "#f4f2ee", "#ffffff", "#22252a", "#7a7f87", "#dedbd4", "#c2410c"

open_table = lru_cache(open_rows)


def main() -> None:
    options = read_arguments()
    pipe = load_pipeline(options.model)
    source = Path(options.index).resolve()
    open_index(pipe, source, Path(options.index_cache) if options.index_cache else None)
    query = {key: value for key, value in (("text", options.words), ("image", options.image)) if value}
    answers = pipe(query, top_k=options.top_k)
    print(f"\nrank  score  item, of {len(pipe.retrieval_index)} in {source.name}")
    for rank, answer in enumerate(answers, 1):
        print(f"{rank:4d}  {answer['score']:+.3f}  {caption_of(answer['item'])}")
    draw_sheet(query, answers, len(pipe.retrieval_index)).save(options.out)
    print(f"\ncontact sheet: {options.out}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="?", help="what to look for")
    parser.add_argument("--image", help="a picture to look for; with words, both are one query")
    parser.add_argument("--index", required=True, help="folder of pictures, table of pairs, or a saved index")
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="model directory or name on the Hub")
    parser.add_argument("--top-k", type=int, default=12)
    parser.add_argument("--out", default="results.png", help="where the contact sheet goes")
    parser.add_argument("--index-cache", help="where to keep the index; beside the source by default")
    options = parser.parse_args()
    if not options.words and not options.image:
        parser.error("give words, --image, or both")
    if options.image and not Path(options.image).is_file():
        parser.error(f"--image {options.image}: no such file")
    if not Path(options.index).exists():
        parser.error(f"--index {options.index}: no such folder or file")
    return options


def load_pipeline(model: str) -> ImageTextRetrievalPipeline:
    if Path(model) == DEFAULT_MODEL and not DEFAULT_MODEL.is_dir():
        sys.exit(
            f"no model at {DEFAULT_MODEL}: pass --model with a directory or a name on the Hub, or train a small one "
            "with `make demo` and pass the directory it prints"
        )
    return pipeline(
        "image-text-retrieval",
        model=load_model(AutoModelForZeroShotImageClassification, model),
        processor=AutoProcessor.from_pretrained(model),
    )


def open_index(pipe: ImageTextRetrievalPipeline, source: Path, cache: Path | None) -> None:
    """Loads a saved index, or the one kept for `source` if nothing changed since, or builds and keeps it."""
    if (source / INDEX_FILE).is_file():
        pipe.load_index(source)
        return
    cache = cache or source.parent / f".{source.name}.oner-index"
    listing_file = cache / "indexed_files.json"
    files = list_pictures(source) if source.is_dir() else [str(source)]
    listing = [[str(source)], *([name, Path(name).stat().st_size, Path(name).stat().st_mtime_ns] for name in files)]
    if listing_file.is_file():
        try:
            if json.loads(listing_file.read_text()) == listing:
                print(f"using the index kept in {pipe.load_index(cache) and cache}")
                return
        except (RetrievalIndexError, ValueError) as error:
            print(f"indexing again: {error}")
            for file in (*cache.glob("embeddings-*.safetensors"), cache / INDEX_FILE):
                file.unlink(missing_ok=True)  # what is left of a damaged index must not be in the way
    pipe.index(table_rows(str(source)) if source.suffix in TABLES else source, directory=cache)
    listing_file.write_text(json.dumps(listing))


def table_rows(table: str) -> list[dict[str, Any]]:
    """Each pair's picture, and where it stands with its first caption as the answer to show."""
    rows = enumerate(open_table(table))
    return [{"image": row["image"], "item": {"table": table, "row": i, "text": row["captions"][0]}} for i, row in rows]


def caption_of(item: Any) -> str:
    """The words of an item, a path's stem, or the item as it is."""
    if isinstance(item, dict):
        return str(item.get("text", item))
    return Path(item).stem if isinstance(item, str) and Path(item).suffix else str(item)


def picture_of(item: Any) -> Image.Image | None:
    try:
        if isinstance(item, dict):
            item = open_table(item["table"])[item["row"]]["image"] if "table" in item else item.get("image")
        return open_image(item)
    except (ValueError, IndexError):
        return None  # a text, or a picture that the index outlived


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
        lines = wrap(caption_of(answer["item"]), font(16), CELL - 24, 2)
        middle = top + PICTURE + 42 - 10 * (len(lines) - 1)
        for number, line in enumerate(lines):
            draw.text((left + CELL // 2, middle + 20 * number), line, INK, font(16), anchor="mm")
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
    lines = wrap(words, font(30), right - left - 28, 2 if "image" in query else 1)
    middle = (top + bottom) // 2 - 18 * (len(lines) - 1)
    draw.text((left, middle - 34), kind.upper(), ACCENT, font(13), anchor="lm")
    for number, line in enumerate(lines):
        draw.text((left, middle + 36 * number), line, INK, font(30), anchor="lm")
    draw.text((left, middle + 36 * len(lines)), note, GREY, font(15), anchor="lm")


def card(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int]) -> None:
    draw.rounded_rectangle(box, radius=10, fill=CARD, outline=EDGE)


def paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, picture: Image.Image | None, corner: tuple[int, int]) -> None:
    """Fits a picture into a square of side PICTURE, its proportions kept."""
    if picture is None:
        draw.text((corner[0] + PICTURE // 2, corner[1] + PICTURE // 2), "no picture", GREY, font(15), anchor="mm")
        return
    scale = PICTURE / max(picture.size)
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    sheet.paste(picture, (corner[0] + (PICTURE - picture.width) // 2, corner[1] + (PICTURE - picture.height) // 2))


@lru_cache
def font(size: int) -> Any:
    return ImageFont.load_default(size)


def wrap(text: str, face: Any, width: int, most: int) -> list[str]:
    """Breaks a text into at most `most` lines of `width` pixels; what does not fit ends in an ellipsis."""
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
