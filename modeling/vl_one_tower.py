"""Embeddings of a single tower for images, texts and pairs: words, patches, one [CLS], and fixed sine positions.

B rows, L positions of a sequence, N = h*w patches, T tokens of a text, D width. A sequence is [CLS], N patches, T
tokens; either part may be missing.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .vl_embeddings import ConvStem, LinearStem, interpolate_positions, sincos_1d, sincos_2d
from .vl_outputs import CLS_TOKEN, PADDING_TOKEN, PATCH_TOKEN, TEXT_TOKEN


class SineTables(nn.Module):
    """MAE's fixed position tables of width `width`: 2-D sines for patches, 1-D sines for words."""

    def __init__(self, config: PreTrainedConfig, width: int):
        super().__init__()
        self.config = config
        self.width = width
        side = config.image_size // config.patch_size
        self.register_buffer("image_positions", self.make_image_positions((side, side)), persistent=False)
        self.register_buffer("text_positions", self.make_text_positions(), persistent=False)

    def make_image_positions(self, grid: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
        """The 2-D table for a grid (h, w), derived from the original training grid. -> (h*w, width), fp32."""
        config = self.config
        side = config.position_image_size // config.patch_size
        if config.position_interpolation == "recompute":
            # centres of the new patches, in coordinates of the old grid
            rows, columns = (
                (torch.arange(n, device=device, dtype=torch.float64) + 0.5) * side / n - 0.5 for n in grid
            )
            return sincos_2d(rows, columns, self.width).float()
        ticks = torch.arange(side, device=device, dtype=torch.float64)
        return interpolate_positions(sincos_2d(ticks, ticks, self.width).float(), (side, side), grid)

    def make_text_positions(self) -> torch.Tensor:
        """The 1-D table. -> (max_text_length, width), fp32."""
        return sincos_1d(torch.arange(self.config.max_text_length), self.width).float()

    def positions_of(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The stored table, or a new one if images (B, C, H, W) have another size. -> (N, width)."""
        p = self.config.patch_size
        h, w = pixel_values.shape[-2] // p, pixel_values.shape[-1] // p
        if h * p == w * p == self.config.image_size:
            return self.image_positions
        return self.make_image_positions((h, w), pixel_values.device)

    def reset_tables(self) -> None:
        """Recomputes the tables, for `_init_weights`: checkpoints do not hold these buffers."""
        side = self.config.image_size // self.config.patch_size
        init.copy_(self.image_positions, self.make_image_positions((side, side)))
        init.copy_(self.text_positions, self.make_text_positions())


class OneTowerEmbeddings(SineTables):
    """
    Token and patch embeddings with fixed sines: the only part of a single tower that distinguishes the modalities.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config, config.hidden_size)
        stem = ConvStem if config.stem == "conv" else LinearStem
        self.stem = stem(config.patch_size, config.num_channels, config.hidden_size)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_scale = math.sqrt(config.hidden_size) if config.scale_word_embeddings else 1.0

    def embed_patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        patches = self.stem(pixel_values.to(self.word_embeddings.weight.dtype))  # (B, N, D)
        return patches + self.positions_of(pixel_values).to(patches.dtype)

    def embed_tokens(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Embeds ids at their positions in the text, both of one shape. (...) -> (..., D)."""
        tokens = self.word_embeddings(input_ids) * self.token_scale
        return tokens + self.text_positions[positions].to(tokens.dtype)

    def embed_cls(self, batch_size: int) -> torch.Tensor:
        """The [CLS] token, at MAE's zero position. -> (B, 1, D)."""
        ids = torch.full((batch_size, 1), self.config.cls_token_id, device=self.word_embeddings.weight.device)
        return self.word_embeddings(ids) * self.token_scale

    def forward(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        **masks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the sequence (B, L, D) and its token types (B, L); `masks` are passed to `embed_patches`."""
        # an image alone
        if input_ids is None:
            patches = self.embed_patches(pixel_values, **masks)  # (B, N, D)
            hidden_states = torch.cat([self.embed_cls(patches.shape[0]), patches], dim=1)  # (B, 1 + N, D)
            token_types = torch.full(hidden_states.shape[:2], PATCH_TOKEN, device=hidden_states.device)
            token_types[:, 0] = CLS_TOKEN
            return hidden_states, token_types

        # token types, and tokens with positions counted from the first of the text
        token_types = token_types_in(input_ids, attention_mask, self.config.image_token_id)  # (B, L)
        place = text_places(token_types, self.config.max_text_length)  # (B, L)
        tokens = self.embed_tokens(input_ids, place)  # (B, L, D)
        # a mask, not a slice from 1: an exported graph would need an extra case for texts of one token
        is_cls = (torch.arange(tokens.shape[1], device=tokens.device) == 0)[:, None]  # (L, 1)
        hidden_states = torch.where(is_cls, self.embed_cls(tokens.shape[0]).to(tokens.dtype), tokens)  # (B, L, D)

        # patches in place of their placeholders
        if pixel_values is not None:
            patches = at_placeholders(self.embed_patches(pixel_values, **masks), token_types)  # (B, L, D)
            is_patch = (token_types == PATCH_TOKEN)[..., None]
            hidden_states = torch.where(is_patch, patches.to(hidden_states.dtype), hidden_states)
        return hidden_states, token_types


def token_types_in(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, image_token_id: int) -> torch.Tensor:
    """Token type of each position of the joint layout. (B, L) -> (B, L)."""
    token_types = torch.full_like(input_ids, TEXT_TOKEN)
    token_types = token_types.masked_fill(input_ids == image_token_id, PATCH_TOKEN)
    if attention_mask is not None:
        token_types = token_types.masked_fill(attention_mask == 0, PADDING_TOKEN)
    token_types[:, 0] = CLS_TOKEN
    return token_types


def text_places(token_types: torch.Tensor, max_text_length: int) -> torch.Tensor:
    """Position of each token in its text; an arbitrary valid one for other tokens. (B, L) -> (B, L)."""
    return ((token_types == TEXT_TOKEN).cumsum(1) - 1).clamp(0, max_text_length - 1)


def at_placeholders(patches: torch.Tensor, token_types: torch.Tensor) -> torch.Tensor:
    """The patch of each placeholder; an arbitrary patch elsewhere. (B, N, D), (B, L) -> (B, L, D)."""
    source = ((token_types == PATCH_TOKEN).cumsum(1) - 1).clamp(0, patches.shape[1] - 1)  # (B, L)
    return patches.gather(1, source[..., None].expand(-1, -1, patches.shape[-1]))


__all__ = ["OneTowerEmbeddings", "SineTables", "at_placeholders", "text_places", "token_types_in"]
