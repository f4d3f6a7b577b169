"""Retrieval with truncated and quantised embeddings (int8, bits), compared with whole vectors in fp32.

    python examples/short_vectors.py examples/checkpoints/oner-scenes runs/scenes/unseen_pairs.parquet
    python examples/short_vectors.py MODEL PAIRS --id_column hexcode --dims 64 128

The first captions of the rows retrieve images, and images retrieve captions. Truncation, quantisation and search (with
faiss, except for int8) are those of sentence-transformers. Needs sentence-transformers and faiss-cpu. The ways to
store a vector:

    fp32                as it is
    int8                256 steps between plus and minus the gallery's largest absolute value; queries stay fp32
    int8 by coordinate  256 steps in the range of each coordinate, for queries too, as sentence-transformers does by
                        default; finds four times as many items and rescores them with the whole query
    bits                signs, by Hamming distance
    bits, rescored      the same; finds four times as many items and rescores them with the whole query

Q queries, G items of the gallery, P embedding width.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers.util import dot_score, semantic_search, truncate_embeddings
from sentence_transformers.util.quantization import quantize_embeddings, semantic_search_faiss
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

from oner.processing.data.sources import open_rows
from oner.training.evaluation.retrieval import RetrievalEvaluator

TOP = 10
OVERSAMPLING = 4
Answers = list[list[dict[str, Any]]]


def by_bytes(queries: np.ndarray, gallery: np.ndarray) -> Answers:
    """(Q, P), (G, P) -> the best of each query. All coordinates share a step size, so products keep their order."""
    ranges = np.abs(gallery).max() * np.array([[-1.0], [1.0]]) * np.ones(gallery.shape[1])  # (2, P)
    codes = quantize_embeddings(gallery, "int8", ranges=ranges)  # (G, P) int8
    return semantic_search(queries, codes.astype(np.float32), top_k=TOP, score_function=dot_score)


def by_faiss(queries: np.ndarray, gallery: np.ndarray, precision: str, rescore: bool) -> Answers:
    """The same with faiss, after sentence-transformers' default quantisation to a precision."""
    options = {"top_k": TOP, "rescore": rescore, "rescore_multiplier": OVERSAMPLING}
    stored = quantize_embeddings(gallery, precision)
    calibration = {"corpus_precision": precision, "calibration_embeddings": gallery}
    return semantic_search_faiss(queries, stored, **calibration, **options)[0]


# name -> bits per coordinate, and the search
WAYS: dict[str, tuple[int, Callable[[np.ndarray, np.ndarray], Answers]]] = {
    "fp32": (32, partial(by_faiss, precision="float32", rescore=False)),
    "int8": (8, by_bytes),
    "int8 by coordinate": (8, partial(by_faiss, precision="uint8", rescore=True)),
    "bits": (1, partial(by_faiss, precision="ubinary", rescore=False)),
    "bits, rescored": (1, partial(by_faiss, precision="ubinary", rescore=True)),
}


@dataclass(frozen=True)
class Side:
    """One direction: unit vectors of queries (Q, P) and of the gallery (G, P), and the concept of each."""

    queries: np.ndarray
    gallery: np.ndarray
    query_ids: np.ndarray
    gallery_ids: np.ndarray

    def found(self, dim: int, way: str) -> np.ndarray:
        """The items found by each query, best first, (Q, TOP)."""
        queries, gallery = (unit(truncate_embeddings(side, dim)) for side in (self.queries, self.gallery))
        answers = WAYS[way][1](queries, gallery)
        return np.array([[answer["corpus_id"] for answer in own] for own in answers])

    def recall(self, found: np.ndarray, k: int) -> float:
        """The share of queries that have an item of their own concept among the first k."""
        return float((self.gallery_ids[found[:, :k]] == self.query_ids[:, None]).any(1).mean())


def unit(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def table(sides: dict[str, Side], dims: Sequence[int]) -> Iterator[list[str]]:
    """A row per way to store a vector: name, bytes, and per direction R@1, R@10, share of the whole vectors' ten."""
    yield ["vectors", "bytes", *(f"{name}: {what}" for name in sides for what in ("R@1", "R@10", "same ten"))]
    width = max(dims)
    whole = {name: side.found(width, "fp32") for name, side in sides.items()}  # (Q, TOP) each
    for dim in dims:
        for way, (bits, _) in WAYS.items():
            cells = [f"{dim} x {way}", f"{dim * bits // 8:,}"]
            for name, side in sides.items():
                found = side.found(dim, way)
                same = np.mean([len(set(own) & set(best)) / TOP for own, best in zip(found, whole[name], strict=True)])
                cells += [f"{100 * share:.1f}" for share in (side.recall(found, 1), side.recall(found, TOP), same)]
            yield cells


def sides_of(model: str | Path, evaluator: RetrievalEvaluator) -> dict[str, Side]:
    """Both directions of an evaluation's images and captions, embedded by the model in a directory."""
    loaded = AutoModelForZeroShotImageClassification.from_pretrained(model).eval()
    pictures, captions = evaluator.embed(loaded, AutoProcessor.from_pretrained(model))  # (n, P), (m, P)
    vectors = (captions.cpu().numpy(), pictures.cpu().numpy())
    ids = (evaluator.text_ids.numpy(), evaluator.image_ids.numpy())
    return {"captions ask": Side(*vectors, *ids), "pictures ask": Side(*vectors[::-1], *ids[::-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory")
    parser.add_argument("pairs", help="a table of pairs")
    parser.add_argument("--id_column", default="__row__", help="of the concept, if several rows share one")
    parser.add_argument("--dims", type=int, nargs="+", default=[], help="truncated widths (default: half, quarter)")
    options = parser.parse_args()

    # both directions, at full width and truncated
    rows = open_rows(options.pairs, id_column=options.id_column)
    sides = sides_of(options.model, RetrievalEvaluator(rows, captions="first", progress=False))
    width = sides["captions ask"].gallery.shape[1]
    for number, cells in enumerate(table(sides, [width, *(options.dims or [width // 2, width // 4])])):
        print(f"| {' | '.join(cells)} |", flush=True)
        if number == 0:
            print("|---" * len(cells) + "|")


if __name__ == "__main__":
    main()
