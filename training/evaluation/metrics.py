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
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Positives = Tensor | tuple[Tensor, Tensor]


class Standing(NamedTuple):
    """Where the best positive of each query stands; five counts, each (Q,) int64.

    Attributes:
        above: items that score strictly higher than the best positive.
        tied: items that score the same, itself included.
        tied_positives: positives among the tied.
        positives, candidates: all positives and all admissible items.
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

    # positives as a mask, less what a query may not find
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

    # where the best positive stands among all admissible items
    best = scores.masked_fill(~positives, -torch.inf).amax(1, keepdim=True)  # (Q, 1)
    tied = (scores == best) & admissible  # (Q, G)
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
    block_size: int = 1024,
) -> Standing:
    """`standing` of dot products without ever holding more than (chunk_size, block_size) of them.

    The best positive of a query is looked for first, in those blocks of the gallery alone that hold one; then every
    block is counted against it. A product that is computed twice is computed with the same operands of the same
    shape, so that it equals itself.

    Args:
        queries: (Q, P) and gallery: (G, P), usually L2-normalised; those held in 16 bits are multiplied in fp32.
        query_ids: (Q,) and gallery_ids: (G,), equal ids are positives.
        query_keys: (Q,) and gallery_keys: (G,), equal keys are excluded (the query itself in the gallery).

    Raises:
        ValueError: sizes that do not fit, no queries, NaN scores, a query without a positive.
    """
    if min(chunk_size, block_size) < 1:
        raise ValueError(f"chunk_size and block_size must be at least 1, got {chunk_size} and {block_size}")
    if len(queries) != len(query_ids) or len(gallery) != len(gallery_ids):
        raise ValueError(
            f"one id an embedding: got {len(query_ids)} ids for {len(queries)} queries "
            f"and {len(gallery_ids)} ids for a gallery of {len(gallery)}"
        )
    if len(queries) == 0 or len(gallery) == 0:
        raise ValueError(f"there are no queries, or nothing to ask: got {len(queries)} and {len(gallery)}")
    _check_numbers(queries, gallery)

    # the gallery in blocks, whose ids and keys say where anything has to be marked at all
    cuts = [slice(start, start + block_size) for start in range(0, len(gallery), block_size)]
    blocks = [
        _Block(gallery[cut], gallery_ids[cut], None if query_keys is None else gallery_keys[cut]) for cut in cuts
    ]

    # and the queries in chunks, each against every block
    precise = torch.promote_types(queries.dtype, torch.float32)
    chunks = []
    for start in range(0, len(queries), chunk_size):
        rows = slice(start, start + chunk_size)
        keys = None if query_keys is None else query_keys[rows]
        chunks.append(
            _standing_in_blocks(queries[rows].to(precise), query_ids[rows], keys, blocks, start, len(queries))
        )
    return Standing(*(torch.cat(counts) for counts in zip(*chunks, strict=True)))


class _Block(NamedTuple):
    """B items of a gallery: embeddings (B, P), ids (B,), and keys (B,) if any item is excluded for anyone."""

    embeddings: Tensor
    ids: Tensor
    keys: Tensor | None

    def excluded(self, keys: Tensor | None) -> Tensor | None:
        """bool (chunk, B), or None if nothing here is excluded for these queries."""
        return match_ids(keys, self.keys) if keys is not None and bool(torch.isin(keys, self.keys).any()) else None

    def positives(self, ids: Tensor, excluded: Tensor | None) -> Tensor | None:
        """bool (chunk, B), or None if none of these queries has a positive here."""
        if not bool(torch.isin(ids, self.ids).any()):
            return None
        positives = match_ids(ids, self.ids)
        return positives if excluded is None else positives & ~excluded


@torch.no_grad()
def _standing_in_blocks(
    queries: Tensor, ids: Tensor, keys: Tensor | None, blocks: list[_Block], start: int, of: int
) -> Standing:
    """Counts of one chunk of queries (q, P), which begins at `start` among all `of`; see `chunked_standing`."""
    best = queries.new_full((len(queries), 1), -torch.inf)  # (q, 1)
    above, tied, tied_positives, count, absent = (torch.zeros_like(ids, dtype=torch.int64) for _ in range(5))

    # two matrices for all blocks: fresh ones would cost more than the product. Marks are floats, whose sums are
    # several times as fast as those of bools and exact up to 2^24
    size = (len(queries), len(blocks[0].ids))
    memory = queries.new_empty(size), torch.empty(size, dtype=torch.float32, device=queries.device)  # (q, B) each

    # first pass: the best positive of each query, in the blocks that hold one
    for block in blocks:
        positives = block.positives(ids, block.excluded(keys))
        if positives is not None:
            count += positives.sum(1)
            scores, _ = _scores(queries, block, memory)
            best = torch.maximum(best, scores.masked_fill_(~positives, -torch.inf).amax(1, keepdim=True))
    lonely = (count == 0).nonzero().flatten()
    if len(lonely):
        raise ValueError(
            f"{len(lonely)} of {len(queries)} queries from query {start} on (of {of}) have no positive, the first is "
            f"query {start + int(lonely[0])}"
        )

    # second pass: every block against it
    for block in blocks:
        excluded = block.excluded(keys)
        positives = block.positives(ids, excluded)
        scores, marks = _scores(queries, block, memory)
        if excluded is not None:
            scores.masked_fill_(excluded, torch.nan)  # which is neither above nor equal to anything
            absent += excluded.sum(1)
        above += torch.gt(scores, best, out=marks).sum(1).long()
        tied += torch.eq(scores, best, out=marks).sum(1).long()
        if positives is not None:
            tied_positives += marks.mul_(positives).sum(1).long()

    candidates = sum(len(block.ids) for block in blocks) - absent
    return Standing(above, tied, tied_positives, count, candidates)


def _scores(queries: Tensor, block: _Block, memory: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Dot products, and as many marks: both (chunk, B), in `memory` unless the block is a shorter one."""
    # the last block may be shorter, and `out` takes matrices of the right shape only
    if len(block.ids) != memory[0].shape[1]:
        memory = memory[0].new_empty(len(queries), len(block.ids)), memory[1].new_empty(len(queries), len(block.ids))
    return torch.mm(queries, block.embeddings.to(queries.dtype).T, out=memory[0]), memory[1]


def _check_numbers(queries: Tensor, gallery: Tensor) -> None:
    """Dot products of finite vectors whose norms multiply to less than the largest number are no NaN.

    Raises:
        ValueError: an embedding that is NaN or infinite, or so large that scores could overflow.
    """
    for name, embeddings in (("queries", queries), ("gallery items", gallery)):
        bad = sum(int((~torch.isfinite(part).all(1)).sum()) for part in embeddings.split(1 << 16))
        if bad:
            raise ValueError(f"{bad} of {len(embeddings)} {name} have NaN or infinite embeddings")

    # |q . g| <= P max|q| max|g|
    largest = [max(float(part.abs().max()) for part in x.split(1 << 16)) for x in (queries, gallery)]
    if largest[0] * largest[1] * queries.shape[1] >= torch.finfo(torch.float32).max:
        raise ValueError(f"embeddings with numbers up to {largest[0]:.3g} and {largest[1]:.3g} would overflow")


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

    # m tied items lie inside the cut, t are tied, t - p of them are no positives
    cut = torch.as_tensor(list(ks), device=where.above.device)  # (K,)
    tied = where.tied[:, None].double()  # (Q, 1)
    others = (where.tied - where.tied_positives)[:, None].double()  # (Q, 1)
    inside = (cut[None] - where.above[:, None]).double().clamp(min=0).minimum(tied)  # (Q, K)

    # binomials by log-gamma, since factorials of a gallery's size overflow; where m > t - p a positive must be inside
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


class Changed(NamedTuple):
    """What a second way of answering changes: questions gained, questions lost, and McNemar's exact two-sided p."""

    gained: int
    lost: int
    p: float


def mcnemar(before: Tensor, after: Tensor) -> Changed:
    """McNemar's exact test of two ways to answer the same Q questions, from bool (Q,) each: right before, right after.

    Only questions on which the two differ tell them apart; if neither is better, each is gained or lost like a coin.
    p is twice the binomial tail of the rarer, at most 1.

    Raises:
        ValueError: not as many questions before as after.
    """
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"expected bool (Q,) twice, got {tuple(before.shape)} and {tuple(after.shape)}")
    gained = int((after & ~before).sum())
    lost = int((before & ~after).sum())

    # whole numbers until the last division, so that no tail underflows before it has to
    differ = gained + lost
    tail = sum(comb(differ, count) for count in range(min(gained, lost) + 1))
    return Changed(gained, lost, min(1.0, 2 * tail / 2**differ))


def area_under_curve(positives: Tensor, negatives: Tensor) -> float:
    """AUC: how often one of the scores `positives` (p,) is above one of `negatives` (n,), ties counting half.

    Raises:
        ValueError: none on either side, or NaN.
    """
    if 0 in (len(positives), len(negatives)) or positives.isnan().any() or negatives.isnan().any():
        raise ValueError(f"expected scores on both sides, none NaN; got {len(positives)} and {len(negatives)}")
    ordered = negatives.double().sort().values  # (n,)
    below = torch.searchsorted(ordered, positives.double())  # (p,)
    not_above = torch.searchsorted(ordered, positives.double(), right=True)  # (p,)
    return float((below + not_above).double().mean() / 2 / len(negatives))


def centroid_distance(first: Tensor, second: Tensor) -> float:
    """Modality gap: Euclidean distance between the centroids of two sets of L2-normalised embeddings.

    first (N, P) and second (M, P) need not be normalised. Liang et al. 2022, "Mind the Gap", section 2. In [0, 2].
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or 0 in (len(first), len(second)):
        raise ValueError(
            f"expected (N, P) and (M, P) with N, M >= 1, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    centroids = [F.normalize(embeddings.double(), dim=-1).mean(0) for embeddings in (first, second)]  # (P,) each
    return torch.linalg.vector_norm(centroids[0] - centroids[1]).item()
