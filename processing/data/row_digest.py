"""A digest of rows, by which a resumed run checks that its data have not changed.

It covers, in order: all texts and ids; the path of every image, or its number of bytes in a table or shard; and the
bytes at both ends of the images of all rows or, if there are more than 4,096, of 4,096 evenly spaced rows. So for
millions of rows it reads all texts, as opening them does, and 4,096 images. In a larger source, an image that is
replaced by another of the same path or length may go unnoticed.
"""

import json
import os
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

PICTURES = 4096  # maximum number of images read
END = 8192  # bytes at each end of an image; a PNG ends with checksums of its content


class Digest(Protocol):
    """A hash object of `hashlib`."""

    def update(self, content: bytes, /) -> None: ...


def feed_cells(digest: Digest, cells: pa.Array) -> None:
    """Updates `digest` with the cells of a column, also nested ones; of binary cells (images), with lengths only."""
    if isinstance(cells, pa.ExtensionArray):
        cells = cells.storage
    kind = cells.type
    digest.update(np.packbits(cells.is_valid().to_numpy(zero_copy_only=False)).tobytes())

    # nested types, recursively
    if pa.types.is_struct(kind):
        for place in range(kind.num_fields):
            feed_cells(digest, pc.struct_field(cells, place))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        digest.update(_numbers(pc.list_value_length(cells)))
        feed_cells(digest, pc.list_flatten(cells))

    # texts as bytes, because they need not be UTF-8
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        digest.update(_numbers(pc.binary_length(cells)))
        digest.update(_joined(cells))
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        digest.update(_numbers(pc.binary_length(cells)))
    elif not pa.types.is_null(kind):
        digest.update(json.dumps(cells.to_pylist(), default=str).encode())


def _numbers(lengths: pa.Array) -> bytes:
    return pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False).astype("<i8").tobytes()


def _joined(texts: pa.Array) -> bytes:
    """The bytes of all texts, concatenated."""
    filled = pc.fill_null(texts.cast(pa.large_binary()), b"")
    _, offsets, content = filled.buffers()
    if content is None:
        return b""
    places = np.frombuffer(offsets, np.int64)[filled.offset : filled.offset + len(filled) + 1]  # (n + 1,)
    return memoryview(content)[places[0] : places[-1]].tobytes()


def feed_listed(digest: Digest, rows: Any) -> None:
    """Updates `digest` with rows that are mappings, as tasks read from annotations; of bytes, with the length only."""
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=_told).encode())


def _told(value: Any) -> Any:
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


def feed_pictures(digest: Digest, rows: Any, keys: tuple[str, ...]) -> None:
    """Updates `digest` with both ends of the images under `keys`, of at most `PICTURES` good rows of a `PairRows`."""
    count = min(len(rows), PICTURES)
    spaced = [place * len(rows) // count for place in range(count)]
    good = [row for row in spaced if row not in rows.bad]

    # a chunk of rows at a time, because rows hold their images
    for start in range(0, len(good), 64):
        for row in rows.take(good[start : start + 64]):
            for key in keys:
                digest.update(_ends(row.get(key)))


def _ends(image: Any) -> bytes:
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return b"%d" % len(image) + image[:END] + image[-END:]
    if not isinstance(image, str):
        return b"none"
    try:
        with open(image, "rb", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size
            first = file.read(END)
            file.seek(max(0, length - END))
            return b"%d" % length + first + file.read(END)
    except OSError as error:
        return f"unreadable: {error.errno}".encode()
