"""Evaluates composed retrieval with known answers: an image and words are a query for an image among hard negatives.

The format is that of `examples/data/scenes_queries.py` and `icons_queries.py`: a table of queries (`image`, `text`,
`target`, `choices`, `names`, `kind`) and a table of the gallery; `target` and `choices` are row numbers of the
gallery.

Shapes: Q queries, G gallery pictures, C choices of a query, P width of the projection.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional as F

from oner.processing.data.row_checks import PairDataError

from .composed import WAYS
from .embedding import Column, Row, embed_images, embed_pairs, embed_texts, gallery_vectors, numbered, row_ids, spaced
from .retrieval import ask

COLUMNS = ("image", "text", "target", "choices", "names", "kind")


def open_queries(source: str | PathLike, limit: int | None = None) -> list[dict[str, Any]]:
    """
    The queries of a parquet file; evenly spaced ones if there are more than `limit`.

    Raises:
        PairDataError: a column of queries is missing.
    """
    found = pq.read_schema(source).names
    if lacking := [name for name in COLUMNS if name not in found]:
        raise PairDataError(f"{source}: expected composed queries, got a table without {', '.join(lacking)}")
    return spaced(pq.read_table(source, columns=list(COLUMNS)).to_pylist(), limit)


def _fault(query: Row, pictures: int) -> str | None:
    """Why a query is invalid for a gallery with `pictures` images; None if it is valid."""
    choices, names = query["choices"], query["names"]
    if choices is None or names is None or len(choices) < 2 or len(choices) != len(names):
        return f"its choices are {choices}, called {names}; expected two at least, and a name for each"
    if query.get("hidden") is not None and query["hidden"] == query["target"]:
        return f"its target, row {query['target']}, is hidden from it"
    if choices[0] != query["target"]:
        return f"its first choice is row {choices[0]}, and its target row {query['target']}; expected the target first"
    for choice in choices:
        if not isinstance(choice, int) or not 0 <= choice < pictures:
            return f"a choice is row {choice}, and the gallery has {pictures} rows"
    return None


class ComposedQueriesEvaluator:
    """Does a picture with words find what neither finds alone, nor the sum of their embeddings?

    Queries are asked by f(I), f(T), f(I, T), and the normalised sum of f(I) and f(T); a model without joint pass
    lacks f(I, T). In the whole gallery, right is what shares the target's id: rows without ids, the target alone. A
    query may have a row "hidden", which is not in its gallery: CIRR's own reference.

    Yields for each way (picture, words, both, sum) name/composed_{way}_r@k, name/composed_{way}_choice (the target is
    the first of the choices; ties count as lost) and both by kind; name/composed_{way}_takes_{what}, what is first of
    the choices where the target is not; and name/composed_both_over_better and .._over_sum, ratios at the largest k.

    Raises:
        ValueError: no queries, or one that cannot be asked, by its number: choices that the gallery does not have, of
            which the target is not the first, or that are fewer than two or not named one by one.
    """

    def __init__(
        self,
        queries: Sequence[Row],
        gallery: Sequence[Row],
        batch_size: int = 64,
        ks: Sequence[int] = (1, 5, 10),
        name: str = "eval",
        progress: bool = True,
    ) -> None:
        if len(queries) == 0:
            raise ValueError("there are no queries to evaluate on")
        for number, query in enumerate(queries):
            if reason := _fault(query, len(gallery)):
                raise ValueError(f"query {number}: {reason}")
        self.queries = queries
        self.gallery = gallery
        self.batch_size = batch_size
        self.ks = tuple(ks)
        self.name = name
        self.progress = progress

    @property
    def protocol(self) -> dict[str, Any]:
        """How the numbers were measured, for the results file."""
        return {
            "task": "composed retrieval, dot products of normalised embeddings",
            "queries": dict(Counter(query["kind"] for query in self.queries)),
            "pictures": len(self.gallery),
            "choices": max(len(query["choices"]) for query in self.queries),
            "reference_left_out": sum(query.get("hidden") is not None for query in self.queries),
        }

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, float]]:
        """Embeds both sides and yields (name, value)."""
        pictures = gallery_vectors(model, processor, self.gallery, self.batch_size)  # (G, P)
        yield from self.compare(self.ways(model, processor), pictures)

    def compare(self, ways: Mapping[str, Tensor], pictures: Tensor) -> Iterator[tuple[str, float]]:
        """Yields (name, value) for embeddings of the queries (Q, P) each way, and of the gallery's pictures (G, P)."""
        (gallery_ids,) = numbered(row_ids(self.gallery))  # (G,)
        target_ids = gallery_ids[torch.tensor([query["target"] for query in self.queries])]  # (Q,)
        hidden = [query.get("hidden") for query in self.queries]
        keys = torch.tensor([-1 if row is None else row for row in hidden])  # (Q,), -1 hides nothing
        rows = torch.arange(len(pictures))  # (G,)

        # the whole gallery, then the choices, all queries and each kind
        recalls = {}
        kinds = sorted({query["kind"] for query in self.queries})
        for way, vectors in ways.items():
            first = self._first_choices(vectors, pictures)
            for kind in (None, *kinds):
                chosen = [n for n, query in enumerate(self.queries) if kind in (None, query["kind"])]
                asked = vectors[chosen], pictures, target_ids[chosen], gallery_ids
                values = ask(*asked, self.ks, keys[chosen], rows)
                label = f"{self.name}/composed_{way}" if kind is None else f"{self.name}/{kind}/composed_{way}"
                yield from ((f"{label}_r@{k}", values[f"recall@{k}"]) for k in self.ks)
                yield f"{label}_choice", sum(first[n] == "target" for n in chosen) / len(chosen)
                if kind is None:
                    recalls[way] = values[f"recall@{max(self.ks)}"]
            for what, count in sorted(Counter(first).items()):
                if what != "target":
                    yield f"{self.name}/composed_{way}_takes_{what.replace(' ', '_')}", count / len(first)

        # the gain of the joint pass
        better = max(recalls["picture"], recalls["words"])
        for what, other in (("better", better), ("sum", recalls["sum"])):
            if "both" in recalls and other > 0:
                yield f"{self.name}/composed_both_over_{what}", recalls["both"] / other

    def ways(self, model: Any, processor: Any) -> dict[str, Tensor]:
        """Embeddings (Q, P) of each kind of query."""
        images, texts = Column(self.queries, "image"), [query["text"] for query in self.queries]
        picture = embed_images(model, processor, images, self.batch_size, self.progress)
        words = embed_texts(model, processor, texts, 4 * self.batch_size, self.progress)
        ways = dict(zip(WAYS, (picture, words), strict=False)) | {"sum": F.normalize(picture + words, dim=-1)}
        if hasattr(model, "get_multimodal_features"):
            ways["both"] = embed_pairs(model, processor, images, texts, self.batch_size, self.progress)
        return ways

    def _first_choices(self, vectors: Tensor, pictures: Tensor) -> list[str]:
        """The choice that is nearest to each query (Q, P); the target only if no other is equally near."""
        taken = []
        for query, vector in zip(self.queries, vectors, strict=True):
            scores = pictures[query["choices"]] @ vector  # (C,)
            wrong = 1 + int(scores[1:].argmax())
            taken.append("target" if scores[0] > scores[wrong] else query["names"][wrong])
        return taken
