"""Embeddings that need not be computed again when indexing resumes: the saved index, and partial files beside it.

    unfinished/<digest>.safetensors    "embeddings" (m, P) fp32, and the keys of their m rows in the metadata

Several processes may write such parts at once, each for its share of the rows; a later indexing process finds them
all. A row's key is a digest of its content and of the model: a file is recognised at another position in the list, but
not if it has changed since.
"""

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump_safetensors

from .image_processing_vl import open_image
from .retrieval_index_files import (
    DTYPES,
    INDEX_FILE,
    TENSOR_NAME,
    IndexFileError,
    read_header,
    read_index,
    write_in_place,
)
from .retrieval_nearest import unit_rows
from .retrieval_sources import Query

PARTS = "unfinished"
# lock of share 0, also taken by a process that indexes alone
BUSY_FILE = ".indexing.lock"
BUSY_SHARE_FILE = ".indexing-{}.lock"
PART_ROWS = 4096
PART_SECONDS = 5.0


class UnfinishedIndex:
    """
    The embeddings computed so far: the rows of the index saved in a directory, and of the parts beside it.

    Args:
        directory: directory of the index; None stores nothing.
        space: identifies model and processor.
        dtype: of the new index; rows saved in another dtype are embedded again.

    Attributes:
        rows: embeddings (P,) fp32 of the parts, by key.
        embedded: number of rows embedded since it was opened.
    """

    def __init__(self, directory: Path | None, space: str, dtype: str = "float16"):
        self.folder = None if directory is None else directory / PARTS
        self.space = space
        self.dtype = DTYPES[dtype]
        self.embedded = 0
        self.rows: dict[str, torch.Tensor] = {}
        self._fresh: dict[str, torch.Tensor] = {}
        self._written = time.monotonic()
        for file in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            self.rows.update(read_part(file))
        self._saved, self._keys = saved_rows(directory, dtype)  # unit rows (n, P), n keys
        self._places = {key: place for place, key in enumerate(self._keys) if key is not None}

    def find(self, key: str | None) -> torch.Tensor | None:
        """The unit row (P,) of a key, in the index's dtype and bit for bit as it would be saved; None if unknown."""
        if key in self._places:
            return self._saved[self._places[key]]
        return unit_rows(self.rows[key][None])[0].to(self.dtype) if key in self.rows else None

    def counts(self, keys: Sequence[str | None]) -> dict[str, int]:
        """Counts of rows of the new index, from its keys: "embedded", "kept" from before, and earlier rows that are
        "gone" from it. Several rows may have one key, as the captions of one image do."""
        # a row without a key cannot be recognised, so an earlier one counts as gone
        gone = Counter(self._keys) - Counter(key for key in keys if key is not None)
        return {"embedded": self.embedded, "kept": len(keys) - self.embedded, "gone": gone.total()}

    def key(self, query: Query) -> str | None:
        """Key of a row {"text", "image"}; None if nothing is stored, or if the content cannot be read."""
        if self.folder is None:
            return None
        digest = hashlib.sha256(self.space.encode())
        try:
            for name in sorted(query):
                digest.update(f"\0{name}\0".encode())
                for piece in content_of(query[name], name):
                    digest.update(piece)
        except Exception:  # a missing file or a damaged image: reported where it is opened
            return None
        return digest.hexdigest()[:32]

    def add(self, rows: Iterable[tuple[str | None, torch.Tensor]]) -> None:
        """Adds embeddings (P,) by key; writes them after PART_ROWS rows or PART_SECONDS seconds."""
        rows = list(rows)
        self.embedded += len(rows)
        self._fresh.update((key, row) for key, row in rows if key is not None)
        if len(self._fresh) >= PART_ROWS or time.monotonic() - self._written > PART_SECONDS:
            self.write()

    def write(self) -> None:
        """Writes the rows added since the last part as the next part."""
        if not self._fresh:
            return
        metadata = {"keys": json.dumps(list(self._fresh))}
        payload = dump_safetensors({TENSOR_NAME: torch.stack(list(self._fresh.values()))}, metadata=metadata)
        self.folder.mkdir(exist_ok=True)
        write_in_place(self.folder / f"{hashlib.sha256(payload).hexdigest()[:16]}.safetensors", payload)
        self.rows.update(self._fresh)
        self._fresh = {}
        self._written = time.monotonic()

    def finish(self) -> None:
        """Removes the parts, once the complete index is saved."""
        self._fresh = {}
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def unfinished_index(
    directory: str | os.PathLike | None, space: str, dtype: str = "float16", share: int = 0
) -> Iterator[UnfinishedIndex]:
    """Reserves `directory`, or one share of it, for this process to index into; after an error, the embeddings
    computed so far remain.

    Raises IndexFileError if another process is indexing into it, or `directory` is a file or holds something else.
    """
    if directory is None:
        yield UnfinishedIndex(None, space, dtype)
        return
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise IndexFileError(directory, "is a file; an index is saved into a directory")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(directory / (BUSY_SHARE_FILE.format(share) if share else BUSY_FILE), timeout=0):
            unfinished = UnfinishedIndex(directory, space, dtype)
            try:
                yield unfinished
            finally:
                unfinished.write()
    except Timeout:
        raise IndexFileError(directory, "another process is indexing into it") from None


def read_part(file: Path) -> dict[str, torch.Tensor]:
    """Embeddings (P,) by key; empty if the part is damaged, whose rows are then embedded again."""
    try:
        with safe_open(file, framework="pt") as part:
            keys = json.loads((part.metadata() or {}).get("keys", "[]"))
            rows = part.get_tensor(TENSOR_NAME)  # (m, P)
    except (SafetensorError, OSError, ValueError):
        return {}
    whole = len(keys) == len(rows) and bool(torch.isfinite(rows).all())
    return dict(zip(keys, rows, strict=True)) if whole else {}


def saved_rows(directory: Path | None, dtype: str) -> tuple[torch.Tensor, list[str | None]]:
    """Unit rows (n, P) of the index saved in `directory`, and their keys; empty if it is damaged or has another dtype.
    Raises IndexFileError if `retrieval_index.json` has another format."""
    nothing = torch.empty(0, 0)
    if directory is None or not (directory / INDEX_FILE).is_file():
        return nothing, []
    read_header(directory)
    try:
        header, rows, keys = read_index(directory)
    except IndexFileError:
        return nothing, []
    if header["dtype"] != dtype:
        return nothing, []
    return rows, list(keys)


def content_of(value: Any, name: str) -> Iterator[bytes]:
    """
    Bytes that identify a text or an image. A file is identified by path, size, and times of modification and status
    change; the latter cannot be set, so a file replaced by one of the same size and date is recognised as changed.
    """
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        yield text.encode()
        if name == "image" and not text.startswith(("http://", "https://")) and os.path.exists(text):
            status = os.stat(text)
            yield f"\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}".encode()
        return
    if isinstance(value, (bytes, bytearray, memoryview)):
        yield bytes(value)
        return

    # images in memory as RGB: the raw values alone imply neither palette nor range
    picture = open_image(value)
    yield f"pixels {picture.size}".encode()
    yield picture.tobytes()


__all__ = ["UnfinishedIndex", "unfinished_index"]
