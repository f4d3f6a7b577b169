"""Random access to tar shards: a sample's image takes one read, using the index beside each shard."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .row_checks import CHUNK, SHOWN, PairDataError, report
from .row_digest import Digest, feed_cells
from .rows import PairRows, concept_ids
from .same_pictures import PICTURE, first_rows, warn_of_shared_pictures
from .shard_index import ShardColumns, shard_index

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_shard(source: Any) -> bool:
    """Whether the name is that of a shard, or a pattern of shards such as `cc-{000..127}.tar` and `cc-*.tar`."""
    return str(source).lower().endswith((".tar", *COMPRESSED))


def find_shards(source: Any) -> list[Path]:
    """The shards that a name, a list of names or a folder denotes; empty for any other source.

    Raises:
        PairDataError: a list mixes shards and other files, shards are compressed, or no file matches a pattern.
    """
    if isinstance(source, (list, tuple)):
        names = [name for name in source if is_shard(name)]
        if names and len(names) < len(source):
            raise PairDataError(f"expected shards only, got other files too: {[str(name) for name in source][:SHOWN]}")
        return [shard for name in names for shard in find_shards(name)]
    if not isinstance(source, (str, os.PathLike)):
        return []
    path = Path(source)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if not is_shard(source):
        return []
    if str(source).lower().endswith(COMPRESSED):
        raise PairDataError(f"{source}: no place in a compressed archive can be read directly; unpack it to a .tar")
    if not path.exists() and (found := RANGE.search(str(source))):
        first, last = found.groups()
        names = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        return [shard for name in names for shard in find_shards(RANGE.sub(name, str(source), count=1))]
    if "*" in path.name and not path.exists():
        shards = sorted(path.parent.glob(path.name))
        if not shards:
            raise PairDataError(f"{source}: no file fits this pattern")
        return shards
    return [path]


class PairShards(PairRows):
    """The samples of shards, numbered shard after shard. Images are read by offset, texts are in the index.

    Raises:
        PairDataError: a file is missing or not a shard, there are no samples, or some are bad; the message names them
            by shard and key.
    """

    def __init__(
        self, shards: Sequence[Path], columns: ShardColumns, bad_rows: str = "raise", rows_apart: bool = False
    ) -> None:
        self.shards = [str(shard) for shard in shards]
        self.has_ids = columns.id is not None
        self.kind = columns.kind
        self.name = self.shards[0] + (f" (+{len(shards) - 1})" if shards[1:] else "")

        # samples are numbered shard after shard
        tables = [shard_index(Path(shard), columns).replace_schema_metadata(None) for shard in shards]
        self.starts = np.cumsum([0, *map(len, tables)])
        self.table = pa.concat_tables(tables).combine_chunks()
        if not len(self):
            expected = {"pairs": "0001.jpg with 0001.txt", "images": "0001.jpg", "texts": "0001.txt"}[self.kind]
            raise PairDataError(f"{self.name}: no samples (expected members such as {expected})")

        # bad samples, from the indexes
        reasons = self.table["reason"]
        self.bad = {
            int(row): f"{self._called(int(row))}: {reasons[int(row)]}"
            for row in np.flatnonzero(reasons.is_valid().to_numpy())
        }
        if self.bad and bad_rows == "raise":
            raise PairDataError(report(self.name, list(islice(self.bad.items(), SHOWN)), len(self.bad), len(self)))

        # without ids, samples of one image are one concept
        self._ids: np.ndarray | None = None
        if not self.has_ids:
            self._ids = np.arange(len(self), dtype=np.int64)
            if self.kind == "pairs" and not rows_apart:
                self._ids = first_rows(self.table[PICTURE])
                warn_of_shared_pictures(self.name, self._ids, self.bad)

    def __len__(self) -> int:
        return len(self.table)

    def take(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        places = np.asarray(indices, dtype=np.int64)  # (n,)
        columns = ["image_offset", "image_size", "captions", "id", "key"]
        cells = self.table.select(columns).take(places).to_pylist()
        if self.kind != "texts":  # texts are in the index
            self._read_images(cells, places)
        ids = [json.loads(cell["id"]) for cell in cells] if self.has_ids else self._ids[places].tolist()
        return [
            {"image": cell.get("image"), "captions": cell["captions"] or [], "id": identity}
            for cell, identity in zip(cells, ids, strict=True)
        ]

    def _read_images(self, cells: list[dict[str, Any]], places: np.ndarray) -> None:
        """Adds the image bytes to each cell; each shard is opened once."""
        of = np.searchsorted(self.starts, places, side="right") - 1  # (n,) which shard
        for number in np.unique(of):
            shard = self.shards[number]
            with _opened(shard) as file:
                for place in np.flatnonzero(of == number):
                    cell = cells[place]
                    content = os.pread(file.fileno(), cell["image_size"], cell["image_offset"])
                    cell["image"] = {"bytes": content, "path": f"{shard}/{cell['key']}"}

    def ids(self) -> np.ndarray:
        if self._ids is None:
            cells = map(json.loads, self.table["id"].to_pylist())
            self._ids = concept_ids(list(cells), self.bad)
        return self._ids

    def captions(self) -> Iterator[str]:
        for start in range(0, len(self), CHUNK):
            for row, captions in enumerate(self.table["captions"].slice(start, CHUNK).to_pylist(), start):
                if row not in self.bad:
                    yield from captions or ()

    def feed(self, digest: Digest) -> None:
        # without offsets: the same samples may be packed again
        for column in ("key", "image_size", "captions", "id"):
            for cells in self.table[column].chunks:
                feed_cells(digest, cells)

    def caption_counts(self) -> np.ndarray:
        counts = pc.fill_null(pc.list_value_length(self.table["captions"]), 0)
        return counts.to_numpy().astype(np.int64)

    def where(self, index: int) -> tuple[str, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.shards[number], int(index - self.starts[number])

    def _called(self, row: int) -> str:
        shard, _ = self.where(row)
        key = self.table["key"][row].as_py()
        return f"{os.path.basename(shard)}, key {key!r}" if key else os.path.basename(shard)


def _opened(shard: str):
    try:
        return open(shard, "rb", buffering=0)
    except OSError as error:
        raise PairDataError(f"{shard}: was there when the run began, cannot be read now: {error.strerror}") from error
