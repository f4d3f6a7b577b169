"""The search backends of a retrieval pipeline: their common interface, and access to them by name.

    exact      `RetrievalIndex` itself: compares every item, in memory
    faiss      an approximate index (graph or inverted lists) over the same embeddings, stored beside them
    lancedb    a table of LanceDB, in a directory or at an address
    qdrant     a collection of Qdrant, in a directory or on a server

Each but the first is built from a saved index, and returns the same indices, items and columns. Their modules are
imported on demand; they are part of oner and are not copied into published models.

Shapes: n indexed items, P projection_dim, q queries, k answers per query.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .retrieval_filter import Where
from .retrieval_index_files import IndexFileError, IndexMismatchError, read_header, write_in_place

BACKENDS = ("exact", "faiss", "lancedb", "qdrant")
BUILT = ("faiss", "lancedb", "qdrant")
FORMAT = "oner-search-backend"

Answer = dict[str, Any]


class SearchBackend(ABC):
    """
    Attributes:
        projection_dim: P, the width of the embeddings.
        model: name or path of the model that computed them, for display and messages.
        fingerprint: identifies their space (`space_fingerprint`); None accepts any.
    """

    projection_dim: int
    model: str | None
    fingerprint: str | None

    @abstractmethod
    def __len__(self) -> int:
        """n."""

    @abstractmethod
    def answers(self, queries: torch.Tensor, top_k: int = 10, where: Where = None) -> list[list[Answer]]:
        """For each query (q, P), of any norm, its answers {"score", "item", "index"}, best first.

        The score is the cosine. `where` restricts the items, see `retrieval_filter.py`.
        """

    @abstractmethod
    def embedding_at(self, index: int) -> torch.Tensor:
        """The unit embedding (P,) of one item."""

    @abstractmethod
    def index_of(self, item: Any) -> int | None:
        """The index of an item, or of the first of several; None if there is none."""

    def neighbours(self, item: Any, top_k: int = 10, where: Where = None) -> list[Answer]:
        """Nearest neighbours of an indexed item, without itself; `item` may be its index, if no item equals that int.

        Raises:
            ValueError: there is no such item.
        """
        index = self.index_of(item)
        if index is None and isinstance(item, int) and not isinstance(item, bool):
            index = item
        if index is None or not 0 <= index < len(self):
            raise ValueError(f"{item!r} is not in the index of {len(self)} items; expected an item or its number")
        found = self.answers(self.embedding_at(index)[None], top_k + 1, where)[0]  # (1, P)
        return [answer for answer in found if answer["index"] != index][:top_k]

    def check_space(self, projection_dim: int, fingerprint: str | None = None, model: str | None = None) -> None:
        """Raises IndexMismatchError unless embeddings have this index's width and fingerprint."""
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

    def check_queries(self, queries: torch.Tensor, top_k: int) -> None:
        """Raises ValueError unless `top_k` is a positive integer and the queries have this index's width."""
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise ValueError(f"top_k must be a positive integer, got {top_k!r}")
        if not torch.is_tensor(queries) or queries.dim() != 2:
            got = tuple(queries.shape) if torch.is_tensor(queries) else type(queries).__name__
            raise ValueError(f"expected queries (q, {self.projection_dim}), got {got}")
        self.check_space(queries.shape[1])


class DatabaseBackend(SearchBackend):
    """
    A backend that keeps its rows in a database.

    Args:
        note: describes what was built from which index, see `write_note`.
    """

    def __init__(self, note: Mapping[str, Any]):
        self.projection_dim = note["projection_dim"]
        self.model = note["model"]
        self.fingerprint = note["fingerprint"]
        self._count = note["count"]

    def __len__(self) -> int:
        return self._count

    def _first(self, ask: Callable[[int], list[Answer]], top_k: int) -> list[Answer]:
        """
        The first answers of one query; ties are broken by lower index. A database may return any of several items with
        equal scores (copies of one image, for example), so this asks for all items that tie with the last answer.

        Args:
            ask: number of answers -> that many of the best, in any order.
        """
        wanted = top_k + 1
        while True:
            found = sorted(ask(wanted), key=lambda one: (-one["score"], one["index"]))
            if len(found) < wanted or found[-1]["score"] < found[top_k - 1]["score"]:
                return found[:top_k]
            wanted = 4 * wanted


def answers_of(scores: torch.Tensor, indices: torch.Tensor, items: Sequence[Any]) -> list[list[Answer]]:
    """Scores and indices (q, k) → the answers of each query, with their items taken from `items`."""
    return [
        [{"score": score, "item": items[index], "index": index} for score, index in zip(*pair, strict=True)]
        for pair in zip(scores.tolist(), indices.tolist(), strict=True)
    ]


def open_backend(name: str, directory: str | Path) -> SearchBackend:
    """Opens the backend that was built in the directory of an index.

    Raises:
        ValueError: the name is unknown.
        ImportError: its library is not installed.
        IndexFileError: it was not built there, or its embeddings or items have been replaced since.
    """
    return _module(name).Backend.open(Path(directory))


def build_backend(name: str, directory: str | Path, **options: Any) -> SearchBackend:
    """Builds a backend from the index in `directory`, stores it there and opens it. Raises as `open_backend`."""
    return _module(name).Backend.build(Path(directory), **options)


def built_backends(directory: str | Path) -> list[str]:
    """Names of the backends that were built in the directory of an index."""
    return [name for name in BUILT if (Path(directory) / f"{name}.json").is_file()]


def build_stale(directory: str | Path) -> list[str]:
    """Rebuilds, with their original options, the backends whose index was replaced since; returns their names."""
    header = read_header(Path(directory))
    kept = {name: read_note(Path(directory), name) for name in built_backends(directory)}
    stale = [name for name, note in kept.items() if note["index"] != index_state(header)]
    for name in stale:
        build_backend(name, directory, **kept[name]["options"])
    return stale


def _module(name: str) -> Any:
    if name not in BUILT:
        raise ValueError(f"a backend is one of {', '.join(BUILT)}, or exact, which needs no building; got {name!r}")
    try:
        return import_module(f".backend_{name}", __package__)
    except ModuleNotFoundError as error:
        if not f"{__package__}.backend_{name}".startswith(str(error.name)):
            raise
        raise ImportError(f"the backend {name!r} comes with oner, not with a model's own code: install oner") from None


def library(name: str, extra: str) -> Any:
    """Imports a library that only one backend needs. Raises ImportError that says how to install it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise
        raise ImportError(f"this backend needs {error.name}: pip install 'oner[{extra}]'") from None


def written(item: Any) -> str:
    """An item as JSON text, under which a database stores and finds it."""
    return json.dumps(item, ensure_ascii=False, sort_keys=True)


def index_state(header: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the header that change if the index's embeddings or items change."""
    return {"embeddings_file": header["embeddings_file"], "header_sha256": header.get("header_sha256")}


def write_note(directory: Path, name: str, header: Mapping[str, Any], options: Mapping[str, Any], **more: Any) -> None:
    """Records in NAME.json what was built, from which index and with which options; written last."""
    space = {key: header[key] for key in ("model", "fingerprint", "projection_dim", "count")}
    note = {"format": FORMAT, "backend": name, **space, "index": index_state(header), "options": dict(options), **more}
    write_in_place(directory / f"{name}.json", json.dumps(note, indent=1).encode())


def read_note(directory: Path, name: str) -> dict[str, Any]:
    """Reads the note of `write_note`. Raises IndexFileError if it is missing or not valid."""
    file = directory / f"{name}.json"
    if not file.is_file():
        raise IndexFileError(file, f"no such file; build it: oner index SOURCE {directory} --backend {name}")
    try:
        note = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise IndexFileError(file, f"damaged, not readable as JSON ({error})") from None
    wanted = {"model", "fingerprint", "projection_dim", "count", "index", "options"}
    if not isinstance(note, dict) or note.get("format") != FORMAT or wanted - set(note):
        raise IndexFileError(file, f"not what {FORMAT} wrote", key="format")
    return note


def current_note(directory: Path, name: str) -> dict[str, Any]:
    """`read_note` for a backend that was built from the current embeddings and items; else raises IndexFileError."""
    note = read_note(directory, name)
    if note["index"] != index_state(read_header(directory)):
        raise IndexFileError(
            directory / f"{name}.json",
            f"was built from embeddings or items that have been replaced; build it again: --backend {name}",
            key="index",
        )
    return note


__all__ = [
    "BACKENDS",
    "Answer",
    "DatabaseBackend",
    "SearchBackend",
    "answers_of",
    "build_backend",
    "build_stale",
    "built_backends",
    "open_backend",
]
