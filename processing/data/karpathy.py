"""Reads COCO and Flickr30k, in the files of their retrieval benchmarks, as rows of pairs.

Karpathy's JSON (`dataset_coco.json`, `dataset_flickr30k.json`): {"images": [{"filepath", "filename", "split",
"sentences": [{"raw"}, ...]}, ...]}; only COCO has "filepath". Its split "train" includes "restval", together the
113,287 training images.

ALBEF's JSON: a list of {"image", "caption", "image_id"}; training files have one caption per entry, evaluation files
a list of all captions of an image and no id. A file holds one split.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets

from .row_checks import SHOWN, PairDataError, report, text_reason
from .rows import PairTable
from .task_files import read_json
from .text_tables import is_utf8

COLUMNS = {"image": "image", "text": "captions", "id": "id"}


class Entry(NamedTuple):
    """An image with its captions, unchecked, and its name in messages; without an id, the path identifies it."""

    image: Any
    captions: Any
    id: Any
    place: str


def open_karpathy(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    image_folder: str | os.PathLike | None = None,
    split: str | None = None,
    captions_apart: bool = False,
    bad_rows: Literal["raise", "skip"] = "raise",
) -> PairTable:
    """
    The rows of one or several annotation files, {"image", "captions", "id"}; rows of one image share an id.

    Args:
        files: Karpathy's or ALBEF's JSON.
        image_folder: folder that image paths are relative to; by default the folder of their file.
        split: split of Karpathy's JSON: "train" (with "restval"), "val" or "test".
        captions_apart: one row per caption, for training (an epoch then shows every caption), instead of one row per
            image with all its captions, for evaluation.
        bad_rows: as in `open_rows`.

    Raises:
        PairDataError: a file is not such JSON, the split does not exist, or rows are bad.
    """
    # columns with a cell for each row, good or bad
    files = [files] if isinstance(files, str | os.PathLike) else list(files)
    columns: dict[str, list] = {"image": [], "captions": [], "id": []}
    reasons: dict[int, str] = {}
    for file in map(Path, files):
        folder = file.parent if image_folder is None else Path(image_folder)
        for entry in _entries(file, split):
            for captions in _rows_of(entry, captions_apart):
                _add(columns, reasons, entry, captions, folder)

    # errors name rows by their positions in the files
    name = str(files[0]) + (f" (+{len(files) - 1})" if files[1:] else "") + (f", split {split}" if split else "")
    if not columns["id"]:
        raise PairDataError(f"{name}: no rows")
    if reasons and bad_rows == "raise":
        raise PairDataError(report(name, list(reasons.items())[:SHOWN], len(reasons), len(columns["id"])))

    # a table in which bad rows keep their numbers
    text = datasets.Value("string")
    features = datasets.Features({"image": text, "captions": datasets.Sequence(text), "id": text})
    return PairTable(datasets.Dataset.from_dict(columns, features), COLUMNS, name, None, bad_rows, reasons)


def _entries(file: Path, split: str | None) -> Iterator[Entry]:
    """The images of a file, or those of `split` if it has several splits."""
    content = read_json(str(file))

    # the top-level type distinguishes the two formats
    if isinstance(content, list):
        yield from (_albef_entry(number, entry) for number, entry in enumerate(content))
    elif isinstance(content, dict) and isinstance(content.get("images"), list):
        yield from _karpathy_entries(file, content["images"], split)
    else:
        what = f"an object with {sorted(content)[:SHOWN]}" if isinstance(content, dict) else type(content).__name__
        raise PairDataError(f"{file}: expected a list of entries (ALBEF) or an object with `images`, got {what}")


def _karpathy_entries(file: Path, images: list[Any], split: str | None) -> Iterator[Entry]:
    # check the split
    splits = sorted({str(image.get("split")) for image in images if isinstance(image, dict)})
    if split not in splits and not (split is None and len(splits) == 1):
        what = "holds several splits" if split is None else f"has no split {split!r}"
        raise PairDataError(f"{file} {what}; choose one of {splits}")
    wanted = {split or splits[0]} | ({"restval"} if split == "train" else set())

    # its images, with their names in messages
    for number, image in enumerate(images):
        if not isinstance(image, dict):
            yield Entry(None, None, None, f"image {number} ({image!r:.40}, expected an object)")
        elif str(image.get("split")) in wanted:
            name, sentences = image.get("filename"), image.get("sentences")
            folder = image.get("filepath") or ""
            path = os.path.join(folder, name) if isinstance(name, str) and isinstance(folder, str) else None
            if isinstance(sentences, list):
                sentences = [one.get("raw") if isinstance(one, dict) else one for one in sentences]
            yield Entry(path, sentences, None, f"image {number} ({name})")


def _albef_entry(number: int, entry: Any) -> Entry:
    if not isinstance(entry, dict):
        return Entry(None, None, None, f"entry {number} ({entry!r:.40}, expected an object)")
    image = entry.get("image")
    return Entry(image, entry.get("caption"), entry.get("image_id"), f"entry {number} ({image})")


def _rows_of(entry: Entry, captions_apart: bool) -> list[Any]:
    if captions_apart and isinstance(entry.captions, list) and entry.captions:
        return [[caption] for caption in entry.captions]
    return [entry.captions]


def _add(columns: dict[str, list], reasons: dict[int, str], entry: Entry, captions: Any, folder: Path) -> None:
    """Appends one row; a bad row keeps its number, with empty cells."""
    # all reasons why it is bad
    wrong = text_reason(captions)
    if not isinstance(entry.image, str):
        wrong = "; ".join(filter(None, (wrong, f"the picture must be a path, got {type(entry.image).__name__}")))
    elif not is_utf8(entry.image) or not is_utf8(str(entry.id)):
        wrong = "; ".join(filter(None, (wrong, "its path or id holds a lone surrogate, which is no text")))
    if wrong:
        reasons[len(columns["id"])] = f"{entry.place}: {wrong}"

    # the row, with empty cells if it is bad
    image = "" if wrong else os.path.join(folder, entry.image)
    columns["image"].append(image)
    columns["captions"].append([] if wrong else [captions] if isinstance(captions, str) else captions)
    # the path, because images in the folders of two files may have the same name
    identity = os.path.normpath(image) if entry.id is None else str(entry.id)
    columns["id"].append("" if wrong else identity)
