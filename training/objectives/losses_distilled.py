"""Losses with soft targets: (1 - a) times the hard loss and a times the cross-entropy with a teacher (ALBEF, SIMLA).

B queries, K keys, P embedding width, M masked things, V tokens or codes. In fp32 (fp64 stays fp64).
"""

import torch
import torch.nn.functional as F

from .losses import in_full


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
        queries (`(B, P)`), teacher (`(B, P)`): Unit vectors, the student's and the teacher's of the same things.
        keys (`(K, P)`): The teacher's unit vectors of the other modality; row b's own is key b.
        temperature: tau, the divisor; the targets take it without gradient.
        positives (`(B, K)` bool): All keys of a query's own id, of equal weight (ALBEF's fine-tuning), instead of b.
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
    Equation 7: labels (M,) and a teacher's distribution, of logits (M, V); their sum over `count`, the mean if None.
    `soft_logs` (M, V) are log-probabilities to take for the soft term instead of the logits' own.
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
    """Equations 8 and 9: which of V tokens a picture calls for, binary each. (B, V) -> (B,), means over tokens."""
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
    One column of each row by its weights, among the allowed; evenly where their weights have all vanished.

    Draws from torch's generator, which checkpoints keep. (B, B), (B, B) bool -> columns (B,), and whether there was
    one to draw (B,).
    """
    weights = in_full(weights).masked_fill(~allowed, 0.0)
    vanished = weights.sum(1, keepdim=True) <= 0  # (B, 1)
    weights = torch.where(vanished, allowed.to(weights.dtype), weights)
    possible = allowed.any(1)  # (B,)
    # a row that has none draws any: whoever asked leaves it out
    weights = torch.where(possible[:, None], weights, torch.ones_like(weights))
    # torch.multinomial's own draw, the first of exponential arrivals, without its look at the values: that waits
    return (weights / torch.empty_like(weights).exponential_()).argmax(1), possible
