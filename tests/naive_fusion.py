"""BERT's layers with cross-attention, one text at a time and one head after the other."""

import torch


def naive_attention(attention, x, context, allowed):
    """(L, D), (S, D), allowed (L, S) bool -> (L, D), one head after the other."""
    heads = []
    for start in range(0, x.shape[-1], attention.head_dim):
        part = slice(start, start + attention.head_dim)
        q, k, v = (
            source @ linear.weight[part].T + linear.bias[part]
            for source, linear in ((x, attention.query), (context, attention.key), (context, attention.value))
        )
        scores = (q @ k.T / attention.head_dim**0.5).masked_fill(~allowed, float("-inf"))
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, -1) @ attention.proj.weight.T + attention.proj.bias


def naive_layer(layer, x, context=None, causal=False):
    """(L, D) that may read a context (S, D) -> (L, D)."""
    allowed = torch.ones(len(x), len(x), dtype=torch.bool)
    x = layer.attention_norm(x + naive_attention(layer.attention, x, x, allowed.tril() if causal else allowed))
    if context is not None:
        everything = torch.ones(len(x), len(context), dtype=torch.bool)
        x = layer.cross_norm(x + naive_attention(layer.cross_attention, x, context, everything))
    inner = x @ layer.feed_forward.fc1.weight.T + layer.feed_forward.fc1.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    return layer.output_norm(x + inner @ layer.feed_forward.fc2.weight.T + layer.feed_forward.fc2.bias)


def naive_embed(embeddings, ids):
    """Ids (L,) -> (L, D)."""
    return embeddings.norm(embeddings.word_embeddings.weight[ids] + embeddings.position_embeddings.weight[: len(ids)])
