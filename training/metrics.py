"""Metrics of retrieval, classification and the modality gap: pure functions on tensors.

Shapes: Q queries, G gallery items, C classes, P width of an embedding, K number of cut-offs.

Ties. Items with equal scores have no order, so a query's result is its expectation over all orders of the tied items.
A constant score matrix therefore scores exactly chance, whatever the layout of the gallery; without ties every number
is the ordinary one. All that a query needs for this is its `Standing`, a handful of counts.

Definitions. Recall@k of a query is 1 if at least one of its positives is among the first k, else 0 (CLIP_benchmark;
ALBEF's "best rank over its captions"). So for pictures asking captions TR@k is the share of pictures with any of their
captions in the first k, and IR@k the share of captions whose picture is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Positives = Tensor | tuple[Tensor, Tensor]


class Standing(NamedTuple):
    """Where the best positive of each query stands; five counts, each (Q,) int64.

    above: items that score strictly higher than the best positive. tied: items that score the same, itself included.
    tied_positives: positives among the tied. positives, candidates: all positives and all admissible items.
    """

    above: Tensor
    tied: Tensor
    tied_positives: Tensor
    positives: Tensor
    candidates: Tensor


def match_ids(query_ids: Tensor, gallery_ids: Tensor) -> Tensor:
    """(Q,), (G,) -> bool (Q, G), true where ids are equal. Caption -> picture indices are ids against arange(G)."""
    return query_ids[:, None] == gallery_ids[None, :]


def standing(scores: Tensor, positives: Positives, excluded: Tensor | None = None) -> Standing:
    """Counts around the best positive of each query.

    Args:
        scores: (Q, G), higher is better; finite or -inf.
        positives: bool (Q, G), or a pair of id tensors ((Q,), (G,)) whose equality marks the positives.
        excluded: bool (Q, G), items that do not exist for a query (its own picture, say).

    Raises:
        ValueError: wrong shapes, NaN scores, or a query without a positive (its recall would not be defined).
    """
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(
            f"scores must be (queries, gallery) with a gallery of at least one, got {tuple(scores.shape)}"
        )
    if torch.isnan(scores).any():
        raise ValueError(f"scores contain NaN in {int(torch.isnan(scores).any(1).sum())} of {len(scores)} queries")
    if isinstance(positives, tuple):
        positives = match_ids(*(torch.as_tensor(ids, device=scores.device) for ids in positives))
    positives = positives.to(scores.device)
    if positives.shape != scores.shape or positives.dtype != torch.bool:
        raise ValueError(
            f"positives must be bool of the scores' shape {tuple(scores.shape)}, "
            f"got {positives.dtype} of {tuple(positives.shape)}"
        )
    admissible = torch.ones_like(positives) if excluded is None else ~excluded.to(scores.device)
    positives = positives & admissible
    lonely = (~positives.any(1)).nonzero().flatten()
    if len(lonely):
        raise ValueError(
            f"{len(lonely)} of {len(scores)} queries have no positive, the first is query {int(lonely[0])}"
        )
    best = scores.masked_fill(~positives, -torch.inf).amax(1, keepdim=True)  # (Q, 1)
    tied = (scores == best) & admissible
    return Standing(
        above=((scores > best) & admissible).sum(1),
        tied=tied.sum(1),
        tied_positives=(tied & positives).sum(1),
        positives=positives.sum(1),
        candidates=admissible.sum(1),
    )


def chunked_standing(
    queries: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_keys: Tensor | None = None,
    gallery_keys: Tensor | None = None,
    chunk_size: int = 1024,
) -> Standing:
    """`standing` of dot products without ever holding more than (chunk_size, G) of them.

    Args:
        queries: (Q, P) and gallery: (G, P), usually L2-normalised.
        query_ids: (Q,) and gallery_ids: (G,), equal ids are positives.
        query_keys: (Q,) and gallery_keys: (G,), equal keys are excluded (the query itself in the gallery).
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if len(queries) != len(query_ids) or len(gallery) != len(gallery_ids):
        raise ValueError(
            f"one id an embedding: got {len(query_ids)} ids for {len(queries)} queries "
            f"and {len(gallery_ids)} ids for a gallery of {len(gallery)}"
        )
    if len(queries) == 0:
        raise ValueError("there are no queries")
    parts = []
    for start in range(0, len(queries), chunk_size):
        rows = slice(start, start + chunk_size)
        excluded = None if query_keys is None else match_ids(query_keys[rows], gallery_keys)
        parts.append(standing(queries[rows] @ gallery.T, (query_ids[rows], gallery_ids), excluded))
    return Standing(*(torch.cat(counts) for counts in zip(*parts, strict=True)))


def ranks(where: Standing) -> Tensor:
    """Rank of the best positive, (Q,) float64, 0 = first.

    The least of p places drawn from t is expected at (t + 1) / (p + 1), counted from one; t = p gives the first.
    """
    return where.above.double() + (where.tied + 1).double() / (where.tied_positives + 1).double() - 1


def hits(where: Standing, ks: Sequence[int]) -> Tensor:
    """(Q, K) float64: the chance that a positive is among the first k, 0 or 1 where no tie straddles the cut.

    With m = k - above of the t tied items inside the cut, all miss the p positives with C(t - p, m) / C(t, m).
    """
    if len(ks) == 0 or min(ks) < 1:
        raise ValueError(f"ks must be whole numbers of at least 1, got {list(ks)}")
    cut = torch.as_tensor(list(ks), device=where.above.device)
    tied = where.tied[:, None].double()
    others = (where.tied - where.tied_positives)[:, None].double()
    inside = (cut[None] - where.above[:, None]).double().clamp(min=0).minimum(tied)  # (Q, K)
    left = (others - inside).clamp(min=0)
    miss = torch.exp(
        torch.lgamma(others + 1) - torch.lgamma(left + 1) - torch.lgamma(tied + 1) + torch.lgamma(tied - inside + 1)
    )
    return 1 - miss.masked_fill(inside > others, 0.0)


def recall(where: Standing, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Recall@k over queries, in [0, 1]."""
    return dict(zip(ks, hits(where, ks).mean(0).tolist(), strict=True))


def chance_recall(where: Standing, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Recall@k of a random order of the same galleries: that of a constant score matrix."""
    flat = where._replace(above=torch.zeros_like(where.above), tied=where.candidates, tied_positives=where.positives)
    return recall(flat, ks)


def recall_at_k(scores: Tensor, positives: Positives, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Recall@k from a score matrix (Q, G); `positives` as in `standing`. k above G counts the whole gallery."""
    return recall(standing(scores, positives), ks)


def top_k_accuracy(scores: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[int, float]:
    """Share of rows of scores (Q, C) whose label (Q,) is among the k highest.

    Raises:
        ValueError: a label outside 0..C-1, or not one label a row.
    """
    return recall(class_standing(scores, labels), ks)


def class_standing(scores: Tensor, labels: Tensor) -> Standing:
    """`standing` of the right class (Q,) among all classes (Q, C)."""
    labels = torch.as_tensor(labels, device=scores.device)
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(
            f"expected scores (Q, C) and labels (Q,), got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    classes = scores.shape[1]
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(f"labels must be in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    return standing(scores, (labels, torch.arange(classes, device=scores.device)))


def centroid_distance(first: Tensor, second: Tensor) -> float:
    """Modality gap: Euclidean distance between the centroids of two sets of L2-normalised embeddings.

    first (N, P) and second (M, P) need not be normalised. Liang et al. 2022, "Mind the Gap", section 2. In [0, 2].
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or 0 in (len(first), len(second)):
        raise ValueError(
            f"expected (N, P) and (M, P) with N, M >= 1, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    centroids = [F.normalize(embeddings.double(), dim=-1).mean(0) for embeddings in (first, second)]
    return torch.linalg.vector_norm(centroids[0] - centroids[1]).item()
