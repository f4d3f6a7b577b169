"""Locates a text in an image, for models that embed patches and words in one space.

OneR, Figures 1, 3, 6 to 8: "We simply compute the cosine similarities between image patch embeddings and the
average-pooled text embedding": both are outputs of the final LayerNorm, before any projector, with image and text in
separate passes. In a model with two spaces the maps are noise (Figure 3).

B pairs, L positions of a text ([CLS] first), N = h*w patches (row-major), D width.
"""

import torch
from torch.nn import functional as F


def mean_of_words(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
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


def patch_word_cosine(patches: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Cosine (B, N) of every patch state (B, N, D) with its row's mean token state (B, D)."""
    return torch.einsum("bnd,bd->bn", F.normalize(patches.float(), dim=-1), F.normalize(words.float(), dim=-1))


class GroundedPatches:
    """Mixin beside `RetrievalFeatures`, for a single tower.

    Attributes:
        grounding_modes: The modes of `ground`.
    """

    grounding_modes = ("cosine",)

    @torch.no_grad()
    def ground(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        mode: str = "cosine",
    ) -> torch.Tensor:
        r"""
        Locates texts in images: maps (B, h, w), non-negative, without a fixed scale, of each patch's cosine with the
        text above the image's mean. Raw cosines are high everywhere, so a box around the whole image would win.

        Args:
            input_ids, attention_mask (`(B, L)`): The texts; image placeholders are ignored.
            pixel_values (`(B, C, H, W)`): The images.
            mode: "cosine".

        Raises:
            ValueError: there are no images, the mode is unknown, or a text has no tokens.
        """
        if pixel_values is None:
            raise ValueError("ground() expects pixel_values, got None")
        if mode not in self.grounding_modes:
            raise ValueError(f"expected mode of {self.grounding_modes}, got {mode!r}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask * (input_ids != self.config.image_token_id)  # (B, L)

        # final states of two passes; images without [CLS]
        patches = self.get_image_features(pixel_values).last_hidden_state[:, 1:]  # (B, N, D)
        states = self.get_text_features(input_ids, mask).last_hidden_state  # (B, L, D)
        cosines = patch_word_cosine(patches, mean_of_words(states, mask))  # (B, N)

        # the part above the image's mean
        above = (cosines - cosines.mean(1, keepdim=True)).clamp_min(0)
        size = self.config.patch_size
        return above.unflatten(1, (pixel_values.shape[-2] // size, pixel_values.shape[-1] // size))  # (B, h, w)


__all__ = ["GroundedPatches", "mean_of_words", "patch_word_cosine"]
