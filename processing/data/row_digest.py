"""A digest of rows, by which a run that goes on knows whether they are still the rows that it began with.

It covers, in their order: every text and every id; of every picture its path, or how many bytes it has in a table or a
shard; and the bytes at both ends of pictures, of every row where there are at most 4,096, else of so many that are
evenly spaced. So millions of rows cost the reading of their texts, which opening them costs too, and 4,096 pictures. A
picture of a larger source that is replaced by another of the same path or length may stay unseen.
"""

import json
import os
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

PICTURES = 4096  # looked into
END = 8192  # bytes at each end of a picture; a PNG ends in a check sum of what is between


class Digest(Protocol):
    """What `hashlib` makes."""

    def update(self, content: bytes, /) -> None: ...


def feed_cells(digest: Digest, cells: pa.Array) -> None:
    """The cells of a column, whatever they are nested in; of pictures, which are binary, their lengths only."""
    if isinstance(cells, pa.ExtensionArray):
        cells = cells.storage
    kind = cells.type
    digest.update(np.packbits(cells.is_valid().to_numpy(zero_copy_only=False)).tobytes())

    # what is nested, from the outside in
    if pa.types.is_struct(kind):
        for place in range(kind.num_fields):
            feed_cells(digest, pc.struct_field(cells, place))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        digest.update(_numbers(pc.list_value_length(cells)))
        feed_cells(digest, pc.list_flatten(cells))

    # texts as the bytes that they are, for they need not be UTF-8
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
    """All characters of all texts, one after the other."""
    filled = pc.fill_null(texts.cast(pa.large_binary()), b"")
    _, offsets, content = filled.buffers()
    if content is None:
        return b""
    places = np.frombuffer(offsets, np.int64)[filled.offset : filled.offset + len(filled) + 1]  # (n + 1,)
    return memoryview(content)[places[0] : places[-1]].tobytes()


def feed_listed(digest: Digest, rows: Any) -> None:
    """Rows that are mappings, such as a task makes of its annotations; of bytes in them the length only."""
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=_told).encode())


def _told(value: Any) -> Any:
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


def feed_pictures(digest: Digest, rows: Any, keys: tuple[str, ...]) -> None:
    """Both ends of the pictures, under `keys`, of at most `PICTURES` good rows of a `PairRows`."""
    count = min(len(rows), PICTURES)
    spaced = [place * len(rows) // count for place in range(count)]
    good = [row for row in spaced if row not in rows.bad]

    # a chunk of rows at a time, for each brings its pictures along
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
