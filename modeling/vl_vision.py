"""The visual tower of families that read an image apart from its text: ViT, with learned positions.

B images, C channels, H x W pixels, N patches, D width.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .vl_embeddings import ConvStem, LinearStem, interpolate_positions
from .vl_layers import PreNormLayer


class VisionEmbeddings(nn.Module):
    """
    Patches, [CLS] and learned positions. (B, C, H, W) -> (B, 1 + N, D).

    Args:
        config (`PreTrainedConfig`): Of a family.
        mask_token (`bool`): Whether there is a token to stand for a masked patch.
    """

    def __init__(self, config: PreTrainedConfig, mask_token: bool = False):
        super().__init__()
        self.config = config
        stem = ConvStem if config.stem == "conv" else LinearStem
        self.stem = stem(config.patch_size, config.num_channels, config.hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if mask_token else None
        places = 1 + (config.position_image_size // config.patch_size) ** 2
        self.position_embeddings = nn.Parameter(torch.zeros(1, places, config.hidden_size))

    @torch.no_grad()
    def reset(self) -> None:
        """[CLS] and positions N(0, `initializer_range`), the mask token zeros (ViT, BEiT)."""
        init.normal_(self.cls_token, std=self.config.initializer_range)
        init.normal_(self.position_embeddings, std=self.config.initializer_range)
        if self.mask_token is not None:
            init.zeros_(self.mask_token)

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """The table for a grid (h, w), bicubic but for its first row, which is [CLS]'s. -> (1, 1 + h*w, D)."""
        table = self.position_embeddings  # (1, 1 + side², D)
        side = math.isqrt(table.shape[1] - 1)
        patches = interpolate_positions(table[0, 1:], (side, side), grid)  # (h*w, D)
        return torch.cat([table[:, :1], patches[None]], dim=1)

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Masked patches (B, N) become the mask token, before positions are added (BEiT)."""
        p = self.config.patch_size
        grid = (pixel_values.shape[-2] // p, pixel_values.shape[-1] // p)
        patches = self.stem(pixel_values.to(self.cls_token.dtype))  # (B, N, D)
        # what is masked is not seen at all
        if bool_masked_pos is not None:
            patches = torch.where(bool_masked_pos[..., None], self.mask_token.to(patches.dtype), patches)  # (B, N, D)
        cls = self.cls_token.to(patches.dtype).expand(len(patches), -1, -1)  # (B, 1, D)
        return torch.cat([cls, patches], dim=1) + self.positions(grid).to(patches.dtype)  # (B, 1 + N, D)


class VisionEncoder(nn.Module):
    """A pre-norm ViT. (B, C, H, W) -> (B, 1 + N, D) after its final norm. Arguments as of `VisionEmbeddings`."""

    def __init__(self, config: PreTrainedConfig, mask_token: bool = False):
        super().__init__()
        self.embeddings = VisionEmbeddings(config, mask_token)
        self.layers = nn.ModuleList([PreNormLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        hidden_states = self.embeddings(pixel_values, bool_masked_pos)  # (B, 1 + N, D)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return self.norm(hidden_states)


__all__ = ["VisionEmbeddings", "VisionEncoder"]
