"""Where a text is in a picture, of a model that holds patches and tokens in one space (Figures 1, 3 and 6-8 of the
OneR paper): "we simply compute the cosine similarities between image patch embeddings and the average-pooled text
embedding". Both come from the final LayerNorm, before any projector, picture and text each in a pass of its own.

Shapes: B pairs, N = h*w patches (row-major), L positions of a text ([CLS] first), D width, H x W pixels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def mean_of_words(states: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean (B, D) of the token states of a text-only pass (B, L, D), without [CLS] (position 0) and padding.

    Raises:
        ValueError: a text has no tokens.
    """
    tokens = attention_mask.bool().clone()  # (B, L)
    tokens[:, 0] = False
    count = tokens.sum(-1, keepdim=True)  # (B, 1)
    if (count == 0).any():
        raise ValueError(f"text {int((count[:, 0] == 0).nonzero()[0])} has no words, so there is nothing to look for")
    return (states * tokens[..., None].to(states.dtype)).sum(1) / count.to(states.dtype)  # (B, D)


def patch_word_cosine(patches: Tensor, words: Tensor) -> Tensor:
    """Cosine (B, N) of every patch state (B, N, D) with its row's mean token state (B, D)."""
    return torch.einsum("bnd,bd->bn", F.normalize(patches.float(), dim=-1), F.normalize(words.float(), dim=-1))


def patch_grid(pixel_values: Tensor, model: torch.nn.Module) -> tuple[int, int]:
    """(h, w), the patches down and across of `pixel_values` (B, 3, H, W)."""
    size = model.config.patch_size
    down, across = size if isinstance(size, list | tuple) else (size, size)
    return pixel_values.shape[-2] // down, pixel_values.shape[-1] // across


def cosine_maps(model: Any, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, **options: Any) -> Tensor:
    """
    Raw cosines (B, h, w) of the patches of each picture (B, 3, H, W) with its text (B, L).

    Args:
        options: Of `get_image_features`: interpolate_pos_encoding=True for another size than the model's.

    Raises:
        ValueError: a text has no tokens.
    """
    # final states of two passes, that of pictures without [CLS]
    outputs = model.get_image_features(pixel_values=pixel_values, **options)
    patches = outputs.last_hidden_state[:, 1:]  # (B, N, D)
    states = model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, L, D)
    cosines = patch_word_cosine(patches, mean_of_words(states, attention_mask))  # (B, N)
    return cosines.unflatten(1, patch_grid(pixel_values, model))


__all__ = ["cosine_maps", "mean_of_words", "patch_grid", "patch_word_cosine"]
