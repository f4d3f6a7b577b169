"""Input embeddings: fixed sine tables and the two ways from pixels to patches.

B pictures, C channels, (h, w) patch grid, N = h*w patches, L tokens, D width, p patch side.
"""

import math

import torch
from torch import nn
from transformers import initialization as init

from .vl_layers import run_layers


def sincos_1d(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """MAE's 1-D table: [sin(p w_i) | cos(p w_i)], w_i = 10000^(-2i/dim). (L,) -> (L, dim), float64."""
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64, device=positions.device) / (dim / 2))
    angles = positions.double()[:, None] * frequencies[None, :]  # (L, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(rows: torch.Tensor, columns: torch.Tensor, dim: int) -> torch.Tensor:
    """MAE's 2-D table, row-major: the first half of `dim` encodes the column, the second the row. -> (h*w, dim)."""
    x = columns.repeat(rows.shape[0])  # (h*w,) column of each patch
    y = rows.repeat_interleave(columns.shape[0])
    return torch.cat([sincos_1d(x, dim // 2), sincos_1d(y, dim // 2)], dim=1)


def interpolate_positions(table: torch.Tensor, grid: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """Bicubic resize of a position table without its [CLS] row, as MAE does. (h*w, D) -> (h'*w', D)."""
    if grid == target:
        return table
    maps = table.T.reshape(1, -1, *grid)  # (1, D, h, w)
    maps = nn.functional.interpolate(maps, size=target, mode="bicubic", align_corners=False)
    return maps.flatten(2)[0].T  # (h'*w', D)


class PatchProjection(nn.Conv2d):
    """
    A convolution that is one linear layer per patch, initialised as such (Xavier over the flat patch, as in MAE).
    """

    def reset(self) -> None:
        bound = math.sqrt(6 / (self.weight[0].numel() + self.out_channels))
        init.uniform_(self.weight, -bound, bound)
        init.zeros_(self.bias)


class LinearStem(nn.Module):
    """ViT's patch projection. (B, C, H, W) -> (B, N, D)."""

    def __init__(self, patch_size: int, num_channels: int, hidden_size: int):
        super().__init__()
        self.projection = PatchProjection(num_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class ConvStem(nn.Module):
    """
    Early convolutions (Xiao et al., 2021) in the form of MoCo-v3's code: log2(p) times [3x3 stride 2, batch norm,
    ReLU] with channels doubling up to D, then 1x1. (B, C, H, W) -> (B, N, D).
    """

    def __init__(self, patch_size: int, num_channels: int, hidden_size: int):
        super().__init__()
        stages = patch_size.bit_length() - 1
        widths = [num_channels] + [hidden_size // 2 ** (stages - 1 - stage) for stage in range(stages)]
        layers = []
        for narrow, wide in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(hidden_size, hidden_size, 1))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.device.type == "cuda":
            # tensor cores need channels last: otherwise every convolution converts its images there and back
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return run_layers(self.layers, pixel_values).flatten(2).transpose(1, 2)  # (B, N, D)


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """MAE's patch vectors, order (h, w, p, q, c): channels fastest. (B, C, H, W) -> (B, N, p*p*C)."""
    batch, channels, height, width = pixel_values.shape
    h, w = height // patch_size, width // patch_size
    patches = pixel_values.reshape(batch, channels, h, patch_size, w, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, h * w, patch_size**2 * channels)
