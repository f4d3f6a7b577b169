"""What answers questions for a retrieval pipeline: one small interface, and the backends behind it by their names.

    exact      `RetrievalIndex` itself: every item is compared, in memory
    faiss      a graph or lists of neighbours over the same embeddings, beside them
    lancedb    a table of LanceDB, in a directory or at an address
    qdrant     a collection of Qdrant, in a directory or on a server

Each but the first is built from a saved index, and answers with the same numbers, items and columns. Their files are
imported when they are asked for; they stay with oner and do not travel with a published model.

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
        model: name or path of the model that made them, for people and messages.
        fingerprint: what identifies their space (`space_fingerprint`); None accepts any.
    """

    projection_dim: int
    model: str | None
    fingerprint: str | None

    @abstractmethod
    def __len__(self) -> int:
        """n."""

    @abstractmethod
    def answers(self, queries: torch.Tensor, top_k: int = 10, where: Where = None) -> list[list[Answer]]:
        """For each of queries (q, P), of any length, its {"score", "item", "index"}, best first.

        The score is the cosine. `where` admits some of the items, see `retrieval_filter.py`.
        """

    @abstractmethod
    def embedding_at(self, index: int) -> torch.Tensor:
        """(P,), the unit row of one item."""

    @abstractmethod
    def index_of(self, item: Any) -> int | None:
        """The number of an item, of the first if there are several; None if there is none."""

    def neighbours(self, item: Any, top_k: int = 10, where: Where = None) -> list[Answer]:
        """The nearest of an item that is indexed, given by itself, or by its number where that is no item, without it.

        Raises:
            ValueError: no such item.
        """
        index = self.index_of(item)
        if index is None and isinstance(item, int) and not isinstance(item, bool):
            index = item
        if index is None or not 0 <= index < len(self):
            raise ValueError(f"{item!r} is not in the index of {len(self)} items; expected an item or its number")
        found = self.answers(self.embedding_at(index)[None], top_k + 1, where)[0]  # (1, P)
        return [answer for answer in found if answer["index"] != index][:top_k]

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

    def check_queries(self, queries: torch.Tensor, top_k: int) -> None:
        """Raises ValueError for what is no number of answers, and for what are no queries of this space."""
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise ValueError(f"top_k must be a positive integer, got {top_k!r}")
        if not torch.is_tensor(queries) or queries.dim() != 2:
            got = tuple(queries.shape) if torch.is_tensor(queries) else type(queries).__name__
            raise ValueError(f"expected queries (q, {self.projection_dim}), got {got}")
        self.check_space(queries.shape[1])


class DatabaseBackend(SearchBackend):
    """
    One whose rows lie in a database of its own.

    Args:
        note: what was built from which index, see `write_note`.
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
        The first answers of one query, of equal scores those of lower numbers: a database leaves open which of several
        it gives, copies of one picture say, so it is asked for all that are as good as the last.

        Args:
            ask: how many -> so many of the best, in any order.
        """
        wanted = top_k + 1
        while True:
            found = sorted(ask(wanted), key=lambda one: (-one["score"], one["index"]))
            if len(found) < wanted or found[-1]["score"] < found[top_k - 1]["score"]:
                return found[:top_k]
            wanted = 4 * wanted


def answers_of(scores: torch.Tensor, indices: torch.Tensor, items: Sequence[Any]) -> list[list[Answer]]:
    """Scores and numbers (q, k) → the answers of each query, their items out of all."""
    return [
        [{"score": score, "item": items[index], "index": index} for score, index in zip(*pair, strict=True)]
        for pair in zip(scores.tolist(), indices.tolist(), strict=True)
    ]


def open_backend(name: str, directory: str | Path) -> SearchBackend:
    """The backend that was built in the directory of an index.

    Raises:
        ValueError: a name that is none.
        ImportError: its library is not installed.
        IndexFileError: it was not built there, or from embeddings that have been replaced since.
    """
    return _module(name).Backend.open(Path(directory))


def build_backend(name: str, directory: str | Path, **options: Any) -> SearchBackend:
    """Builds a backend from the index that is saved in `directory`, keeps it there, and opens it. Raises likewise."""
    return _module(name).Backend.build(Path(directory), **options)


def built_backends(directory: str | Path) -> list[str]:
    """Those that were built in the directory of an index."""
    return [name for name in BUILT if (Path(directory) / f"{name}.json").is_file()]


def build_stale(directory: str | Path) -> list[str]:
    """Builds those again, with the options they were built with, whose index was replaced since; and names them."""
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
    """A library that only one backend needs. Raises ImportError, which says how to get it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise
        raise ImportError(f"this backend needs {error.name}: pip install 'oner[{extra}]'") from None


def written(item: Any) -> str:
    """An item as a database keeps it, and finds it by."""
    return json.dumps(item, ensure_ascii=False, sort_keys=True)


def index_state(header: Mapping[str, Any]) -> dict[str, Any]:
    """What tells an index from the one it was: of its header, embeddings and items."""
    return {"embeddings_file": header["embeddings_file"], "header_sha256": header.get("header_sha256")}


def write_note(directory: Path, name: str, header: Mapping[str, Any], options: Mapping[str, Any], **more: Any) -> None:
    """Says in NAME.json what was built, from what and how; last, when all else is there."""
    space = {key: header[key] for key in ("model", "fingerprint", "projection_dim", "count")}
    note = {"format": FORMAT, "backend": name, **space, "index": index_state(header), "options": dict(options), **more}
    write_in_place(directory / f"{name}.json", json.dumps(note, indent=1).encode())


def read_note(directory: Path, name: str) -> dict[str, Any]:
    """What `write_note` wrote. Raises IndexFileError for anything else."""
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
    """As `read_note`, of what was built from the embeddings that lie there now. Raises IndexFileError."""
    note = read_note(directory, name)
    if not (directory / str(note["index"].get("embeddings_file"))).is_file():
        raise IndexFileError(
            directory / f"{name}.json",
            f"was built from embeddings that have been replaced; build it again: --backend {name}",
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
