"""A retrieval index on disk: a directory with two files.

    retrieval_index.json               format, version, model, fingerprint, counts, items (JSON values), skipped
    embeddings-<digest>.safetensors    "embeddings" (n, P), fp16 or fp32, unit rows; named in the JSON file;
                                       "keys" (n, 16) bytes, digests of the rows' content; zeros if unknown

The embeddings are written first, under a name made from their digest, and the JSON file is renamed into place last.
Writers wait for each other, and a reader whose embeddings were replaced meanwhile reads again. So a reader always sees
one complete index, even during a write or after a crash.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors

FORMAT = "oner-retrieval-index"
FORMAT_VERSION = 1
INDEX_FILE = "retrieval_index.json"
LOCK_FILE = ".retrieval_index.lock"
TENSOR_NAME = "embeddings"
KEYS_NAME = "keys"
KEY_BYTES = 16
DTYPES = {"float16": torch.float16, "float32": torch.float32}
# files left by replaced indexes or killed writers
LEFTOVER = re.compile(r"embeddings-[0-9a-f]{16}\.safetensors|\.(embeddings-|retrieval_index\.json).*\.tmp")
UNIT_TOLERANCE = 1e-2  # fp16 rows are off by 1e-3


class RetrievalIndexError(ValueError):
    """Base of the errors of a retrieval index."""


class IndexFileError(RetrievalIndexError):
    """A file of the index is missing, damaged or of another format; `file`, and `key` if not None, name the place."""

    def __init__(self, file: str | os.PathLike, reason: str, key: str | None = None):
        self.file = str(file)
        self.key = key
        super().__init__(f"{file}{'' if key is None else f', key {key!r}'}: {reason}")


class IndexMismatchError(RetrievalIndexError):
    """Embeddings are from another model, or of another width, than those of the index."""


def write_index(
    directory: Path, header: dict[str, Any], embeddings: torch.Tensor, keys: Sequence[str | None] | None = None
) -> None:
    """Writes an index: a header, to which it adds format, version and digests, embeddings (n, P), and n keys.

    Raises IndexFileError if `directory` is a file, or holds a `retrieval_index.json` that is not a valid index.
    """
    if directory.exists() and not directory.is_dir():
        raise IndexFileError(directory, "is a file; an index is saved into a directory")
    directory.mkdir(parents=True, exist_ok=True)

    # the embeddings, under a name made from their digest
    tensors = {TENSOR_NAME: embeddings.contiguous()}
    if keys is not None:
        together = b"".join(bytes(KEY_BYTES) if key is None else bytes.fromhex(key) for key in keys)
        tensors[KEYS_NAME] = torch.frombuffer(bytearray(together), dtype=torch.uint8).view(-1, KEY_BYTES)  # (n, 16)
    payload = dump_safetensors(tensors, metadata={"format": "pt"})
    digest = hashlib.sha256(payload).hexdigest()
    name = f"embeddings-{digest[:16]}.safetensors"
    header = {"format": FORMAT, "version": FORMAT_VERSION, **header, "embeddings_file": name}
    header = {**header, "embeddings_sha256": digest}
    header["header_sha256"] = header_digest(header)

    # only a valid index may be replaced
    with FileLock(directory / LOCK_FILE):
        if (directory / INDEX_FILE).exists():
            read_header(directory)

        # the header last, so that a reader always sees one complete index
        write_in_place(directory / name, payload)
        write_in_place(directory / INDEX_FILE, json.dumps(header, indent=1, allow_nan=False).encode())
        # no header names the old embeddings any more
        for file in directory.iterdir():
            if LEFTOVER.fullmatch(file.name) and file.name != name:
                file.unlink(missing_ok=True)


def read_index(directory: Path) -> tuple[dict[str, Any], torch.Tensor, list[str | None]]:
    """Reads and validates the header, embeddings (n, P) and n keys. Raises IndexFileError."""
    header = read_header(directory)
    while True:
        try:
            embeddings, keys = read_embeddings(directory, header)
        except IndexFileError:
            # a writer may have replaced the embeddings since the header was read
            newer = read_header(directory)
            if newer["embeddings_file"] == header["embeddings_file"]:
                raise
            header = newer
        else:
            break

    # checked last, because the other errors are more specific; older files have no digest
    if header.get("header_sha256", header_digest(header)) != header_digest(header):
        raise IndexFileError(directory / INDEX_FILE, "damaged: not what was saved", key="header_sha256")
    return header, embeddings, keys


def header_digest(header: dict[str, Any]) -> str:
    """SHA-256 of the header without its own digest."""
    rest = {key: value for key, value in header.items() if key != "header_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_in_place(path: Path, payload: bytes) -> None:
    """Writes atomically: into a temporary file beside `path`, flushed to disk, then renamed."""
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
    """Reads and validates `retrieval_index.json`."""
    path = directory / INDEX_FILE
    if not path.is_file():
        raise IndexFileError(path, "no such file; expected a directory that RetrievalIndex.save wrote")

    # JSON of this format, in a known version
    try:
        header = json.loads(path.read_bytes())
    except OSError as error:
        raise IndexFileError(path, f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number with too many digits
        raise IndexFileError(path, f"damaged, not readable as JSON ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        got = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise IndexFileError(path, f"not a retrieval index: expected {FORMAT!r}, got {got!r}", key="format")
    got = header.get("version")
    if got != FORMAT_VERSION or isinstance(got, bool):
        raise IndexFileError(path, f"this oner reads version {FORMAT_VERSION}, got {got!r}", key="version")
    check_header(path, header)
    return header


def check_header(path: Path, header: dict[str, Any]) -> None:
    """Raises IndexFileError for the first key that is missing or has an invalid value."""
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

    # the values
    if header["projection_dim"] < 1:
        raise IndexFileError(path, f"expected a positive width, got {header['projection_dim']}", key="projection_dim")
    if header["dtype"] not in DTYPES:
        raise IndexFileError(path, f"expected one of {sorted(DTYPES)}, got {header['dtype']!r}", key="dtype")
    name = header["embeddings_file"]
    if not re.fullmatch(r"embeddings-\w+\.safetensors", name):
        raise IndexFileError(path, f"expected embeddings-….safetensors beside it, got {name!r}", key="embeddings_file")
    if header["count"] != len(header["items"]):
        raise IndexFileError(path, f"says {header['count']}, but there are {len(header['items'])} items", key="count")


def read_embeddings(directory: Path, header: dict[str, Any]) -> tuple[torch.Tensor, list[str | None]]:
    """Reads and validates the embeddings (n, P) that the header names, and their n keys or None."""
    # the bytes must match the digest
    path = directory / header["embeddings_file"]
    if not path.is_file():
        raise IndexFileError(path, f"no such file, but {INDEX_FILE} names it", key="embeddings_file")
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise IndexFileError(path, f"cannot be read ({error.strerror})") from None
    if hashlib.sha256(payload).hexdigest() != header["embeddings_sha256"]:
        raise IndexFileError(path, "damaged: not the bytes that were saved", key="embeddings_sha256")

    # shape and dtype must match the header
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
    off = (torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32) - 1).abs()  # (n,)
    if (off > UNIT_TOLERANCE).any():
        raise IndexFileError(path, f"row {int(off.argmax())} is not of length one", key=TENSOR_NAME)
    return rows, read_keys(path, tensors.get(KEYS_NAME), header["count"])


def read_keys(path: Path, tensor: torch.Tensor | None, count: int) -> list[str | None]:
    """Bytes (n, 16), or None → n hexadecimal keys; None for unknown ones."""
    if tensor is None:
        return [None] * count
    if tuple(tensor.shape) != (count, KEY_BYTES) or tensor.dtype != torch.uint8:
        got = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise IndexFileError(path, f"expected {(count, KEY_BYTES)} torch.uint8, got {got}", key=KEYS_NAME)
    digits = tensor.numpy().tobytes().hex()
    none = "0" * 2 * KEY_BYTES
    keys = (digits[start : start + len(none)] for start in range(0, len(digits), len(none)))
    return [None if key == none else key for key in keys]


__all__ = ["INDEX_FILE", "IndexFileError", "IndexMismatchError", "RetrievalIndexError", "read_index", "write_index"]
