"""Losses as pure functions of tensors, computed in fp32 (fp64 stays fp64) for any input dtype.

B queries of this process, K keys of all processes, P embedding width, M masked tokens, V vocabulary, N patches.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from oner.modeling.vl_embeddings import patchify

# number of cosines that InfoNCE computes at a time, in a few fp32 tensors of 64 MiB each
BLOCK_COSINES = 1 << 24


def in_full(tensor: torch.Tensor) -> torch.Tensor:
    """Converts to fp32, or keeps fp64: the precision of every loss."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def info_nce(
    queries: torch.Tensor,
    keys: torch.Tensor,
    temperature: float | torch.Tensor,
    query_ids: torch.Tensor | None = None,
    key_ids: torch.Tensor | None = None,
    offset: int = 0,
    block: int = BLOCK_COSINES,
) -> torch.Tensor:
    r"""
    InfoNCE, NCE(l, r) of equation 1: cross-entropy of cos(q, k) / T with each query's own key as label. The B x K
    cosines are computed in blocks of rows, together with their gradient, so that memory grows with B + K and nothing
    is computed twice.

    Args:
        queries (`(B, P)`), keys (`(K, P)`): Normalised here. Keys may carry gradient.
        temperature: T, a number or a tensor of one element, which may carry gradient.
        query_ids (`(B,)`), key_ids (`(K,)`): With ids, all keys of a query's id are positives of equal weight (ALBEF's
            targets); without, key `offset + i` is the positive of query i.
        offset: Index of this process's first key among the gathered ones (label = i + B * rank, MoCo-v3).
        block: Number of cosines to compute at a time, at least one row of K.

    Raises:
        ValueError: query_ids without key_ids; a query without a positive key (checked on the CPU only: reading
            values would synchronise an accelerator; there the loss is NaN).
    """
    if query_ids is not None and key_ids is None:
        raise ValueError("got query_ids without key_ids; expected the id of every key")
    queries = F.normalize(in_full(queries), dim=-1)  # (B, P)
    keys = F.normalize(in_full(keys), dim=-1)  # (K, P)

    # the temperature as a factor, 0-dim, so that its gradient is one number
    if isinstance(temperature, torch.Tensor):
        scale = in_full(temperature).reciprocal().reshape(())
    else:
        scale = torch.full((), 1 / temperature, dtype=queries.dtype, device=queries.device)

    # as many rows of cosines at a time as fit into a block
    rows = max(1, block // max(1, len(keys)))
    with_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (queries, keys, scale))
    return _BlockwiseNCE.apply(queries, keys, scale, query_ids, key_ids, offset, rows, with_gradient)


class _BlockwiseNCE(torch.autograd.Function):
    """
    Rows of queries against all keys, one block of rows at a time: a row's log-sum-exp needs no other row, so its
    gradient is known together with its loss. Own code, because torch's chunked cross-entropy is for a vocabulary and
    labels, and supports neither several positives nor the gradient of a temperature.
    """

    @staticmethod
    def forward(ctx, queries, keys, scale, query_ids, key_ids, offset, rows, with_gradient):
        total = queries.new_zeros(())
        toward_queries = torch.empty_like(queries) if with_gradient else None
        toward_keys = torch.zeros_like(keys) if with_gradient else None
        toward_scale = torch.zeros_like(scale)
        # otherwise the products would be computed in half precision
        with torch.autocast(queries.device.type, enabled=False):
            for first in range(0, len(queries), rows):
                block = slice(first, first + rows)
                logits = (queries[block] @ keys.T).mul_(scale)  # (rows, K)
                targets = _targets(logits, query_ids, key_ids, first + offset, block)
                logits, loss = _cross_entropy(logits, targets)
                total += loss
                if with_gradient:
                    slopes = _slopes(logits, targets).div_(len(queries))  # (rows, K)
                    by_query = slopes @ keys  # (rows, P)
                    toward_scale += (queries[block] * by_query).sum()
                    toward_queries[block] = by_query.mul_(scale)  # (rows, P)
                    toward_keys.addmm_(slopes.T, queries[block] * scale)  # (K, P)
        if with_gradient:
            ctx.save_for_backward(toward_queries, toward_keys, toward_scale)
        return total / len(queries)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        # the gradients are known already; the incoming gradient only scales them
        slopes = [
            slope * gradient if needed else None
            for slope, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        ]
        return *slopes, None, None, None, None, None


def _targets(
    logits: torch.Tensor, query_ids: torch.Tensor | None, key_ids: torch.Tensor | None, label: int, block: slice
) -> torch.Tensor:
    """The label of each row (rows,) int64, or the weight of each key (rows, K), where rows sum to 1."""
    if query_ids is None:
        return torch.arange(label, label + len(logits), device=logits.device)
    positives = (query_ids[block, None] == key_ids[None, :]).to(logits.dtype)  # (rows, K)
    counts = positives.sum(1, keepdim=True)  # (rows, 1)
    if logits.device.type == "cpu" and (lonely := query_ids[block][counts[:, 0] == 0]).numel():
        raise ValueError(f"query_ids {lonely.tolist()} have no key; expected at least one key of each id")
    return positives.div_(counts)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (rows, K), written over the logits, and the sum over rows of their cross-entropy."""
    logits = logits.sub_(logits.logsumexp(1, keepdim=True))
    if targets.ndim == 1:
        return logits, -logits.gather(1, targets[:, None]).sum()
    return logits, -torch.einsum("rk,rk->r", targets, logits).sum()


def _slopes(logs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Probability minus target, the gradient at the logits (rows, K), written over the log-probabilities."""
    slopes = logs.exp_()
    if targets.ndim == 1:
        return slopes.scatter_add_(1, targets[:, None], slopes.new_full((len(slopes), 1), -1.0))
    return slopes.sub_(targets)


def masked_language_loss(
    logits: torch.Tensor, labels: torch.Tensor, count: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Cross-entropy over the masked tokens (M, V), (M,): their sum divided by `count`, or the mean if None; zero,
    with a graph, if there are no tokens. For a batch in chunks or on several processes, count is that of the whole
    batch.
    """
    if len(labels) == 0:
        return in_full(logits).sum() * 0.0
    return F.cross_entropy(in_full(logits), labels, reduction="sum") / (len(labels) if count is None else count)


def masked_image_loss(
    predictions: torch.Tensor,
    pixel_values: torch.Tensor,
    bool_masked_pos: torch.Tensor,
    patch_size: int,
    norm_pixels: bool = True,
    count: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    MAE's loss: mean squared error per patch, summed over masked patches and divided by `count`, or by their number.
    `norm_pixels` normalises each target patch by its mean and unbiased variance.
    (B, N, p*p*C), (B, C, H, W), (B, N) bool -> scalar.
    """
    targets = patchify(in_full(pixel_values), patch_size)  # (B, N, p*p*C)
    if norm_pixels:
        mean = targets.mean(-1, keepdim=True)  # (B, N, 1)
        variance = targets.var(-1, keepdim=True)  # (B, N, 1), unbiased
        targets = (targets - mean) / (variance + 1e-6).sqrt()
    error = (in_full(predictions) - targets).square().mean(-1)  # (B, N)
    masked = bool_masked_pos.to(error.dtype)  # (B, N)
    return (error * masked).sum() / (masked.sum().clamp_min(1) if count is None else count)


def distilled_contrast(
    queries: torch.Tensor,
    teacher: torch.Tensor,
    keys: torch.Tensor,
    temperature: torch.Tensor | float,
    alpha: float,
    positives: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Equations 2 to 4, one direction: the mean over rows of H(y, p), y = (1 - a) * one-hot + a * p_m.

    Args:
        queries (`(B, P)`), teacher (`(B, P)`): Unit vectors of the same inputs by the student and by the teacher.
        keys (`(K, P)`): The teacher's unit vectors of the other modality; row b's own is key b.
        temperature: tau, the divisor; the targets use it without gradient.
        positives (`(B, K)` bool): All keys with the query's id, with equal weight (ALBEF's fine-tuning), instead of b.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, teacher, keys = in_full(queries), in_full(teacher), in_full(keys)
        logs = F.log_softmax(queries @ keys.T / temperature, dim=1)  # (B, K)
        with torch.no_grad():
            if positives is None:
                targets = torch.eye(*logs.shape, dtype=logs.dtype, device=logs.device)  # (B, K)
            else:
                targets = positives.to(logs.dtype)
                targets = targets / targets.sum(1, keepdim=True)  # (B, K), rows of sum 1
            if alpha:
                soft = F.softmax(teacher @ keys.T / temperature, dim=1)  # (B, K)
                targets = alpha * soft + (1 - alpha) * targets
        return -(targets * logs).sum(1).mean()


def distilled_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    alpha: float,
    count: torch.Tensor | int | None = None,
    soft_logs: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Equation 7: cross-entropy of logits (M, V) with labels (M,) and a teacher's distribution; sum divided by `count`,
    or the mean if None. `soft_logs` (M, V) are log-probabilities to take for the soft term instead of the logits' own.
    """
    if len(labels) == 0:
        return in_full(logits).sum() * 0.0
    logs = F.log_softmax(in_full(logits), dim=-1)  # (M, V)
    loss = F.nll_loss(logs, labels, reduction="none")  # (M,)
    if alpha:
        soft = F.softmax(in_full(teacher_logits), dim=-1)  # (M, V)
        distilled = -(soft * (logs if soft_logs is None else soft_logs)).sum(-1)  # (M,)
        loss = (1 - alpha) * loss + alpha * distilled
    return loss.sum() / (len(labels) if count is None else count)


def distilled_presence(
    logits: torch.Tensor, targets: torch.Tensor, teacher_logits: torch.Tensor | None, alpha: float
) -> torch.Tensor:
    """Equations 8 and 9: binary cross-entropy for each of V tokens of an image. (B, V) -> (B,), means over tokens."""
    logits = in_full(logits)
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")  # (B, V)
    if alpha:
        soft = F.binary_cross_entropy_with_logits(logits, in_full(teacher_logits).sigmoid(), reduction="none")
        loss = (1 - alpha) * loss + alpha * soft
    return loss.mean(1)


def keyword_targets(
    attention: torch.Tensor, input_ids: torch.Tensor, vocab_size: int, cls_token_id: int, per_head: int, keywords: int
) -> torch.Tensor:
    """
    PSL's labels (supplement, section 3; the vote is the code's): each head votes for the `per_head` places that [CLS]
    attends most, and the tokens at the `keywords` places of most votes are the picture's, but for [CLS] itself. Of
    fewer places than that, all. Ties are torch.topk's.

    (B, H, T), (B, T) -> (B, V), 1 for a keyword.
    """
    batch, heads, places = attention.shape
    chosen = attention.topk(min(per_head, places), dim=-1).indices.flatten(1)  # (B, H * per_head)
    votes = torch.zeros(batch, places, dtype=torch.long, device=attention.device)
    votes = votes.scatter_add(1, chosen, torch.ones_like(chosen))  # (B, T)
    tokens = input_ids.gather(1, votes.topk(min(keywords, places), dim=-1).indices)  # (B, keywords)
    targets = torch.zeros(batch, vocab_size, device=attention.device).scatter(1, tokens, 1.0)  # (B, V)
    targets[:, cls_token_id] = 0.0
    return targets


def draw_negatives(weights: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draws one allowed column per row by its weights; uniformly if all of them are zero.

    Draws from torch's generator, which checkpoints keep. (B, B), (B, B) bool -> columns (B,), and whether there was
    one to draw (B,).
    """
    weights = in_full(weights).masked_fill(~allowed, 0.0)
    vanished = weights.sum(1, keepdim=True) <= 0  # (B, 1)
    weights = torch.where(vanished, allowed.to(weights.dtype), weights)
    possible = allowed.any(1)  # (B,)
    # a row without allowed columns draws any; the caller ignores it
    weights = torch.where(possible[:, None], weights, torch.ones_like(weights))
    # the same draw as torch.multinomial (first of exponential arrivals), without its check of the values, which
    # synchronises
    return (weights / torch.empty_like(weights).exponential_()).argmax(1), possible
