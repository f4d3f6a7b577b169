"""A retrieval index: normalised embeddings, what each of them stands for, and the model that made them.

Shapes: n indexed items, P projection_dim, q queries, k answers per query (k = min(top_k, n)).

On disk an index is a directory of two files:

    retrieval_index.json               format, version, model, fingerprint, counts, items (JSON values), skipped
    embeddings-<digest>.safetensors    "embeddings" (n, P), fp16 or fp32, unit rows; named in the JSON file

The embeddings are written first, under a name made of their digest, and the JSON file is renamed into place last:
whoever reads the directory, also after a crash, sees the old index or the new one, never half of each.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors

FORMAT = "oner-retrieval-index"
FORMAT_VERSION = 1
INDEX_FILE = "retrieval_index.json"
TENSOR_NAME = "embeddings"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
QUERY_BLOCK = 1024
LOW_32_BITS = 0xFFFFFFFF


class RetrievalIndexError(ValueError):
    """Anything that is wrong with a retrieval index."""


class IndexFileError(RetrievalIndexError):
    """A file of the index is missing, damaged or not ours. `file` and, where there is one, `key` say which."""

    def __init__(self, file: str | os.PathLike, reason: str, key: str | None = None):
        self.file = str(file)
        self.key = key
        super().__init__(f"{file}{'' if key is None else f', key {key!r}'}: {reason}")


class IndexMismatchError(RetrievalIndexError):
    """Embeddings of another model or of another width than the index holds."""


def space_fingerprint(model: torch.nn.Module, samples: int = 64) -> str:
    """Names the embedding space of a model: a digest of its weights, not of the place they were loaded from.

    Of every floating-point entry of the state dict the name, the shape and `samples` evenly spread values are
    hashed; the values as fp16, so that an fp32 checkpoint and the same one loaded in half precision agree.
    A retrained model differs, also when it was saved over the old one; a moved directory does not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.numel() and not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // samples)][:samples]
            digest.update(picked.to("cpu", torch.float16).numpy().tobytes())
    return digest.hexdigest()[:32]


def pack_keys(scores: torch.Tensor, start: int) -> torch.Tensor:
    """fp32 scores (q, c) of items start..start+c-1 → int64 keys (q, c) that sort as (score, then lower index first).

    The bits of an fp32 number, with those of negative ones mirrored, sort as the number does; they fill the upper
    half, the item's index, counted down, the lower half. No two keys are equal, so any top-k is a stable one.
    """
    bits = (scores + 0.0).contiguous().view(torch.int32)  # (q, c); + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(torch.int64)  # (q, c)
    index = torch.arange(start, start + scores.shape[1], dtype=torch.int64)  # (c,)
    return ordered * (LOW_32_BITS + 1) + (LOW_32_BITS - index)


def unpack_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack_keys`: int64 keys (q, k) → fp32 scores (q, k), int64 indices (q, k)."""
    ordered = (keys >> 32).to(torch.int32)  # (q, k)
    scores = torch.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).view(torch.float32)
    return scores, LOW_32_BITS - (keys & LOW_32_BITS)


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

        # items, and their embeddings in blocks, as they were added
        self.items: list[Any] = []
        self.skipped: list[dict[str, str]] = []
        self._blocks: list[torch.Tensor] = [torch.empty(0, projection_dim, dtype=DTYPES[dtype])]

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"RetrievalIndex({len(self)} items, {self.projection_dim} wide, {self.dtype}, model {self.model!r})"

    @property
    def embeddings(self) -> torch.Tensor:
        """(n, P), unit rows, on the CPU."""
        # joined when they are first read: many small additions cost one copy
        if len(self._blocks) > 1:
            self._blocks = [torch.cat(self._blocks)]
        return self._blocks[0]

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
        self._blocks.append(unit_rows(embeddings).to(DTYPES[self.dtype]))  # (m, P)
        self.items.extend(items)

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
        k = min(top_k, len(self))
        rows = unit_rows(queries)  # (q, P) fp64
        blocks = [self._best_keys(block, k, chunk) for block in rows.split(QUERY_BLOCK)]
        return unpack_keys(torch.cat(blocks) if blocks else torch.empty(0, k, dtype=torch.int64))

    def _best_keys(self, queries: torch.Tensor, k: int, chunk: int) -> torch.Tensor:
        """fp64 queries (q, P) → the k greatest keys (q, k), falling; see `pack_keys`."""
        best = torch.empty(len(queries), 0, dtype=torch.int64)  # (q, 0)
        for start in range(0, len(self), chunk):
            rows = self.embeddings[start : start + chunk].to(torch.float64)  # (c, P)
            keys = pack_keys((queries @ rows.T).to(torch.float32), start)  # (q, c)
            best = torch.cat([best, keys], dim=1)  # (q, up to k + c)
            best = best.topk(min(k, best.shape[1]), dim=1).values  # (q, up to k)
        return best

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes the index into `directory` (made if missing); replaces an index that stands there.

        Raises IndexFileError if `directory` holds a `retrieval_index.json` that is not ours, or is a file.
        """
        # what may be replaced: nothing, or an index
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise IndexFileError(directory, "is a file; an index is saved into a directory")
        previous = read_header(directory) if (directory / INDEX_FILE).exists() else None
        directory.mkdir(parents=True, exist_ok=True)

        # the embeddings, under a name made of their digest
        payload = dump_safetensors({TENSOR_NAME: self.embeddings.contiguous()}, metadata={"format": "pt"})
        digest = hashlib.sha256(payload).hexdigest()
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "projection_dim": self.projection_dim,
            "dtype": self.dtype,
            "count": len(self),
            "embeddings_file": f"embeddings-{digest[:16]}.safetensors",
            "embeddings_sha256": digest,
            "skipped": self.skipped,
            "items": self.items,
        }

        # the header last: who reads meanwhile sees one index whole
        write_in_place(directory / header["embeddings_file"], payload)
        write_in_place(directory / INDEX_FILE, json.dumps(header, indent=1, allow_nan=False).encode())
        # nobody names the old embeddings any more
        if previous is not None and previous["embeddings_file"] != header["embeddings_file"]:
            (directory / previous["embeddings_file"]).unlink(missing_ok=True)
        return directory

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "RetrievalIndex":
        """Reads a saved index. Raises IndexFileError, which names the file and the key, if anything is not right."""
        directory = Path(directory)
        header = read_header(directory)
        index = cls(header["projection_dim"], header["model"], header["fingerprint"], header["dtype"])
        index._blocks = [read_embeddings(directory, header)]
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


def write_in_place(path: Path, payload: bytes) -> None:
    """Writes beside `path`, flushes to the disk, then renames: `path` is never half written."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_header(directory: Path) -> dict[str, Any]:
    """The checked content of `retrieval_index.json`."""
    path = directory / INDEX_FILE
    if not path.is_file():
        raise IndexFileError(path, "no such file; expected a directory that RetrievalIndex.save wrote")

    # a document of ours, of a version that is known
    try:
        header = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise IndexFileError(path, f"damaged, not readable as JSON ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        got = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise IndexFileError(path, f"not a retrieval index: expected {FORMAT!r}, got {got!r}", key="format")
    if header.get("version") != FORMAT_VERSION:
        got = header.get("version")
        raise IndexFileError(path, f"this oner reads version {FORMAT_VERSION}, got {got!r}", key="version")
    check_header(path, header)
    return header


def check_header(path: Path, header: dict[str, Any]) -> None:
    """Raises IndexFileError for the first key that is missing or not what `save` writes."""
    optional_text: tuple[type, ...] = (str, type(None))
    types: dict[str, tuple[type, ...]] = {
        "model": optional_text, "fingerprint": optional_text, "projection_dim": (int,), "dtype": (str,),
        "count": (int,), "embeddings_file": (str,), "embeddings_sha256": (str,), "skipped": (list,), "items": (list,),
    }  # fmt: skip

    # the types of all keys
    for key, expected in types.items():
        if key not in header:
            raise IndexFileError(path, "missing", key=key)
        if not isinstance(header[key], expected) or isinstance(header[key], bool):
            wanted = " or ".join(kind.__name__ for kind in expected)
            raise IndexFileError(path, f"expected {wanted}, got {type(header[key]).__name__}", key=key)

    # values that make an index
    if header["projection_dim"] < 1:
        raise IndexFileError(path, f"expected a positive width, got {header['projection_dim']}", key="projection_dim")
    if header["dtype"] not in DTYPES:
        raise IndexFileError(path, f"expected one of {sorted(DTYPES)}, got {header['dtype']!r}", key="dtype")
    name = header["embeddings_file"]
    if (
        Path(name).name != name
        or "\\" in name
        or not (name.startswith("embeddings-") and name.endswith("safetensors"))
    ):
        raise IndexFileError(path, f"expected embeddings-….safetensors beside it, got {name!r}", key="embeddings_file")
    if header["count"] != len(header["items"]):
        raise IndexFileError(path, f"says {header['count']}, but there are {len(header['items'])} items", key="count")


def read_embeddings(directory: Path, header: dict[str, Any]) -> torch.Tensor:
    """The checked embeddings (n, P) that the header names."""
    # the very bytes that were saved
    path = directory / header["embeddings_file"]
    if not path.is_file():
        raise IndexFileError(path, f"no such file, but {INDEX_FILE} names it", key="embeddings_file")
    payload = path.read_bytes()
    if hashlib.sha256(payload).hexdigest() != header["embeddings_sha256"]:
        raise IndexFileError(path, "damaged: not the bytes that were saved", key="embeddings_sha256")

    # as the header describes them
    try:
        tensors = load_safetensors(payload)
    except (SafetensorError, ValueError) as error:
        raise IndexFileError(path, f"not readable as safetensors ({error})") from None
    if TENSOR_NAME not in tensors:
        raise IndexFileError(path, f"missing; the file holds {sorted(tensors)}", key=TENSOR_NAME)
    rows = tensors[TENSOR_NAME]
    expected = (header["count"], header["projection_dim"])
    if tuple(rows.shape) != expected or rows.dtype != DTYPES[header["dtype"]]:
        got = f"{tuple(rows.shape)} {rows.dtype}"
        raise IndexFileError(path, f"expected {expected} {header['dtype']}, got {got}", key=TENSOR_NAME)
    if not torch.isfinite(rows).all():
        raise IndexFileError(path, "holds numbers that are not finite", key=TENSOR_NAME)
    return rows
