"""A retrieval index: normalised embeddings, what each of them stands for, and the model that made them.

Shapes: n indexed items, P projection_dim, q queries, k answers per query (k = min(top_k, n)).

Threads may add, search, save and load at once. What is searched or saved is a snapshot: a tuple of blocks that nobody
changes, swapped for a longer one under a lock; the list of items only grows, and before the snapshot that counts them.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .retrieval_index_files import (
    DTYPES,
    INDEX_FILE,
    IndexFileError,
    IndexMismatchError,
    RetrievalIndexError,
    read_index,
    write_index,
)

QUERY_BLOCK = 1024
PRODUCTS = 1 << 24  # most products that are held at once
LOW_32_BITS = 0xFFFFFFFF

# of all indexes: it is held for the moment in which one grows, and an index that holds none can be copied
_growing = threading.Lock()


@dataclass(frozen=True)
class Snapshot:
    """
    An index at one moment.

    Attributes:
        blocks (`tuple[torch.Tensor, ...]`): (m, P) each, unit rows; n rows together, in the order of the items.
        count (`int`): n.
    """

    blocks: tuple[torch.Tensor, ...]
    count: int

    def grown(self, rows: torch.Tensor) -> "Snapshot":
        """With rows (m, P) behind: each block stays at least twice as long as the next, so they remain few."""
        blocks = [*self.blocks, rows]
        while len(blocks) > 1 and len(blocks[-2]) < 2 * len(blocks[-1]):
            last = blocks.pop()
            blocks[-1] = torch.cat([blocks[-1], last])
        return Snapshot(tuple(blocks), self.count + len(rows))


def space_fingerprint(model: torch.nn.Module, samples: int = 64) -> str:
    """Names the embedding space of a model: a digest of its weights, not of the place they were loaded from.

    Of every floating-point entry of the state dict the name, the shape and `samples` evenly spread values are
    hashed; the values as fp16, so that an fp32 checkpoint and the same one loaded in half precision agree.
    A retrained model differs, also when it was saved over the old one; a moved directory does not.
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
    """The floating-point tensors of an entry of a state dict; of quantised ones, packed in tuples or not, what they
    stand for."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from floats_of(part)
    elif isinstance(value, torch.Tensor):
        # torchao's tensors say that they are floats
        quantised = value.is_quantized or type(value).dequantize is not torch.Tensor.dequantize
        tensor = value.dequantize() if quantised else value
        if tensor.is_floating_point():
            yield tensor


def pack_keys(scores: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """fp32 scores (q, c) of items (q, c) → int64 keys (q, c) that sort as (score, then lower index first).

    The bits of an fp32 number, with those of negative ones mirrored, sort as the number does; they fill the upper
    half, the item's index, counted down, the lower half. No two keys are equal, so any top-k is a stable one.
    """
    bits = (scores + 0.0).contiguous().view(torch.int32)  # (q, c); + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(torch.int64)  # (q, c)
    return ordered * (LOW_32_BITS + 1) + (LOW_32_BITS - items)


def unpack_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack_keys`: int64 keys (q, k) → fp32 scores (q, k), int64 indices (q, k)."""
    ordered = (keys >> 32).to(torch.int32)  # (q, k)
    scores = torch.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).view(torch.float32)
    return scores, LOW_32_BITS - (keys & LOW_32_BITS)


def best_keys(queries: torch.Tensor, blocks: Iterable[torch.Tensor], k: int, chunk: int) -> torch.Tensor:
    """fp64 queries (q, P), blocks of items (m, P) → the k greatest keys (q, k), falling; see `pack_keys`."""
    best = torch.empty(len(queries), 0, dtype=torch.int64)  # (q, 0)
    start = 0
    for rows in (rows for block in blocks for rows in block.split(chunk)):
        keys = chunk_keys(queries, rows, k, start)  # (q, up to c)
        best = torch.cat([best, keys], dim=1)  # (q, up to k + c)
        best = best.topk(min(k, best.shape[1]), dim=1).values  # (q, up to k)
        start += len(rows)
    return best


def chunk_keys(queries: torch.Tensor, rows: torch.Tensor, k: int, start: int) -> torch.Tensor:
    """
    Keys of a chunk's items, the k greatest among them: fp64 (q, P), (c, P) → (q, at least min(k, c)).

    Products in fp32 choose who may be among the best, products in fp64 decide. An item is left out only if it lies
    below the k-th by more than the fp32 products of both can be wrong.
    """
    quick = queries.to(torch.float32) @ rows.to(torch.float32).T  # (q, c)
    slack = (rows.shape[1] + 8) * 2.0**-24  # of a sum of P products of unit vectors
    kept = min(2 * k + 30, len(rows))
    while True:
        values, places = quick.topk(kept, dim=1)  # (q, kept)
        exact = _products(queries, rows, places)  # (q, kept) fp64
        if kept == len(rows):
            break

        # a setting of torch may round the quick products further than is reckoned with
        as_reckoned = bool((values - exact).abs().max() <= slack)
        if as_reckoned and bool((values[:, -1] < values[:, k - 1] - 2 * slack).all()):
            break
        kept = min(4 * kept, len(rows)) if as_reckoned else len(rows)
    return pack_keys(exact.to(torch.float32), start + places)


def _products(queries: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Each query with its own items, summed one by one, so that no product depends on its neighbours. (q, kept)."""
    step = max(1, PRODUCTS // max(1, places.shape[1] * rows.shape[1]))
    parts = [
        (rows[some].to(torch.float64) * asked[:, None]).sum(-1)  # (s, kept)
        for asked, some in zip(queries.split(step), places.split(step), strict=True)
    ]
    return torch.cat(parts)


class RetrievalIndex:
    """Embeddings with their items, searched exactly.

    Args:
        projection_dim: P, the width of the embeddings.
        model: name or path of the model, for people and messages.
        fingerprint: what identifies the embedding space (`space_fingerprint`); None accepts any.
        dtype: "float16" (default, half the memory) or "float32", how embeddings are kept.
    """

    def __init__(
        self,
        projection_dim: int,
        model: str | None = None,
        fingerprint: str | None = None,
        dtype: str = "float16",
    ):
        # a width and a precision
        if not isinstance(projection_dim, int) or projection_dim < 1:
            raise ValueError(f"projection_dim must be a positive integer, got {projection_dim!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
        self.projection_dim = projection_dim
        self.model = model
        self.fingerprint = fingerprint
        self.dtype = dtype

        # items, which only grow, and their embeddings
        self.items: list[Any] = []
        self.skipped: list[dict[str, str]] = []
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

        # kept, unless rows were added meanwhile
        with _growing:
            if self._snapshot is snapshot:
                self._snapshot = Snapshot((joined,), snapshot.count)
        return joined

    def check_space(self, projection_dim: int, fingerprint: str | None = None, model: str | None = None) -> None:
        """Raises IndexMismatchError unless embeddings of this width and fingerprint belong into this index."""
        if projection_dim != self.projection_dim:
            raise IndexMismatchError(
                f"this index holds embeddings of width {self.projection_dim} (model {self.model!r}), "
                f"got width {projection_dim} (model {model!r})"
            )
        if None not in (fingerprint, self.fingerprint) and fingerprint != self.fingerprint:
            raise IndexMismatchError(
                f"this index was made by {self.model!r} (fingerprint {self.fingerprint}), got embeddings of {model!r} "
                f"(fingerprint {fingerprint}): the scores would mean nothing. Index again with the new model."
            )

    def add(
        self,
        embeddings: torch.Tensor,
        items: Iterable[Any],
        fingerprint: str | None = None,
        model: str | None = None,
    ) -> None:
        """Appends embeddings (m, P), normalised here, and their m items (paths or any JSON values).

        Raises:
            IndexMismatchError: another width or fingerprint than the index has.
            ValueError: not two-dimensional, not finite, a zero row, or not as many items as embeddings.
            TypeError: an item that JSON cannot hold.
        """
        # as many items as embeddings, of this space
        items = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in items]
        if not torch.is_tensor(embeddings) or embeddings.dim() != 2 or len(embeddings) != len(items):
            got = tuple(embeddings.shape) if torch.is_tensor(embeddings) else type(embeddings).__name__
            raise ValueError(f"expected a tensor of embeddings (m, {self.projection_dim}) and m items, "
                             f"got {got} and {len(items)} items")  # fmt: skip
        self.check_space(embeddings.shape[1], fingerprint, model)

        # every item must be one that can be saved, before anything is added
        for item in items:
            try:
                json.dumps(item, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"an item must be a path or a JSON value, got {type(item).__name__}: {error}"
                ) from None
        rows = unit_rows(embeddings).to(DTYPES[self.dtype])  # (m, P)

        # the items first: whatever a search finds has one
        with _growing:
            self.items.extend(items)
            self._snapshot = self._snapshot.grown(rows)

    def extend(self, other: "RetrievalIndex") -> "RetrievalIndex":
        """Appends all of another index of this space and dtype, what it skipped too, at once. Returns itself."""
        self.check_space(other.projection_dim, other.fingerprint, other.model)
        rows, items = other.embeddings.to(DTYPES[self.dtype]), list(other.items)  # (m, P)
        with _growing:
            self.items.extend(items)
            self.skipped = [*self.skipped, *other.skipped]
            self._snapshot = self._snapshot.grown(rows)
        return self

    def note_skipped(self, entries: Iterable[dict[str, str]]) -> None:
        """Lists more entries {"item", "reason"} that could not be read."""
        with _growing:
            self.skipped = [*self.skipped, *entries]

    def search(self, queries: torch.Tensor, top_k: int = 10, chunk: int = 16384) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine of every query with every item: exact, `chunk` items at a time.

        Products are summed in fp64 and rounded to fp32 once, so equal embeddings get equal scores wherever they
        stand and the size of the chunk never changes an answer; among equal scores the lower index comes first.

        Args:
            queries: (q, P), normalised here; any float dtype and device.
            top_k: answers wanted; cut to n.
        Returns:
            scores (q, k) fp32, falling, and indices (q, k) int64, k = min(top_k, n); on the CPU.
        """
        # sizes, and queries of this space
        for name, value in (("top_k", top_k), ("chunk", chunk)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not torch.is_tensor(queries) or queries.dim() != 2:
            got = tuple(queries.shape) if torch.is_tensor(queries) else type(queries).__name__
            raise ValueError(f"expected queries (q, {self.projection_dim}), got {got}")
        self.check_space(queries.shape[1])

        # blocks of queries, so that scores of all items are never held at once
        snapshot = self._snapshot
        k = min(top_k, snapshot.count)
        rows = unit_rows(queries)  # (q, P) fp64
        blocks = [best_keys(block, snapshot.blocks, k, chunk) for block in rows.split(QUERY_BLOCK)]
        return unpack_keys(torch.cat(blocks) if blocks else torch.empty(0, k, dtype=torch.int64))

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes the index into `directory` (made if missing); replaces an index that stands there.

        Raises IndexFileError if `directory` holds a `retrieval_index.json` that is not ours, or is a file.
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
        write_index(Path(directory), header, torch.cat(snapshot.blocks))
        return Path(directory)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "RetrievalIndex":
        """Reads a saved index. Raises IndexFileError, which names the file and the key, if anything is not right."""
        header, embeddings = read_index(Path(directory))
        index = cls(header["projection_dim"], header["model"], header["fingerprint"], header["dtype"])
        index._snapshot = Snapshot((embeddings,), len(embeddings))
        index.items = header["items"]
        index.skipped = header["skipped"]
        return index


def unit_rows(embeddings: torch.Tensor) -> torch.Tensor:
    """(m, P) of any float dtype and device → (m, P) fp64 on the CPU, every row of length one."""
    rows = embeddings.detach().to("cpu", torch.float64)  # (m, P)
    norms = rows.norm(dim=1, keepdim=True)  # (m, 1)
    bad = ~(torch.isfinite(norms) & (norms > 0)).squeeze(1)  # (m,)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"embedding {row} has no direction: its length is {norms[row].item()} (NaN, infinite or zero)"
        )
    return rows / norms


__all__ = [
    "INDEX_FILE",
    "IndexFileError",
    "IndexMismatchError",
    "RetrievalIndex",
    "RetrievalIndexError",
    "space_fingerprint",
]
