"""Parses the queries of a retrieval pipeline and the rows that it indexes, and lists the images of a folder.

A str has one meaning in each: in a query it is a text, in a row to be indexed it is the path of an image.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .vl_captions import caption_reason
from .vl_sources import is_many, iterate, undecoded

# formats that are decoded, and some that are not, which are reported as unreadable
PICTURE_SUFFIXES = frozenset(
    ".apng .avif .avifs .bmp .dib .gif .heic .heif .hif .icns .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg "
    ".jpx .jxl .pbm .pcx .pgm .png .pnm .ppm .psd .tga .tif .tiff .webp".split()
)
# first bytes of image files, for files without such a suffix
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis")
# mark near the beginning of PNG files that oner itself draws
SHEET_MARK = b"oner contact sheet"
SHEET_REASON = "a sheet of pictures that oner drew"
QUERY_KEYS = ("text", "image")
ROW_KEYS = ("text", "image", "item")

LONGEST_PATH = 4096  # characters, Linux's limit; a longer str is an image in base64

Query = dict[str, Any]  # "text", "image" or both; "item" in a row to be indexed


def list_pictures(folder: str | os.PathLike) -> list[str]:
    """All image files under `folder`, by suffix or first bytes, sorted; hidden files are skipped. A folder that cannot
    be read is listed itself, so that opening it reports the error."""
    pictures: list[str] = []

    def note(error: OSError) -> None:
        pictures.append(error.filename)

    # assigned in place, so that os.walk skips hidden folders
    for parent, folders, files in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [os.path.join(parent, name) for name in sorted(files) if not name.startswith(".")]
        pictures += filter(is_picture_file, paths)
    return pictures


def is_picture_file(path: str) -> bool:
    """Whether a file has an image suffix, or is a regular file with the first bytes of an image."""
    if Path(path).suffix.lower() in PICTURE_SUFFIXES:
        return True
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    webp = head[:4] == b"RIFF" and head[8:] == b"WEBP"
    return webp or head.startswith(SIGNATURES) or (head[4:8] == b"ftyp" and head[8:] in BRANDS)


def is_sheet(picture: Any) -> bool:
    """Whether a path is that of a contact sheet, a PNG of other images that oner drew."""
    if not isinstance(picture, (str, os.PathLike)) or not os.fspath(picture).lower().endswith(".png"):
        return False
    try:
        if not os.path.isfile(picture):  # opening a pipe without a writer would block forever
            return False
        with open(picture, "rb") as file:
            return SHEET_MARK in file.read(256)
    except (OSError, ValueError):
        return False


def read_query(query: Any) -> Query:
    """One query of any accepted form → {"text": str} and/or {"image": picture}."""
    # a str is a text; anything else that is not a mapping is an image
    if isinstance(query, str):
        query = {"text": query}
    if not isinstance(query, Mapping):
        return {"image": query}

    # only known keys, with valid values
    values = {key: query[key] for key in QUERY_KEYS if query.get(key) is not None}
    if not values or set(query) - set(QUERY_KEYS):
        raise ValueError(f'a query has the keys "text", "image" or both, got {sorted(map(str, query))}')
    if not isinstance(values.get("text", ""), str):
        raise TypeError(f'"text" of a query must be a str, got {type(values["text"]).__name__}')
    if "text" in values and (reason := caption_reason(values["text"], "text")) is not None:
        raise ValueError(f"the text of a query cannot be read: {reason}")
    return values


def gather_queries(inputs: Any, text: Any, image: Any) -> tuple[Iterator[Query], bool]:
    """The three call forms → queries, parsed lazily, and whether there was a single one."""
    # a positional query of any form, or a list of them
    if isinstance(inputs, str) and text is None:
        text = inputs
        inputs = None
    if inputs is not None:
        if text is not None or image is not None:
            raise ValueError("text= and image= go with each other or one str; for several give text=[..], image=[..]")
        many = is_many(inputs)
        return (read_query(query) for query in (inputs if many else [inputs])), not many

    # by keyword: text= and image= are both single, or lists of one length
    named = {key: value for key, value in (("text", text), ("image", image)) if value is not None}
    if not named:
        raise ValueError('nothing was asked: give a str, a picture, {"text": ..., "image": ...} or a list of them')
    lengths = {len(value) if isinstance(value, Sized) else -1 for value in named.values() if is_many(value)}
    single = not any(map(is_many, named.values()))
    if len(lengths) > 1 or (lengths and not all(map(is_many, named.values()))):
        raise ValueError("text= and image= must both be single, or lists of the same length")
    if single:
        return iter([read_query(named)]), True
    pairs = zip(*named.values(), strict=True)
    return (read_query(dict(zip(named, pair, strict=True))) for pair in pairs), False


def rows_of(source: Any) -> tuple[Iterator[Any], int | None]:
    """A folder or an iterable → its entries, read lazily, and their number if known."""
    # the images of a folder
    if isinstance(source, (str, os.PathLike)):
        if not os.path.isdir(source):
            raise ValueError(f"{os.fspath(source)!r} is not a folder; give a folder or a list of pictures")
        folder, source = source, list_pictures(source)
        if not source:
            raise ValueError(f"no picture under {os.fspath(folder)!r} ({', '.join(sorted(PICTURE_SUFFIXES))})")

    # or any iterable that is not itself an image or row; undecoded, so that a damaged image affects its row only
    source = undecoded(source)
    single = isinstance(source, (bytes, bytearray, Mapping, Image.Image, np.ndarray, torch.Tensor))
    if single or not (isinstance(source, Iterable) or is_many(source)):
        raise TypeError(f"index takes a folder or a list of pictures or rows, got {type(source).__name__}")
    total = len(source) if isinstance(source, Sized) else None
    return (without_further_columns(source) if hasattr(source, "column_names") else iterate(source)), total


def without_further_columns(dataset: Iterable[Mapping]) -> Iterator[Query]:
    """Rows of a `datasets` dataset, with the columns "text", "image" and "item" only."""
    if dataset.column_names is not None and not set(dataset.column_names) & set(QUERY_KEYS):
        raise ValueError(f'a data set needs a column "image" or "text", got {sorted(dataset.column_names)}')
    return ({key: row[key] for key in ROW_KEYS if key in row} for row in dataset)


def read_row(row: Any, position: int) -> Query:
    """One entry of an index source → its query plus "item", the value that answers show for it."""
    # an image alone
    stored_picture = isinstance(row, Mapping) and "bytes" in row and not set(row) - {"bytes", "path"}
    if not isinstance(row, Mapping) or stored_picture:  # {"bytes", "path"}: an image as `datasets` stores it
        return {"image": row, "item": name_of(row, position)}

    # a mapping: its query and item
    if set(row) - set(ROW_KEYS):
        raise ValueError(f"row {position}: expected the keys {', '.join(ROW_KEYS)}, got {sorted(map(str, row))}")
    try:
        query = read_query({key: row.get(key) for key in QUERY_KEYS})
        json.dumps(row.get("item"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"row {position}: {error}") from None

    # the item is given, or derived from the query
    if "item" in row:
        item = row["item"]
    elif "image" in query and "text" in query:
        item = {"image": name_of(query["image"], position), "text": query["text"]}
    else:
        item = query["text"] if "text" in query else name_of(query["image"], position)
    return {**query, "item": item}


def name_of_row(row: Any, position: int) -> Any:
    """Name of a row that cannot be read."""
    stored = isinstance(row, Mapping) and set(row) <= {"bytes", "path"}
    if not isinstance(row, Mapping) or stored or row.get("image") is not None:
        return name_of(row.get("image", row) if isinstance(row, Mapping) else row, position)
    return f"row {position}"


def name_of(picture: Any, position: int) -> str:
    """A path or URL itself, the file of a PIL image, else "picture <position>"."""
    if isinstance(picture, (str, os.PathLike)):
        path = os.fspath(picture)
        return path if len(path) < LONGEST_PATH and not path.startswith("data:") else f"picture {position}"
    path = picture.get("path") if isinstance(picture, Mapping) else getattr(picture, "filename", None)
    return str(path) if path else f"picture {position}"


def told_of(item: Any, reason: str) -> str:
    """The reason why an entry is bad, prefixed with its name unless the reason contains it."""
    return reason if str(item) in reason else f"{item}: {reason}"


__all__ = ["PICTURE_SUFFIXES", "Query", "gather_queries", "list_pictures", "read_query", "read_row", "rows_of"]
