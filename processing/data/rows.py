"""Indexed rows (`PairRows`), of a table (`PairTable`), or sequential rows (`PairStream`), of three kinds.

A row is {"image": bytes | path | {"bytes", "path"}, "captions": list of str, "id": int | str}. In rows of images the
captions are an empty list, in rows of texts the image is None. Images are not decoded here. Rows that share an id show
the same concept: they are positives of each other.
"""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .places import located
from .row_checks import (
    CHUNK,
    ROLES,
    SHOWN,
    Kind,
    PairDataError,
    find_bad_rows,
    is_text,
    kind_of,
    plain_texts,
    report,
    row_reason,
)
from .row_digest import Digest, feed_cells, feed_pictures
from .same_pictures import digests_of, first_rows, picture_digest, warn_of_shared_pictures
from .sampling import concept_id


class PairRows(ABC):
    """Indexed rows: `len(rows)`, `rows[i]`, `rows.take([i, j])`. All rows are checked at construction.

    Attributes:
        name: name of the source in messages.
        kind: "pairs", "images" or "texts".
        pictures: keys under which a row holds images.
        exact_resume: whether a run that reads these rows resumes at exactly the row where it stopped.
        bad: {row number: reason} of the bad rows, which keep their numbers. Empty unless the source was opened with
            `bad_rows="skip"`; otherwise a bad row is an error.
        has_ids: whether an id column was named; without one each image is a concept, see `same_pictures.py`.
    """

    exact_resume = True
    kind: Kind = "pairs"
    pictures: tuple[str, ...] = ("image",)
    name: str
    bad: Mapping[int, str]
    has_ids: bool

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Reads several rows at once. The content of bad rows is undefined."""

    @abstractmethod
    def ids(self) -> np.ndarray:
        """Concept id of every row as a number, (n,) int64: the sampler's `groups` and the batch's `ids`."""

    @abstractmethod
    def captions(self) -> Iterator[str]:
        """All texts of all good rows in order, for example to train a tokenizer; images are not read."""

    @abstractmethod
    def feed(self, digest: Digest) -> None:
        """Updates `digest` with the texts, ids, and image paths or lengths of all rows in order."""

    def digest(self) -> str:
        """A digest that identifies the rows; `row_digest.py` says what it covers."""
        digest = blake2b(digest_size=16)
        self.feed(digest)
        if "image" in ROLES[self.kind]:
            feed_pictures(digest, self, self.pictures)
        return digest.hexdigest()

    @abstractmethod
    def caption_counts(self) -> np.ndarray:
        """Number of texts of each row, (n,) int64; undefined for bad rows. Images are not read."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {self.name}, which has {len(self)} rows")
        return self.take([index % len(self)])[0]

    def reason(self, index: int) -> str | None:
        """Why the row is bad; None if the check found nothing (its image may still fail to decode)."""
        return self.bad.get(index)

    def where(self, index: int) -> tuple[str, int]:
        """Name of the row's source, and its number there."""
        return self.name, index


class PairTable(PairRows):
    """Rows of a `datasets.Dataset`, memory-mapped if it is read from files."""

    def __init__(
        self,
        data: datasets.Dataset,
        columns: dict[str, str],
        name: str,
        folder: str | None = None,
        bad_rows: str = "raise",
        reasons: Mapping[int, str] | None = None,
        rows_apart: bool = False,
    ) -> None:
        self.columns = columns
        self.name = name
        self.folder = folder
        self.kind = kind_of(columns)
        whole = undecoded(data, columns.get("image"))
        self.data = undecoded(data.select_columns(list(dict.fromkeys(columns.values()))), columns.get("image"))
        if not len(self.data):
            raise PairDataError(f"{name}: no rows")

        # bad cells, and errors found while reading the file
        self.bad, total = find_bad_rows(self.data, columns, folder, SHOWN if bad_rows == "raise" else None, reasons)
        if total and bad_rows == "raise":
            raise PairDataError(report(name, list(self.bad.items()), total, len(self.data)))

        # without ids, rows of one image are one concept
        self._ids: np.ndarray | None = None
        if not self.has_ids:
            self._ids = np.arange(len(self.data), dtype=np.int64)
            if self.kind == "pairs" and not rows_apart:
                self._ids = first_rows(digests_of(whole, columns["image"]))
                warn_of_shared_pictures(name, self._ids, self.bad)

    @property
    def has_ids(self) -> bool:
        return "id" in self.columns

    def __len__(self) -> int:
        return len(self.data)

    def take(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        table = self.data[list(indices)]
        cells = {role: table[column] for role, column in self.columns.items()}  # a list of n each
        rows = [dict(zip(cells, values, strict=True)) for values in zip(*cells.values(), strict=True)]
        numbers = indices if self.has_ids else [int(self._ids[index]) for index in indices]
        return [row_of(row, number, self.folder) for row, number in zip(rows, numbers, strict=True)]

    def ids(self) -> np.ndarray:
        if self._ids is None:
            column = self.data.select_columns([self.columns["id"]]).with_format("arrow")[:].column(0)
            self._ids = concept_ids(column.combine_chunks(), self.bad)
        return self._ids

    def captions(self) -> Iterator[str]:
        if "text" not in self.columns:
            return
        # without the images' bytes, and without bad rows
        texts = self.data.select_columns([self.columns["text"]])
        if self.bad:
            texts = texts.select([row for row in range(len(self)) if row not in self.bad])
        for table in texts.iter(CHUNK):
            for text in map(plain_texts, table[self.columns["text"]]):
                yield from [text] if isinstance(text, str) else text

    def feed(self, digest: Digest) -> None:
        for table in self.data.with_format("arrow").iter(CHUNK):
            for role in sorted(self.columns):
                feed_cells(digest, table[self.columns[role]].combine_chunks())

    def caption_counts(self) -> np.ndarray:
        if "text" not in self.columns:
            return np.zeros(len(self), dtype=np.int64)
        column = self.data.select_columns([self.columns["text"]])
        texts = column.with_format("arrow")[:].column(0)
        if is_text(texts.type):
            return np.ones(len(self), dtype=np.int64)
        if pa.types.is_list(texts.type) or pa.types.is_large_list(texts.type):
            return pc.fill_null(pc.list_value_length(texts), 0).to_numpy().astype(np.int64)

        # fixed-size lists, columns that mix texts and lists, and objects that hold either
        cells = (cell for table in column.iter(CHUNK) for cell in table[self.columns["text"]])
        counts = (len(text) if isinstance(text, (list, tuple)) else 1 for text in map(plain_texts, cells))
        return np.fromiter(counts, np.int64, len(self))


class PairStream:
    """Sequential rows. A run that reads a stream cannot be resumed exactly; opening it gives a warning."""

    exact_resume = False

    def __init__(
        self,
        data: datasets.IterableDataset,
        columns: dict[str, str],
        name: str,
        folder: str | None = None,
        bad_rows: str = "raise",
        reasons: Mapping[int, str] | None = None,
        rows_apart: bool = False,
    ) -> None:
        self.columns = columns
        self.name = name
        self.folder = folder
        self.bad_rows = bad_rows
        self.rows_apart = rows_apart
        self.kind = kind_of(columns)
        self.reasons = reasons or {}
        self.data = undecoded(data, columns.get("image"))
        warnings.warn(self.resume_note, stacklevel=3)

    @property
    def resume_note(self) -> str:
        return (
            f"{self.name} is read as a sequential stream: a resumed run can only read on from the beginning and skip, "
            "which is not exact if the source changes its order; open it without streaming for an exact resume"
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields rows. Raises `PairDataError` at a bad one, even with `bad_rows="skip"`: see `checked`."""
        for number, row, reason in self.checked():
            if reason:
                raise PairDataError(report(self.name, [(number, reason)], 1, None))
            yield row

    def checked(self) -> Iterator[tuple[int, dict[str, Any], str | None]]:
        """Yields (number, row, reason why it is bad or None) for every row."""
        for number, raw in enumerate(self._cells()):
            cells = {role: raw[column] for role, column in self.columns.items()}
            reason = self.reasons.get(number) or row_reason(cells, self.folder)
            row = {} if reason else row_of(cells, number, self.folder)
            if row and self.ids_by_picture:
                row["id"] = picture_digest(row["image"])  # a stream cannot know an image's first row number
            yield number, row, reason

    @property
    def ids_by_picture(self) -> bool:
        """Whether ids are digests of the images, because there is no id column."""
        return self.kind == "pairs" and "id" not in self.columns and not self.rows_apart

    def _cells(self) -> Iterator[dict[str, Any]]:
        # not iter(self.data): inside a data worker, `datasets` would silently yield only that worker's shards
        for table in self.data.iter(64):
            names = list(table)
            for cells in zip(*table.values(), strict=True):
                yield dict(zip(names, cells, strict=True))


def undecoded(data: Any, image_column: str | None) -> Any:
    """The data set with its images, if any, as encoded bytes."""
    feature = None if data.features is None else data.features.get(image_column)
    if isinstance(feature, datasets.Image):
        return data.cast_column(image_column, datasets.Image(decode=False))
    return data


def row_of(cells: Mapping[str, Any], number: int, folder: str | None) -> dict[str, Any]:
    """A row from its cells by role, with image paths joined to `folder`; without an id cell, the id is `number`."""
    image = cells.get("image")
    text = plain_texts(cells.get("text"))
    if folder is not None:
        if isinstance(image, str):
            image = located(os.path.join(folder, image))
        elif isinstance(image, dict) and image.get("bytes") is None and image.get("path") is not None:
            image = {**image, "path": located(os.path.join(folder, image["path"]))}
    captions = [text] if isinstance(text, str) else list(text or ())
    return {"image": image, "captions": captions, "id": cells.get("id", number)}


def concept_ids(cells: Any, bad: Mapping[int, str]) -> np.ndarray:
    """`concept_id` of each cell, (n,) int64; a bad row, whose id may be missing, is its own concept.

    Args:
        cells: n ids, a list or a pyarrow array.
        bad: rows whose cells are not read.
    """
    # lists are short enough for a loop
    if isinstance(cells, list):
        alone = (concept_id(f"bad row {row}") if row in bad else concept_id(cell) for row, cell in enumerate(cells))
        return np.fromiter(alone, np.int64, len(cells))

    # each distinct id is converted once
    good = np.ones(len(cells), dtype=bool)  # (n,)
    good[list(bad)] = False
    coded = cells.filter(pa.array(good)).dictionary_encode()
    known = [concept_id(value) for value in coded.dictionary.to_pylist()]
    ids = np.zeros(len(cells), dtype=np.int64)  # (n,)
    ids[good] = np.array(known, dtype=np.int64)[coded.indices.to_numpy()]
    ids[~good] = [concept_id(f"bad row {row}") for row in np.flatnonzero(~good)]
    return ids
