"""The backend "qdrant": a collection on a Qdrant server, given by its URL.

Each point has the index of its item as id, the unit row as vector, and as payload the columns of the item and
`oner_item`, the item as JSON. The on-disk store of Qdrant's Python client uses pickle, so without a server only
":memory:" is supported, which ends with the process.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .retrieval_backend import Answer, DatabaseBackend, current_note, library, read_note, write_note, written
from .retrieval_filter import ORDERS, Condition, Where, columns_of, number_of, read_where
from .retrieval_index import RetrievalIndex
from .retrieval_index_files import IndexFileError, read_header
from .retrieval_nearest import unit_rows

NAME = "qdrant"
MEMORY = ":memory:"
ITEM = "oner_item"
AT_ONCE = 512  # points per request
WHOLE = 1 << 53  # up to this value, floats represent every integer
BOUNDS = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}


class Backend(DatabaseBackend):
    """
    Args:
        client: a `QdrantClient`.
        note: describes what was built from which index, see `write_note`.
    """

    def __init__(self, client: Any, note: dict[str, Any]):
        super().__init__(note)
        self.client = client
        self.collection = note["collection"]

    @classmethod
    def build(cls, directory: Path, url: str | None = None) -> "Backend":
        """Fills a new collection, then deletes the previous one. Raises `ValueError` without the URL of a server."""
        if url is None:
            raise ValueError(
                "qdrant is a server, whose address is url=, or of `oner index` --url http://localhost:6333; no other "
                "command builds it"
            )
        models = library("qdrant_client.models", NAME)
        header = read_header(directory)
        index = RetrievalIndex.load(directory)
        before = read_note(directory, NAME) if (directory / f"{NAME}.json").is_file() else None

        # named after its content, so that the previous collection answers until this one is complete
        name = f"oner_{header['header_sha256'][:16]}"
        client = connected(url)
        if client.collection_exists(name):
            client.delete_collection(name)
        space = models.VectorParams(size=index.projection_dim, distance=models.Distance.DOT)
        client.create_collection(name, vectors_config=space)
        for start in range(0, len(index), AT_ONCE):
            client.upsert(name, points_of(models, index, start), wait=True)
        write_note(directory, NAME, header, {"url": url}, collection=name)
        if before and before["options"] == {"url": url} and before.get("collection") != name:
            client.delete_collection(before["collection"])
        return cls(client, current_note(directory, NAME))

    @classmethod
    def open(cls, directory: Path) -> "Backend":
        note = current_note(directory, NAME)
        if note["options"]["url"] == MEMORY:
            raise IndexFileError(directory / f"{NAME}.json", f"was built in {MEMORY}, which is gone", key="options")
        return cls(connected(note["options"]["url"]), note)

    def answers(self, queries: torch.Tensor, top_k: int = 10, where: Where = None) -> list[list[Answer]]:
        self.check_queries(queries, top_k)
        models = library("qdrant_client.models", NAME)
        conditions = [filter_of(models, one) for one in read_where(where)]
        rows = unit_rows(queries).float()  # (q, P)
        return [self._first(partial(self._ask, row.tolist(), conditions), top_k) for row in rows]

    def _ask(self, row: list[float], conditions: list[Any], count: int) -> list[Answer]:
        """The `count` best answers for one unit row (P,)."""
        models = library("qdrant_client.models", NAME)
        found = self.client.query_points(
            self.collection,
            query=row,
            limit=count,
            query_filter=models.Filter(must=conditions) if conditions else None,
            with_payload=[ITEM],
        ).points
        return [{"score": one.score, "item": json.loads(one.payload[ITEM]), "index": one.id} for one in found]

    def embedding_at(self, index: int) -> torch.Tensor:
        (point,) = self.client.retrieve(self.collection, [index], with_vectors=True)
        return torch.tensor(point.vector)  # (P,)

    def index_of(self, item: Any) -> int | None:
        models = library("qdrant_client.models", NAME)
        same = models.FieldCondition(key=ITEM, match=models.MatchValue(value=written(item)))
        points, _ = self.client.scroll(self.collection, models.Filter(must=[same]), limit=self._count)
        return min((point.id for point in points), default=None)


def connected(url: str) -> Any:
    client = library("qdrant_client", NAME).QdrantClient
    return client(MEMORY) if url == MEMORY else client(url=url)


def points_of(models: Any, index: RetrievalIndex, start: int) -> list[Any]:
    """Up to AT_ONCE points of an index, from item `start` on."""
    rows = index.embeddings[start : start + AT_ONCE].float()  # (m, P)
    items = index.items[start : start + len(rows)]
    return [
        models.PointStruct(id=number, vector=row, payload={**columns_of(item), ITEM: written(item)})
        for number, (row, item) in enumerate(zip(rows.tolist(), items, strict=True), start)
    ]


def filter_of(models: Any, condition: Condition) -> Any:
    """A condition as a Qdrant filter."""
    key = condition.column if condition.column.isidentifier() else json.dumps(condition.column)
    if condition.operator in ORDERS:
        bounds = {BOUNDS[condition.operator]: number_of(condition.values[0])}
        return models.FieldCondition(key=key, range=models.Range(**bounds))

    # a value may stand for a text, a number or a boolean
    equal = [models.FieldCondition(key=key, match=models.MatchAny(any=list(condition.values)))]
    for value in condition.values:
        if (number := number_of(value)) is not None:
            # ranges compare floats, which cannot distinguish large integers
            large = isinstance(number, int) and abs(number) > WHOLE
            match = models.MatchValue(value=number) if large else None
            bounds = None if large else models.Range(gte=number, lte=number)
            equal.append(models.FieldCondition(key=key, match=match, range=bounds))
        if value in ("true", "false"):
            equal.append(models.FieldCondition(key=key, match=models.MatchValue(value=value == "true")))
    if condition.operator == "=":
        return models.Filter(should=equal)
    absent = models.IsEmptyCondition(is_empty=models.PayloadField(key=key))
    return models.Filter(must_not=[*equal, absent])


__all__ = ["Backend"]
