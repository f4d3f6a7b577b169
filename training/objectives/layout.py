"""The collator's joint layout, cut to what a family reads."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig

# what speaks of the places [CLS], patches, text
LAID_OUT = ("input_ids", "attention_mask", "masked_input_ids")


def as_read(batch: Mapping[str, torch.Tensor], config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """The batch; for a family that reads texts apart, its ids without placeholders: (B, 1 + N + W) -> (B, 1 + W)."""
    if config.pair_layout == "joint":
        return dict(batch)
    first = 1 + (batch["pixel_values"].shape[-1] // config.patch_size) ** 2
    return {
        name: torch.cat([value[:, :1], value[:, first:]], dim=1) if name in LAID_OUT else value
        for name, value in batch.items()
    }
