"""Exact nearest-neighbour search over unit vectors: fp32 products select candidates, fp64 products rank them.

Shapes: q queries, P projection_dim, m rows of a block, c rows of a chunk, k answers per query.
"""

from collections.abc import Iterable

import torch

PRODUCTS = 1 << 24  # maximum number of products in memory at once
LONGEST_CHUNK = 1 << 16  # rows
CONVERTED = 4096  # fp16 rows converted to fp32 at once: their buffer fits the processor's cache
LOW_32_BITS = 0xFFFFFFFF


def pack_keys(scores: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """fp32 scores (q, c) of items (q, c) → int64 keys (q, c) that sort by score, ties by lower index.

    The bits of an fp32 number, flipped if it is negative, sort like the number; they fill the upper half of the key.
    The item's index, subtracted from the maximum, fills the lower half. All keys differ, so any top-k is stable.
    """
    bits = (scores + 0.0).contiguous().view(torch.int32)  # (q, c); + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(torch.int64)  # (q, c)
    return ordered * (LOW_32_BITS + 1) + (LOW_32_BITS - items)


def unpack_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack_keys`: int64 keys (q, k) → fp32 scores (q, k), int64 indices (q, k)."""
    ordered = (keys >> 32).to(torch.int32)  # (q, k)
    scores = torch.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).view(torch.float32)
    return scores, LOW_32_BITS - (keys & LOW_32_BITS)


def best_keys(queries: torch.Tensor, blocks: Iterable[torch.Tensor], k: int, chunk: int | None = None) -> torch.Tensor:
    """fp64 queries (q, P), blocks of items (m, P) → the k greatest keys (q, k), descending; see `pack_keys`.

    `chunk` is the number of items compared at once; None chooses it by `PRODUCTS`.
    """
    chunk = chunk or min(LONGEST_CHUNK, PRODUCTS // max(1, len(queries)))
    best = torch.empty(len(queries), 0, dtype=torch.int64)  # (q, 0)
    start = 0
    for rows in (rows for block in blocks for rows in block.split(chunk)):
        keys = chunk_keys(queries, rows, k, start)  # (q, up to c)
        best = torch.cat([best, keys], dim=1)  # (q, up to k + c)
        best = best.topk(min(k, best.shape[1]), dim=1).values  # (q, up to k)
        start += len(rows)
    return best


def chunk_keys(queries: torch.Tensor, rows: torch.Tensor, k: int, start: int) -> torch.Tensor:
    """
    Keys of the best items of a chunk, including the k greatest: fp64 (q, P), (c, P) → (q, at least min(k, c)).

    fp32 products select candidates, fp64 products rank them. An item is dropped only if its fp32 score is below the
    k-th by more than the rounding errors of both scores.
    """
    quick = quick_products(queries.to(torch.float32), rows)  # (q, c)
    slack = (rows.shape[1] + 8) * 2.0**-24  # error bound of an fp32 dot product of unit vectors
    kept = min(2 * k + 30, len(rows))
    while True:
        values, places = quick.topk(kept, dim=1)  # (q, kept)
        exact = own_products(queries, rows, places)  # (q, kept) fp64
        if kept == len(rows):
            break

        # some torch settings round fp32 products by more than this bound
        as_reckoned = bool((values - exact).abs().max() <= slack)
        if as_reckoned and bool((values[:, -1] < values[:, k - 1] - 2 * slack).all()):
            break
        kept = min(4 * kept, len(rows)) if as_reckoned else len(rows)
    return pack_keys(exact.to(torch.float32), start + places)


def quick_products(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """fp32 queries (q, P), rows (c, P) → fp32 products (q, c)."""
    if rows.dtype == torch.float32:
        return queries @ rows.T  # (q, c)

    # fp16 rows are converted to fp32 in one reused buffer
    products = torch.empty(len(queries), len(rows))  # (q, c)
    buffer = torch.empty(min(CONVERTED, len(rows)), rows.shape[1])  # (b, P)
    for start in range(0, len(rows), CONVERTED):
        some = buffer[: len(rows) - start].copy_(rows[start : start + CONVERTED])  # (b, P)
        torch.mm(queries, some.T, out=products[:, start : start + CONVERTED])
    return products


def own_products(queries: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """fp64 products of each query with its own items, each summed independently of its neighbours. (q, kept)."""
    step = max(1, PRODUCTS // max(1, places.shape[1] * rows.shape[1]))
    parts = [
        (rows[some].to(torch.float64) * asked[:, None]).sum(-1)  # (s, kept)
        for asked, some in zip(queries.split(step), places.split(step), strict=True)
    ]
    return torch.cat(parts)


def unit_rows(embeddings: torch.Tensor) -> torch.Tensor:
    """(m, P) of any float dtype and device → (m, P) fp64 on the CPU, rows normalised to unit length."""
    rows = embeddings.detach().to("cpu", torch.float64)  # (m, P)
    norms = rows.norm(dim=1, keepdim=True)  # (m, 1)
    bad = ~(torch.isfinite(norms) & (norms > 0)).squeeze(1)  # (m,)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"embedding {row} has no direction: its length is {norms[row].item()} (NaN, infinite or zero)"
        )
    return rows / norms


__all__ = ["best_keys", "own_products", "pack_keys", "unit_rows", "unpack_keys"]
