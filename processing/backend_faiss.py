"""The backend "faiss": candidates from inverted lists or a neighbour graph, scored and ordered as in exact search.

    faiss-<digest>.index    stored beside the embeddings: 8 bits per value, in inverted lists (IVF) or a graph (HNSW)
    faiss.json              how it was built, and its search effort

The search effort (nprobe, efSearch) is tuned when the index is built: high enough that queries taken from the index
itself find at least the share `recall` of their exact top 10. Candidates are scored again from the embeddings, so an
answer that exact search also finds has bit for bit the same score; a search with conditions is exact.

Shapes: n items, P projection_dim, q queries, c candidates, k answers per query.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from .retrieval_backend import Answer, SearchBackend, answers_of, current_note, library, write_note
from .retrieval_filter import Where, read_where
from .retrieval_index import RetrievalIndex
from .retrieval_index_files import IndexFileError, read_header
from .retrieval_nearest import own_products, pack_keys, unit_rows, unpack_keys

NAME = "faiss"
KINDS = ("ivf", "hnsw")
AT_ONCE = 65536  # rows converted to fp32 at once
PER_LIST = 39  # minimum number of rows per list that faiss wants for k-means
TRAINED = 40  # rows per list on which k-means is trained
NEIGHBOURS = 32  # per node of the graph
BUILT_WITH = 80  # candidates from which a node chooses its neighbours (efConstruction)
SAMPLE = 256  # number of queries for tuning
TUNED_AT = 10  # the k of recall@k


class Backend(SearchBackend):
    """
    Args:
        exact: the index with the embeddings.
        found: faiss's index over them.
        kind: "ivf" or "hnsw".
        effort: nprobe (IVF) or efSearch (HNSW).
    """

    def __init__(self, exact: RetrievalIndex, found: Any, kind: str, effort: int):
        self.exact = exact
        self.projection_dim = exact.projection_dim
        self.model = exact.model
        self.fingerprint = exact.fingerprint
        self._found = found
        self._kind = kind
        self.effort = effort

    @classmethod
    def build(cls, directory: Path, kind: str = "ivf", recall: float = 0.98) -> "Backend":
        """
        Raises:
            ValueError: an unknown kind, a recall outside (0, 1], or an empty index.
        """
        faiss = library("faiss", "search")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if not 0 < recall <= 1:
            raise ValueError(f"recall must be a share above 0 and at most 1, got {recall!r}")
        header = read_header(directory)
        exact = RetrievalIndex.load(directory)
        if not len(exact):
            raise ValueError(f"{directory}: there is nothing in this index")

        # fill, then tune
        backend = cls(exact, filled(faiss, kind, exact.embeddings), kind, effort=1)
        reached = backend.tune(recall)

        # write the file under a name made from its digest, then the note that names it
        temporary = directory / f".faiss.{os.getpid()}.tmp"
        faiss.write_index(backend._found, str(temporary))
        digest = file_digest(temporary)
        file = directory / f"faiss-{digest[:16]}.index"
        os.replace(temporary, file)
        more = {"file": file.name, "sha256": digest, "effort": backend.effort, "reached": reached}
        write_note(directory, NAME, header, {"kind": kind, "recall": recall}, **more)
        for other in directory.glob("faiss-*.index"):
            if other != file:
                other.unlink()
        return backend

    @classmethod
    def open(cls, directory: Path) -> "Backend":
        faiss = library("faiss", "search")
        note = current_note(directory, NAME)
        file = directory / Path(str(note.get("file"))).name
        if not file.is_file() or file_digest(file) != note.get("sha256"):
            raise IndexFileError(file, "missing or damaged: not what was built", key="sha256")
        found = faiss.read_index(str(file))
        exact = RetrievalIndex.load(directory)
        if (found.ntotal, found.d) != (len(exact), exact.projection_dim):
            raise IndexFileError(file, f"holds {found.ntotal} x {found.d}, the index {len(exact)}", key="count")
        return cls(exact, found, note["options"]["kind"], int(note["effort"]))

    def __len__(self) -> int:
        return len(self.exact)

    def answers(self, queries: torch.Tensor, top_k: int = 10, where: Where = None) -> list[list[Answer]]:
        return answers_of(*self.search(queries, top_k, where), self.exact.items)

    def embedding_at(self, index: int) -> torch.Tensor:
        return self.exact.embedding_at(index)

    def index_of(self, item: Any) -> int | None:
        return self.exact.index_of(item)

    def search(self, queries: torch.Tensor, top_k: int = 10, where: Where = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As `RetrievalIndex.search`: scores (q, k) fp32, descending, and indices (q, k) int64."""
        self.check_queries(queries, top_k)
        if read_where(where):
            return self.exact.search(queries, top_k, where=where)
        rows = unit_rows(queries)  # (q, P) fp64
        k = min(top_k, len(self))
        places = self._candidates(rows, min(len(self), 2 * k + 30))  # (q, c)

        # fewer than k candidates, for example because the probed lists are short: search exactly
        if bool(((places >= 0).sum(1) < k).any()):
            return self.exact.search(queries, top_k)

        # scored as in exact search; empty places come last
        exact = own_products(rows, self.exact.embeddings, places.clamp(min=0))  # (q, c) fp64
        exact = exact.masked_fill(places < 0, -2.0).to(torch.float32)
        keys = pack_keys(exact, places.clamp(min=0))  # (q, c)
        return unpack_keys(keys.topk(k, dim=1).values)  # (q, k) each

    def _candidates(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Queries (q, P) → indices of items (q, count), padded with -1."""
        faiss = library("faiss", "search")
        if self._kind == "ivf":
            options = faiss.SearchParametersIVF(nprobe=self.effort)
        else:
            options = faiss.SearchParametersHNSW(efSearch=max(self.effort, count))
        _, places = self._found.search(rows.float().contiguous().numpy(), count, params=options)
        return torch.from_numpy(places)  # (q, count)

    def tune(self, recall: float, queries: torch.Tensor | None = None) -> float:
        """
        Raises the search effort until it finds the share `recall` of the exact top 10; returns the share found.

        Args:
            queries: (q, P), on which recall is measured; by default items evenly spaced in the index. Texts and
                images occupy different regions of the space: pass text queries where that matters.
        """
        if queries is None:
            queries = self.exact.embeddings[:: max(1, len(self) // SAMPLE)][:SAMPLE]  # (q, P)
        k = min(TUNED_AT, len(self))
        truth = self.exact.search(queries, k)[1]  # (q, k)
        most = self._found.nlist if self._kind == "ivf" else len(self)
        self.effort = 1 if self._kind == "ivf" else 16
        while True:
            found = self.search(queries, k)[1]  # (q, k)
            reached = float((truth[:, :, None] == found[:, None, :]).any(-1).float().mean())
            if reached >= recall or self.effort >= most:
                return reached
            self.effort = min(most, self.effort + max(1, self.effort // 4))


def filled(faiss: Any, kind: str, rows: torch.Tensor) -> Any:
    """faiss's index over unit rows (n, P), for which L2 distance and cosine give the same order."""
    count, width = rows.shape
    if kind == "hnsw":
        found = faiss.IndexHNSWSQ(width, faiss.ScalarQuantizer.QT_8bit, NEIGHBOURS)
        found.hnsw.efConstruction = BUILT_WITH
        lists = 0
    else:
        lists = max(1, min(int(4 * count**0.5), count // PER_LIST))
        coarse = faiss.IndexFlatL2(width)
        found = faiss.IndexIVFScalarQuantizer(coarse, width, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2)
    sample = min(count, max(AT_ONCE, lists * TRAINED))
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:sample]  # (s,)
    found.train(rows[chosen].float().numpy())
    for some in rows.split(AT_ONCE):
        found.add(some.float().numpy())
    return found


def file_digest(file: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while piece := content.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


__all__ = ["Backend"]
