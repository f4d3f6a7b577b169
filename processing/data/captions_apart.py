"""Splits rows into one row per caption, so that an epoch shows every caption once."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .row_digest import Digest
from .rows import PairRows


class CaptionsApart(PairRows):
    """
    The pairs of `rows`: each is an image with one of its captions; those of a row are adjacent and in order.

    A bad row, and a row without captions, becomes one pair. Pairs of one image share its id, even without an id
    column, so they are positives of each other wherever ids are compared.

    Args:
        rows: rows of kind "pairs".

    Attributes:
        sizes: number of pairs of each source, if `rows` is a mixture.
    """

    def __init__(self, rows: PairRows) -> None:
        if rows.kind != "pairs":
            raise ValueError(f"captions are taken apart in rows of pairs, got rows of {rows.kind} ({rows.name})")
        self.rows = rows
        self.name = rows.name
        self.has_ids = rows.has_ids
        self.exact_resume = rows.exact_resume

        # pair p belongs to the last row whose captions start at or before p
        counts = np.maximum(rows.caption_counts(), 1)  # (n,)
        counts[list(rows.bad)] = 1
        self.starts = np.concatenate([[0], counts.cumsum()])  # (n + 1,)
        self.bad: Mapping[int, str] = {int(self.starts[row]): reason for row, reason in rows.bad.items()}

    @property
    def sizes(self) -> tuple[int, ...]:
        ends = np.cumsum([0, *self.rows.sizes])  # rows before each source
        return tuple(np.diff(self.starts[ends]).tolist())

    def __len__(self) -> int:
        return int(self.starts[-1])

    def images(self, pairs: Sequence[int] | None = None) -> np.ndarray:
        """Row number, which identifies the image, of each of `pairs`, or of all pairs: (p,) int64."""
        if pairs is None:
            return np.repeat(np.arange(len(self.rows)), np.diff(self.starts))
        return np.searchsorted(self.starts, np.asarray(pairs, dtype=np.int64), side="right") - 1

    def take(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        of = self.images(indices)  # (p,)
        places = (np.asarray(indices) - self.starts[of]).tolist()
        found = self.rows.take(of.tolist())
        return [
            {**row, "captions": row["captions"][place : place + 1]} for row, place in zip(found, places, strict=True)
        ]

    def ids(self) -> np.ndarray:
        return self.rows.ids()[self.images()]

    def feed(self, digest: Digest) -> None:
        self.rows.feed(digest)

    def digest(self) -> str:
        return self.rows.digest()

    def caption_counts(self) -> np.ndarray:
        return np.ones(len(self), dtype=np.int64)

    def captions(self) -> Iterator[str]:
        return self.rows.captions()

    def where(self, index: int) -> tuple[str, int]:
        """Name of the source, and the row's number there, because a bad pair mostly has a bad image."""
        return self.rows.where(int(self.images([index])[0]))
