"""What a retrieval pipeline is asked and what it indexes: queries and rows of any accepted form, pictures of a folder.

Strings never have two meanings: in a query a plain str is text, in a row to be indexed it is a picture's path.
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

# of every format that is decoded, and of some that are not, which are then named
PICTURE_SUFFIXES = frozenset(
    ".apng .avif .avifs .bmp .dib .gif .heic .heif .hif .icns .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg "
    ".jpx .jxl .pbm .pcx .pgm .png .pnm .ppm .psd .tga .tif .tiff .webp".split()
)
# how a picture begins whatever its file is called
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis")
# what a PNG that we drew says of itself, near its beginning
SHEET_MARK = b"oner contact sheet"
SHEET_REASON = "a sheet of pictures that oner drew"
QUERY_KEYS = ("text", "image")
ROW_KEYS = ("text", "image", "item")

LONGEST_PATH = 4096  # characters, of Linux; a longer text is a picture in base64

Query = dict[str, Any]  # "text", "image" or both; "item" in a row to be indexed


def list_pictures(folder: str | os.PathLike) -> list[str]:
    """Every picture file under `folder`, by suffix or by how it begins, sorted; hidden ones are left out. A folder
    that cannot be looked into stands for its pictures: whoever opens it is told."""
    pictures: list[str] = []

    def note(error: OSError) -> None:
        pictures.append(error.filename)

    # in place, which keeps os.walk out of hidden folders
    for parent, folders, files in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [os.path.join(parent, name) for name in sorted(files) if not name.startswith(".")]
        pictures += filter(is_picture_file, paths)
    return pictures


def is_picture_file(path: str) -> bool:
    """Whether a file has the suffix of a picture, or is a regular one and begins as pictures do."""
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
    """Whether a path is that of a PNG which oner drew of other pictures."""
    if not isinstance(picture, (str, os.PathLike)) or not os.fspath(picture).lower().endswith(".png"):
        return False
    try:
        if not os.path.isfile(picture):  # a pipe that nobody writes to would be waited for without end
            return False
        with open(picture, "rb") as file:
            return SHEET_MARK in file.read(256)
    except (OSError, ValueError):
        return False


def read_query(query: Any) -> Query:
    """One query of any accepted form → {"text": str} and/or {"image": picture}."""
    # a str is a text, anything else that is no mapping a picture
    if isinstance(query, str):
        query = {"text": query}
    if not isinstance(query, Mapping):
        return {"image": query}

    # keys that are known, with values that can be read
    values = {key: query[key] for key in QUERY_KEYS if query.get(key) is not None}
    if not values or set(query) - set(QUERY_KEYS):
        raise ValueError(f'a query has the keys "text", "image" or both, got {sorted(map(str, query))}')
    if not isinstance(values.get("text", ""), str):
        raise TypeError(f'"text" of a query must be a str, got {type(values["text"]).__name__}')
    if "text" in values and (reason := caption_reason(values["text"], "text")) is not None:
        raise ValueError(f"the text of a query cannot be read: {reason}")
    return values


def gather_queries(inputs: Any, text: Any, image: Any) -> tuple[Iterator[Query], bool]:
    """The three ways to ask → queries, read as they are needed, and whether it was a single one."""
    # a positional query: one of any form, or a list of such
    if isinstance(inputs, str) and text is None:
        text = inputs
        inputs = None
    if inputs is not None:
        if text is not None or image is not None:
            raise ValueError("text= and image= go with each other or one str; for several give text=[..], image=[..]")
        many = is_many(inputs)
        return (read_query(query) for query in (inputs if many else [inputs])), not many

    # by name: each of text= and image= one, or lists of one length
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
    """A folder or an iterable → its entries, read as they are needed, and how many if known."""
    # the pictures of a folder
    if isinstance(source, (str, os.PathLike)):
        if not os.path.isdir(source):
            raise ValueError(f"{os.fspath(source)!r} is not a folder; give a folder or a list of pictures")
        folder, source = source, list_pictures(source)
        if not source:
            raise ValueError(f"no picture under {os.fspath(folder)!r} ({', '.join(sorted(PICTURE_SUFFIXES))})")

    # or any iterable but what is one picture or row itself; undecoded, so that a damaged picture is one row's matter
    source = undecoded(source)
    single = isinstance(source, (bytes, bytearray, Mapping, Image.Image, np.ndarray, torch.Tensor))
    if single or not (isinstance(source, Iterable) or is_many(source)):
        raise TypeError(f"index takes a folder or a list of pictures or rows, got {type(source).__name__}")
    total = len(source) if isinstance(source, Sized) else None
    return (without_further_columns(source) if hasattr(source, "column_names") else iterate(source)), total


def without_further_columns(dataset: Iterable[Mapping]) -> Iterator[Query]:
    """Rows of a data set of `datasets`: the columns that a row can have, of perhaps many."""
    if dataset.column_names is not None and not set(dataset.column_names) & set(QUERY_KEYS):
        raise ValueError(f'a data set needs a column "image" or "text", got {sorted(dataset.column_names)}')
    return ({key: row[key] for key in ROW_KEYS if key in row} for row in dataset)


def read_row(row: Any, position: int) -> Query:
    """One entry of an index source → its query plus "item", what the answers will show for it."""
    # a picture by itself
    stored_picture = isinstance(row, Mapping) and "bytes" in row and not set(row) - {"bytes", "path"}
    if not isinstance(row, Mapping) or stored_picture:  # {"bytes", "path"}: a picture as `datasets` stores it
        return {"image": row, "item": name_of(row, position)}

    # a mapping: its query, and what answers show for it
    if set(row) - set(ROW_KEYS):
        raise ValueError(f"row {position}: expected the keys {', '.join(ROW_KEYS)}, got {sorted(map(str, row))}")
    try:
        query = read_query({key: row.get(key) for key in QUERY_KEYS})
        json.dumps(row.get("item"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"row {position}: {error}") from None

    # given, or made of what it holds
    if "item" in row:
        item = row["item"]
    elif "image" in query and "text" in query:
        item = {"image": name_of(query["image"], position), "text": query["text"]}
    else:
        item = query["text"] if "text" in query else name_of(query["image"], position)
    return {**query, "item": item}


def name_of_row(row: Any, position: int) -> Any:
    """What stands for a row that cannot be read."""
    stored = isinstance(row, Mapping) and set(row) <= {"bytes", "path"}
    if not isinstance(row, Mapping) or stored or row.get("image") is not None:
        return name_of(row.get("image", row) if isinstance(row, Mapping) else row, position)
    return f"row {position}"


def name_of(picture: Any, position: int) -> str:
    """A path or an address itself, a PIL picture's file, else "picture <position>"."""
    if isinstance(picture, (str, os.PathLike)):
        path = os.fspath(picture)
        return path if len(path) < LONGEST_PATH and not path.startswith("data:") else f"picture {position}"
    path = picture.get("path") if isinstance(picture, Mapping) else getattr(picture, "filename", None)
    return str(path) if path else f"picture {position}"


def told_of(item: Any, reason: str) -> str:
    """What is wrong with an entry, behind its name where the reason does not have that."""
    return reason if str(item) in reason else f"{item}: {reason}"


__all__ = ["PICTURE_SUFFIXES", "Query", "gather_queries", "list_pictures", "read_query", "read_row", "rows_of"]
