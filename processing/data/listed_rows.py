"""Rows held in memory: what the annotations of a task become, once read and checked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from .row_checks import SHOWN, PairDataError, image_reason, report
from .row_digest import Digest, feed_listed
from .rows import PairRows, concept_ids


class ListedRows(PairRows):
    """
    `rows` by number, each a mapping with "image" (a path or bytes), "id", and whatever else its task needs; its texts
    are "captions" or "text".

    Args:
        rows: at least one.
        name: what messages call the source.
        reason: row -> what is wrong with it beside its pictures, or None.
        bad_rows: "raise", or "skip": a bad row keeps its number and stands in `bad`.
        images: the keys under which a row holds images; a task may have two, or none.
        looked_for: whether these have been looked for already, and `reason` tells of those that are not there.

    Raises:
        PairDataError: no rows; bad rows with "raise": the first ten, and how many there are.
    """

    has_ids = True

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        name: str,
        reason: Callable[[Mapping[str, Any]], str | None] | None = None,
        bad_rows: Literal["raise", "skip"] = "raise",
        images: Sequence[str] = ("image",),
        looked_for: bool = False,
    ) -> None:
        if not len(rows):
            raise PairDataError(f"{name}: no rows")
        self.rows = rows
        self.name = name
        self.kind = "pairs" if images else "texts"
        self.pictures = tuple(images)

        # its images, and what else its task checks
        find = None if looked_for else _finder(images)
        checks = [check for check in (find, reason) if check is not None]
        self.bad = {}
        for number, row in enumerate(rows):
            if wrong := "; ".join(filter(None, (check(row) for check in checks))):
                self.bad[number] = wrong
        if self.bad and bad_rows == "raise":
            raise PairDataError(report(name, list(self.bad.items())[:SHOWN], len(self.bad), len(rows)))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [dict(self.rows[index]) for index in indices]

    def ids(self) -> np.ndarray:
        return concept_ids([row["id"] for row in self.rows], self.bad)

    def captions(self) -> Iterator[str]:
        for number, row in enumerate(self.rows):
            if number not in self.bad:
                yield from row.get("captions", [row["text"]] if "text" in row else ())

    def feed(self, digest: Digest) -> None:
        feed_listed(digest, self.rows)

    def caption_counts(self) -> np.ndarray:
        return np.array([len(row.get("captions", ())) for row in self.rows], dtype=np.int64)


def _finder(keys: Sequence[str]) -> Callable[[Mapping[str, Any]], str | None]:
    """What is wrong with the pictures of a row; each path is looked for once, however many rows share it."""
    known: dict[str, str | None] = {}

    def wrong(image: Any) -> str | None:
        if not isinstance(image, str):
            return image_reason(image, None)
        if image not in known:
            known[image] = image_reason(image, None)
        return known[image]

    return lambda row: "; ".join(filter(None, (wrong(row[key]) for key in keys))) or None


def rows_digest(rows: PairRows | Sequence[Mapping[str, Any]]) -> str:
    """`PairRows.digest`, also of a list of rows, as an evaluation may hold them."""
    if isinstance(rows, PairRows):
        return rows.digest()
    digest = blake2b(digest_size=16)
    feed_listed(digest, (rows[number] for number in range(len(rows))))
    return digest.hexdigest()
