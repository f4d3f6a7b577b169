"""Batches with random tokens and grey images, of given lengths: what a rehearsal or a benchmark runs a step on.

B pairs, N patches, W slots of the longest text, n tokens of the batch, M masked tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedConfig

from oner.processing.data.masking import Keeping, keep_patches

from .objective import Batch, Example


def example_pairs(config: PreTrainedConfig, lengths: Sequence[int], example: Example, joint: bool = True) -> Batch:
    """
    What the collator gives for pairs whose captions have these lengths.

    Args:
        joint: Whether the layout holds a placeholder for each patch, or texts stand alone.

    Raises:
        ValueError: a text longer than `max_text_length`.
    """
    if not len(lengths) or max(lengths) > config.max_text_length:
        raise ValueError(f"lengths {list(lengths)[:8]}...; expected some in [0, {config.max_text_length}]")
    rng = np.random.default_rng(example.seed)
    pairs = len(lengths)
    slots = max(1, *lengths)
    n_patches = (config.image_size // config.patch_size) ** 2
    head = 1 + n_patches * joint

    # clean ids
    real = np.arange(slots) < np.asarray(lengths)[:, None]  # (B, W)
    ids = np.full((pairs, head + slots), config.pad_token_id, dtype=np.int64)  # (B, H+W)
    ids[:, 0] = config.cls_token_id
    ids[:, 1:head] = config.image_token_id
    low = 1 + max(config.cls_token_id, config.mask_token_id, config.image_token_id)
    tokens = rng.integers(min(low, config.vocab_size - 1), config.vocab_size, int(real.sum()))  # (n,)
    ids[:, head:][real] = tokens

    # what is masked
    places = np.sort(rng.permutation(len(tokens))[: round(example.mlm_probability * len(tokens))])  # (M,)
    order = np.argsort(rng.random((pairs, n_patches)))
    hidden = order < int(example.mim_ratio * n_patches)  # (B, N)
    twin = ids.copy()
    corrupted = tokens.copy()
    corrupted[places] = config.mask_token_id
    twin[:, head:][real] = corrupted

    arrays = {
        "input_ids": ids,
        "attention_mask": np.concatenate([np.ones((pairs, head), bool), real], axis=1).astype(np.int64),
        "masked_input_ids": twin,
        "text_index": np.flatnonzero(real),
        "mlm_index": places,
        "mlm_labels": tokens[places],
        "bool_masked_pos": hidden,
        "mim_index": np.flatnonzero(hidden),
        "ids": np.arange(pairs),
        "rows": np.arange(pairs),
    }
    if example.image_keep != 1:
        count = Keeping(example.image_keep).count(n_patches, 0.0)  # K
        arrays["kept_patches"] = np.stack([keep_patches(n_patches, count, rng) for _ in range(pairs)])
    batch = {name: torch.tensor(array) for name, array in arrays.items()}
    return {**batch, "pixel_values": grey_images(config, pairs)}


def grey_images(config: PreTrainedConfig, count: int) -> torch.Tensor:
    """(B, C, H, W) zeros."""
    return torch.zeros(count, config.num_channels, config.image_size, config.image_size)
