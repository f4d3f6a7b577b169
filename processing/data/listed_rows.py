"""Rows held in memory, as read from the annotation files of a task."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from .row_checks import SHOWN, PairDataError, image_reason, report
from .row_digest import Digest, feed_listed
from .rows import PairRows, concept_ids


class ListedRows(PairRows):
    """
    Indexed `rows`, each a mapping with "image" (a path or bytes), "id", and the other fields of its task; texts are in
    "captions" or "text".

    Args:
        rows: at least one.
        name: name of the source in messages.
        reason: row -> why it is bad, apart from its images, or None.
        bad_rows: "raise", or "skip": bad rows keep their numbers and are listed in `bad`.
        images: keys under which a row holds images; a task may have two, or none.
        looked_for: whether image files were already checked, and `reason` reports missing ones.

    Raises:
        PairDataError: there are no rows, or bad ones with "raise"; the message gives the first ten and their number.
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

        # check images, and what the task requires
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
    """A function row -> what is wrong with its images; each path is checked once, even if rows share it."""
    known: dict[str, str | None] = {}

    def wrong(image: Any) -> str | None:
        if not isinstance(image, str):
            return image_reason(image, None)
        if image not in known:
            known[image] = image_reason(image, None)
        return known[image]

    return lambda row: "; ".join(filter(None, (wrong(row[key]) for key in keys))) or None


def rows_digest(rows: PairRows | Sequence[Mapping[str, Any]]) -> str:
    """`PairRows.digest`, also for a list of rows, as evaluations may use."""
    if isinstance(rows, PairRows):
        return rows.digest()
    digest = blake2b(digest_size=16)
    feed_listed(digest, (rows[number] for number in range(len(rows))))
    return digest.hexdigest()
