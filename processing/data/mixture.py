"""Concatenates several sources of rows of one kind.

For indexed rows, the order (`PairOrder`, `weights`) decides how often they are visited; streams, which have a fixed
order, are interleaved by weight here.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Literal

import numpy as np

from .row_checks import Kind, PairDataError
from .row_digest import Digest
from .rows import PairRows, PairStream
from .sampling import checked_shares
from .shards import is_shard
from .sources import READERS, open_rows


def open_mixture(
    entries: Sequence[Any],
    kind: Kind = "pairs",
    image_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    bad_rows: Literal["raise", "skip"] = "raise",
    weights: Sequence[float] | None = None,
    config: str | None = None,
    revision: str | None = None,
) -> PairRows | PairStream:
    """`open_rows` of each entry; a `PairMixture` or `PairStreamMixture` unless the entries are one source.

    Args:
        entries: at least one source of `open_rows`. Table files of one kind, and shards, are read as one source.
        weights: keep every entry a separate source. Indexed rows are weighted by the order of the run, which must be
            given the weights too; streams are interleaved by them.
        others: see `open_rows`; they apply to every entry.

    Raises:
        PairDataError: the errors of `open_rows`; ids of some entries are numbers and of others text, and so never
            equal; with `streaming`, an entry does not stream.
        ValueError: there is not one positive weight per entry.
    """
    if weights is not None:
        checked_shares(weights, len(entries))
    options = (kind, image_column, text_column, id_column, split, streaming, bad_rows, config, revision)

    # one source, if the entries have one format
    if len(entries) == 1 and weights is None:
        return open_rows(entries[0], *options)
    formats = {_format(entry) for entry in entries}
    if weights is None and len(formats) == 1 and None not in formats:
        return open_rows(list(entries), *options)

    # or several
    sources = [open_rows(entry, *options) for entry in entries]
    return PairStreamMixture(sources, weights) if streaming else PairMixture(sources)


def _format(entry: Any) -> str | None:
    """Format of an entry; entries of one format, not None, can be opened as one source."""
    name = str(entry).lower()
    return "tar" if is_shard(name) else next((form for ending, form in READERS.items() if name.endswith(ending)), None)


class PairMixture(PairRows):
    """The rows of several sources, numbered one source after the other.

    Without an id column, each image of a source is a concept of its own; with one, equal ids are one concept across
    sources.

    Attributes:
        sources: the sources.
        sizes: rows of each.

    Raises:
        PairDataError: there is no source, rows are of several kinds, or ids are in some sources only, or numbers in
            some and text in others.
    """

    def __init__(self, sources: Sequence[PairRows]) -> None:
        if not sources:
            raise PairDataError("a mixture needs at least one source, got none")
        self.kind = _one_kind(sources)
        self.sources = list(sources)
        self.name = _joined(sources)

        # rows are numbered source after source
        self.sizes = tuple(len(source) for source in sources)
        self.starts = np.cumsum([0, *self.sizes])
        self.bad = {
            int(start) + row: reason
            for start, source in zip(self.starts, sources, strict=False)
            for row, reason in source.bad.items()
        }

        # ids must be comparable across all sources, or absent
        types = [(source.name, _type_of_ids(source)) for source in sources]
        if len({found for _, found in types} - {"no good row"}) > 1:
            raise PairDataError(f"the ids of the sources can never be equal, since they differ in kind: {types}")
        self.has_ids = all(source.has_ids for source in sources)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        places = np.asarray(indices, dtype=np.int64)  # (n,)
        found: list[dict[str, Any]] = [{}] * len(places)
        of = np.searchsorted(self.starts, places, side="right") - 1  # (n,) which source
        for number in np.unique(of):
            mine = np.flatnonzero(of == number)
            rows = self.sources[number].take((places[mine] - self.starts[number]).tolist())
            for place, row in zip(mine, rows, strict=True):
                # without ids, row numbers of the source become row numbers of the mixture
                found[place] = row if self.has_ids else {**row, "id": int(self.starts[number]) + row["id"]}
        return found

    def ids(self) -> np.ndarray:
        if not self.has_ids:
            return np.concatenate([start + one.ids() for start, one in zip(self.starts, self.sources, strict=False)])
        return np.concatenate([source.ids() for source in self.sources])

    def captions(self) -> Iterator[str]:
        for source in self.sources:
            yield from source.captions()

    def feed(self, digest: Digest) -> None:
        for source in self.sources:
            source.feed(digest)

    def caption_counts(self) -> np.ndarray:
        return np.concatenate([source.caption_counts() for source in self.sources])

    def where(self, index: int) -> tuple[str, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sources[number].where(index - int(self.starts[number]))


class PairStreamMixture(PairStream):
    """Several streams as one, whose rows are numbered in the order read.

    Without weights, an epoch reads one stream after the other. With weights, the next row is from the stream that is
    furthest behind its share, so no share is ever off by more than a few rows; a stream that ends is restarted until
    every stream has ended once, which ends the epoch.

    Raises:
        PairDataError: a source is not a stream, or rows are of several kinds; while reading, a stream has no rows.
    """

    def __init__(self, sources: Sequence[PairStream], weights: Sequence[float] | None = None) -> None:
        for source in sources:
            if not isinstance(source, PairStream):
                raise PairDataError(f"{source.name} is read by row numbers and cannot be woven with streams")
        self.kind = _one_kind(sources)
        self.sources = list(sources)
        self.shares = None if weights is None else checked_shares(weights, len(sources))
        self.name = _joined(sources)
        self.bad_rows = sources[0].bad_rows
        self.columns = sources[0].columns

    def checked(self) -> Iterator[tuple[int, dict[str, Any], str | None]]:
        for number, (source, row, reason) in enumerate(self._rows()):
            if reason is None and "id" not in source.columns and not source.ids_by_picture:
                row = {**row, "id": number}
            yield number, row, reason

    def _rows(self) -> Iterator[tuple[PairStream, dict[str, Any], str | None]]:
        # one after the other
        if self.shares is None:
            for source in self.sources:
                yield from ((source, row, _of(source, place, reason)) for place, row, reason in source.checked())
            return

        # by weight: the stream that is furthest behind its share
        given = np.zeros(len(self.sources))  # rows of each so far
        ended = np.zeros(len(self.sources), dtype=bool)
        streams = [source.checked() for source in self.sources]
        for total in count(1):
            chosen = int(np.argmax(self.shares * total - given))
            source = self.sources[chosen]
            item = next(streams[chosen], None)
            if item is None:  # restart the stream, unless all have ended
                ended[chosen] = True
                if ended.all():
                    return
                streams[chosen] = source.checked()
                item = next(streams[chosen], None)
                if item is None:
                    raise PairDataError(f"{source.name}: no rows")
            given[chosen] += 1
            yield source, item[1], _of(source, item[0], item[2])


def _one_kind(sources: Sequence[PairRows | PairStream]) -> Kind:
    kinds = [(source.name, source.kind) for source in sources]
    if len({kind for _, kind in kinds}) > 1:
        raise PairDataError(f"the sources of a mixture must have rows of one kind, got {kinds}")
    return kinds[0][1]


def _of(source: PairStream, place: int, reason: str | None) -> str | None:
    return reason and f"{source.name}, row {place}: {reason}"


def _joined(sources: Sequence[PairRows | PairStream]) -> str:
    shown = " + ".join(source.name for source in sources[:3])
    return f"{shown} + {len(sources) - 3} more" if sources[3:] else shown


def _type_of_ids(source: PairRows) -> str:
    if not source.has_ids:
        return "none"
    good = next((row for row in range(len(source)) if row not in source.bad), None)
    return "no good row" if good is None else type(source[good]["id"]).__name__
