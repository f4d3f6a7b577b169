"""Losses as pure functions on tensors, computed in fp32 whatever the inputs are.

B queries of this process, K keys of all processes, P embedding width, M masked words, V vocabulary, N patches.
"""

import torch
import torch.nn.functional as F

from oner.modeling.vl_embeddings import patchify


def info_nce(
    queries: torch.Tensor,
    keys: torch.Tensor,
    temperature: float | torch.Tensor,
    query_ids: torch.Tensor | None = None,
    key_ids: torch.Tensor | None = None,
    offset: int = 0,
) -> torch.Tensor:
    r"""
    InfoNCE, NCE(l, r) of equation 1: cross-entropy of cos(q, k) / T against the own key.

    Args:
        queries (`(B, P)`), keys (`(K, P)`): Normalised here. Keys carry gradient if the caller lets them.
        temperature: T, a number or a tensor of shape (1,).
        query_ids (`(B,)`), key_ids (`(K,)`): With ids, all keys of a query's id are positives of equal weight (ALBEF's
            targets); without, key `offset + i` is the positive of query i.
        offset: Where this process's keys begin among the gathered ones (label = i + B * rank, MoCo-v3).

    Raises:
        ValueError: query_ids without key_ids; a query without any positive key (looked at on the CPU only: reading
            values would make an accelerator wait; there the loss is NaN).
    """
    queries = F.normalize(queries.float(), dim=-1)
    keys = F.normalize(keys.float(), dim=-1)
    with torch.autocast(queries.device.type, enabled=False):  # else the product would be taken in half precision
        logits = queries @ keys.T / temperature  # (B, K)
    if query_ids is None:
        return F.cross_entropy(logits, torch.arange(offset, offset + len(queries), device=logits.device))
    if key_ids is None:
        raise ValueError("got query_ids without key_ids; expected the id of every key")
    positives = (query_ids[:, None] == key_ids[None, :]).float()  # (B, K)
    if positives.device.type == "cpu" and (lonely := query_ids[positives.sum(1) == 0]).numel():
        raise ValueError(f"query_ids {lonely.tolist()} have no key; expected at least one key of each id")
    targets = positives / positives.sum(1, keepdim=True)
    return -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()


def masked_language_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the masked words (M, V), (M,); zero, with a graph, when there are none."""
    if len(labels) == 0:
        return logits.float().sum() * 0.0
    return F.cross_entropy(logits.float(), labels)


def masked_image_loss(
    predictions: torch.Tensor,
    pixel_values: torch.Tensor,
    bool_masked_pos: torch.Tensor,
    patch_size: int,
    norm_pixels: bool = True,
) -> torch.Tensor:
    """
    MAE's: mean squared error per patch, averaged over the masked ones. `norm_pixels` normalises each target patch by
    its mean and unbiased variance. (B, N, p*p*C), (B, C, H, W), (B, N) bool -> scalar.
    """
    targets = patchify(pixel_values.float(), patch_size)
    if norm_pixels:
        mean, variance = targets.mean(-1, keepdim=True), targets.var(-1, keepdim=True)
        targets = (targets - mean) / (variance + 1e-6).sqrt()
    error = (predictions.float() - targets).square().mean(-1)  # (B, N)
    masked = bool_masked_pos.float()
    return (error * masked).sum() / masked.sum().clamp_min(1)
