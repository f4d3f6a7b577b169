"""Finds rows with the same image: data sets often have one caption per row, and so several rows per image.

Pairs with one image are one concept unless there is an id column. Otherwise each would be a negative for the captions
of the others in training, and in evaluation a caption of the right image would count as wrong.
"""

import os
import warnings
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa

from .row_checks import CHUNK

ROW = "__row__"  # as the id column: each row is its own concept, even if it shares an image
PICTURE = "__picture__"  # column of `picture_digest` in cached tables


def picture_digest(image: Any) -> int | None:
    """A 63-bit digest, equal for equal bytes or equal paths; None if there is neither."""
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, str):
        image = b"path " + os.path.normpath(image).encode("utf-8", "surrogatepass")
    return _number(blake2b(image, digest_size=8)) if isinstance(image, bytes) else None


def content_digest(file: BinaryIO, offset: int, size: int) -> int:
    """`picture_digest` of a part of a file."""
    digest = blake2b(digest_size=8)
    file.seek(offset)
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        digest.update(block)
        size -= len(block)
    return _number(digest)


def _number(digest: Any) -> int:
    return int.from_bytes(digest.digest(), "little") >> 1


def digests_of(data: datasets.Dataset, column: str) -> pa.ChunkedArray:
    """
    `picture_digest` of each row. The tables of `table_files.py` hold them; for other data sets, `datasets` caches them
    if the data set is stored in files.
    """
    if PICTURE in data.column_names:
        return data.data.column(PICTURE)
    read = data.select_columns([column]).map(
        _digests,
        batched=True,
        batch_size=CHUNK,
        input_columns=[column],
        remove_columns=[column],
        features=datasets.Features({PICTURE: datasets.Value("int64")}),
    )
    return read.with_format("arrow")[:].column(PICTURE)


def _digests(images: Sequence[Any]) -> dict[str, list[int | None]]:
    return {PICTURE: [picture_digest(image) for image in images]}


def first_rows(digests: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Number of the first row with the same digest, (n,) int64; a row without a digest gets its own number."""
    rows = np.arange(len(digests), dtype=np.int64)  # (n,)
    there = digests.is_valid().to_numpy(zero_copy_only=False) if len(digests) else rows.astype(bool)
    values = digests.filter(there).to_numpy() if isinstance(digests, pa.ChunkedArray) else digests.filter(there)
    _, first, places = np.unique(np.asarray(values), return_index=True, return_inverse=True)
    known = rows[there]  # (m,)
    rows[there] = known[first[places.ravel()]]
    return rows


def warn_of_shared_pictures(name: str, firsts: np.ndarray, bad: Iterable[int]) -> None:
    """Warns if there are fewer distinct images than rows."""
    good = np.ones(len(firsts), dtype=bool)
    good[list(bad)] = False
    count = len(np.unique(firsts[good]))
    if count < good.sum():
        warnings.warn(
            f"{name}: {good.sum()} rows show {count} different pictures. Rows of one picture share an id: their "
            f"captions are right for each other in an evaluation, in matching, and in contrast with match_ids; "
            f"one_row_per_id keeps them apart. A column of ids says otherwise, {ROW!r} that each row stands alone",
            stacklevel=5,
        )
