"""A retrieval index: normalised embeddings, the items that they represent, and the model that computed them.

Shapes: n indexed items, P projection_dim, q queries, k answers per query (k = min(top_k, n)).

Threads may add, search, save and load concurrently. Searches and saves use a snapshot, an immutable tuple of blocks
that is replaced under a lock; the list of items only grows, and does so before the snapshot that counts them.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .retrieval_backend import Answer, SearchBackend, answers_of
from .retrieval_filter import Where, read_where, rows_admitted
from .retrieval_index_files import (
    DTYPES,
    INDEX_FILE,
    IndexFileError,
    IndexMismatchError,
    RetrievalIndexError,
    read_index,
    write_index,
)
from .retrieval_nearest import best_keys, unit_rows, unpack_keys

QUERY_BLOCK = 1024
KEY = re.compile(r"[0-9a-f]{32}")

# one lock for all indexes, held only while one grows; a lock per index would prevent copying
_growing = threading.Lock()


@dataclass(frozen=True)
class Snapshot:
    """
    An immutable state of an index.

    Attributes:
        blocks (`tuple[torch.Tensor, ...]`): (m, P) each, unit rows; n rows in total, in the order of the items.
        count (`int`): n.
    """

    blocks: tuple[torch.Tensor, ...]
    count: int

    def grown(self, rows: torch.Tensor) -> "Snapshot":
        """Appends rows (m, P); each block stays at least twice as long as the next, so there are few blocks."""
        blocks = [*self.blocks, rows]
        while len(blocks) > 1 and len(blocks[-2]) < 2 * len(blocks[-1]):
            last = blocks.pop()
            blocks[-1] = torch.cat([blocks[-1], last])
        return Snapshot(tuple(blocks), self.count + len(rows))


def space_fingerprint(model: torch.nn.Module, samples: int = 64) -> str:
    """Identifies the embedding space of a model by a digest of its weights, independent of their location.

    The digest covers the name, the shape and `samples` evenly spaced values of every floating-point entry of the
    state dict, as fp16, so that an fp32 checkpoint and the same one loaded in fp16 agree (in bf16 it does not: that
    rounds to fewer digits). It changes if a model is retrained, even when saved over the old one, but not if its
    directory is moved.
    """
    digest = hashlib.sha256()
    weights = ((name, tensor) for name, value in sorted(model.state_dict().items()) for tensor in floats_of(value))
    for name, tensor in weights:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.numel() and not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // samples)][:samples]
            digest.update(picked.to("cpu", torch.float16).numpy().tobytes())
    return digest.hexdigest()[:32]


def floats_of(value: Any) -> Iterator[torch.Tensor]:
    """Yields the floating-point tensors of an entry of a state dict; quantised ones, also in tuples, are
    dequantised."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from floats_of(part)
    elif isinstance(value, torch.Tensor):
        # torchao's quantised tensors report a float dtype
        quantised = value.is_quantized or type(value).dequantize is not torch.Tensor.dequantize
        tensor = value.dequantize() if quantised else value
        if tensor.is_floating_point():
            yield tensor


class RetrievalIndex(SearchBackend):
    """Embeddings with their items, searched exactly. The other backends are built from a saved index.

    Args:
        projection_dim: P, the width of the embeddings.
        model: name or path of the model, for display and messages.
        fingerprint: identifies the embedding space (`space_fingerprint`); None accepts any.
        dtype: storage type of the embeddings, "float16" (default, half the memory) or "float32".

    Attributes:
        items: the item of each embedding, a JSON value.
        skipped: {"item", "reason"} of each item that could not be read.
        counts: numbers of rows that the indexing call "embedded", "kept" unchanged, and found "gone". Not saved.
    """

    def __init__(
        self,
        projection_dim: int,
        model: str | None = None,
        fingerprint: str | None = None,
        dtype: str = "float16",
    ):
        # width and precision
        if not isinstance(projection_dim, int) or projection_dim < 1:
            raise ValueError(f"projection_dim must be a positive integer, got {projection_dim!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
        self.projection_dim = projection_dim
        self.model = model
        self.fingerprint = fingerprint
        self.dtype = dtype

        # items and keys, which only grow, and their embeddings
        self.items: list[Any] = []
        self.keys: list[str | None] = []
        self.skipped: list[dict[str, str]] = []
        self.counts: dict[str, int] = {}
        self._snapshot = Snapshot((torch.empty(0, projection_dim, dtype=DTYPES[dtype]),), 0)

    def __len__(self) -> int:
        return self._snapshot.count

    def __repr__(self) -> str:
        return f"RetrievalIndex({len(self)} items, {self.projection_dim} wide, {self.dtype}, model {self.model!r})"

    @property
    def embeddings(self) -> torch.Tensor:
        """(n, P), unit rows, on the CPU."""
        snapshot = self._snapshot
        if len(snapshot.blocks) == 1:
            return snapshot.blocks[0]
        joined = torch.cat(snapshot.blocks)

        # cached, unless rows were added meanwhile
        with _growing:
            if self._snapshot is snapshot:
                self._snapshot = Snapshot((joined,), snapshot.count)
        return joined

    def add(
        self,
        embeddings: torch.Tensor,
        items: Iterable[Any],
        fingerprint: str | None = None,
        model: str | None = None,
        keys: Sequence[str | None] | None = None,
    ) -> None:
        """Appends embeddings (m, P), normalised here, and their m items (paths or any JSON values).

        `keys` are digests of each row's content, 32 hexadecimal digits or None, by which re-indexing recognises rows.

        Raises:
            IndexMismatchError: the width or fingerprint differs from the index's.
            ValueError: embeddings are not two-dimensional, not finite or zero, or do not match the number of items.
            TypeError: an item is not a JSON value.
        """
        # as many items as embeddings, in this index's space
        items = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in items]
        if not torch.is_tensor(embeddings) or embeddings.dim() != 2 or len(embeddings) != len(items):
            got = tuple(embeddings.shape) if torch.is_tensor(embeddings) else type(embeddings).__name__
            raise ValueError(f"expected a tensor of embeddings (m, {self.projection_dim}) and m items, "
                             f"got {got} and {len(items)} items")  # fmt: skip
        self.check_space(embeddings.shape[1], fingerprint, model)

        # check that every item can be saved before adding any
        for item in items:
            try:
                json.dumps(item, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"an item must be a path or a JSON value, got {type(item).__name__}: {error}"
                ) from None
        keys = [None] * len(items) if keys is None else list(keys)
        if len(keys) != len(items):
            raise ValueError(f"expected as many keys as items, got {len(keys)} and {len(items)}")
        if bad := [key for key in keys if key is not None and not KEY.fullmatch(key)]:
            raise ValueError(f"a key has 32 hexadecimal digits, got {bad[0]!r}")
        self.add_unit_rows(unit_rows(embeddings).to(DTYPES[self.dtype]), items, keys)

    def add_unit_rows(self, rows: torch.Tensor, items: list[Any], keys: list[str | None]) -> None:
        """Appends unit rows (m, P) of this dtype, with m items and keys, unchecked."""
        # items first: every row that a search finds must have one
        with _growing:
            self.items.extend(items)
            self.keys.extend(keys)
            self._snapshot = self._snapshot.grown(rows)

    def extend(self, other: "RetrievalIndex") -> "RetrievalIndex":
        """Appends all items of another index of the same space, and its list of skipped items. Returns itself."""
        self.check_space(other.projection_dim, other.fingerprint, other.model)
        self.add_unit_rows(other.embeddings.to(DTYPES[self.dtype]), list(other.items), list(other.keys))
        self.note_skipped(other.skipped)
        # appending removes nothing
        self.counts = {**other.counts, "gone": 0} if other.counts else {}
        return self

    def note_skipped(self, entries: Iterable[dict[str, str]]) -> None:
        """Records entries {"item", "reason"} that could not be read."""
        with _growing:
            self.skipped = [*self.skipped, *entries]

    def search(
        self, queries: torch.Tensor, top_k: int = 10, chunk: int | None = None, where: Where = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact cosine of every query with every item, `chunk` items at a time.

        Products are summed in fp64 and rounded to fp32 once, so equal embeddings get equal scores at any position,
        and the chunk size never changes an answer; among equal scores, lower indices come first.

        Args:
            queries: (q, P), normalised here; any float dtype and device.
            top_k: maximum number of answers.
            where: conditions that items must meet, see `retrieval_filter.py`; m of n do.
        Returns:
            Scores (q, k) fp32, descending, and indices (q, k) int64, on the CPU; k = min(top_k, n), or min(top_k, m).
        """
        self.check_queries(queries, top_k)
        if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
            raise ValueError(f"chunk must be a positive integer, got {chunk!r}")
        snapshot = self._snapshot
        blocks = snapshot.blocks
        count = snapshot.count
        admitted = None

        # a filtered search uses the admitted rows only
        if conditions := read_where(where):
            admitted = rows_admitted(conditions, self.items[:count])  # (m,)
            blocks = (self.embeddings[admitted],)  # (m, P)
            count = len(admitted)

        # queries in blocks, to bound the memory for scores
        k = min(top_k, count)
        rows = unit_rows(queries)  # (q, P) fp64
        keys = [best_keys(block, blocks, k, chunk) for block in rows.split(QUERY_BLOCK)]
        scores, indices = unpack_keys(torch.cat(keys) if keys else torch.empty(0, k, dtype=torch.int64))  # (q, k) each
        return scores, indices if admitted is None else admitted[indices]

    def answers(self, queries: torch.Tensor, top_k: int = 10, where: Where = None) -> list[list[Answer]]:
        return answers_of(*self.search(queries, top_k, where=where), self.items)

    def embedding_at(self, index: int) -> torch.Tensor:
        return self.embeddings[index]  # (P,)

    def index_of(self, item: Any) -> int | None:
        try:
            return self.items.index(item)
        except ValueError:
            return None

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes the index into `directory` (created if missing), replacing an index that is there.

        Raises IndexFileError if `directory` is a file, or holds a `retrieval_index.json` that is not a valid index.
        """
        with _growing:
            snapshot = self._snapshot
            skipped = list(self.skipped)
        header = {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "projection_dim": self.projection_dim,
            "dtype": self.dtype,
            "count": snapshot.count,
            "skipped": skipped,
            "items": self.items[: snapshot.count],
        }
        keys = self.keys[: snapshot.count]
        write_index(Path(directory), header, torch.cat(snapshot.blocks), keys if any(keys) else None)
        return Path(directory)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "RetrievalIndex":
        """Reads a saved index. Raises IndexFileError, which names the file and the key, if it is not valid."""
        header, embeddings, keys = read_index(Path(directory))
        index = cls(header["projection_dim"], header["model"], header["fingerprint"], header["dtype"])
        index._snapshot = Snapshot((embeddings,), len(embeddings))
        index.items = header["items"]
        index.keys = keys
        index.skipped = header["skipped"]
        return index


__all__ = [
    "INDEX_FILE",
    "IndexFileError",
    "IndexMismatchError",
    "RetrievalIndex",
    "RetrievalIndexError",
    "space_fingerprint",
]
