"""Computes features of a frozen tower, before its projections, for probes.

n items, L positions of a sequence, D width. Features are float32 on the CPU.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from oner.modeling.vl_outputs import PATCH_TOKEN, TEXT_TOKEN, VisionLanguageModelOutput

from .embedding import batches, opened
from .sheets import evaluating, on_device

Pool = Literal["cls", "mean"]


def pooled(output: VisionLanguageModelOutput, pool: Pool = "cls") -> Tensor:
    """
    Pools a tower's states to one vector per row: [CLS], or the mean over patches and tokens. (B, L, D) -> (B, D).

    Raises:
        ValueError: an unknown `pool`.
    """
    states = output.last_hidden_state.float()  # (B, L, D)
    if pool == "cls":
        return states[:, 0]
    if pool != "mean":
        raise ValueError(f"pool is {pool!r}; expected one of {', '.join(get_args(Pool))}")

    # neither [CLS] nor padding
    content = (output.token_types == PATCH_TOKEN) | (output.token_types == TEXT_TOKEN)  # (B, L)
    content = content[..., None].to(states.dtype)  # (B, L, 1)
    return (states * content).sum(1) / content.sum(1).clamp_min(1)


def image_features(
    tower: Any,
    processor: Any,
    images: Sequence[Any],
    pool: Pool = "cls",
    batch_size: int = 64,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """
    (n, D) of images, anything that `open_image` opens, decoded one batch at a time; `options` are the processor's.

    Raises:
        ValueError: there are no images, or features are not finite.
        ImageDecodeError: an image cannot be read; gives its number.
    """

    def encode(rows: slice) -> Tensor:
        batch = processor(images=opened(images[rows], rows.start), return_tensors="pt", **options)  # (b, 3, H, W)
        return pooled(tower(pixel_values=on_device(batch, tower)["pixel_values"]), pool)

    return _features(tower, len(images), encode, "pictures", batch_size, progress)


def text_features(
    tower: Any,
    processor: Any,
    texts: Sequence[str],
    pool: Pool = "cls",
    batch_size: int = 128,
    progress: bool = False,
) -> Tensor:
    """
    (n, D) of texts, equal ones read once, in batches of similar length. Raises `ValueError` like `image_features`.
    """
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    place = {text: row for row, text in enumerate(unique)}

    def encode(rows: slice) -> Tensor:
        batch = on_device(processor(text=unique[rows], padding=True, truncation=True, return_tensors="pt"), tower)
        return pooled(tower(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]), pool)

    features = _features(tower, len(unique), encode, "texts", batch_size, progress)  # (u, D)
    return features[torch.tensor([place[text] for text in texts])]


def text_pair_features(first: Tensor, second: Tensor) -> Tensor:
    """Features of a pair of texts for a linear probe (InferSent): (n, D) twice -> (n, 4D)."""
    return torch.cat([first, second, (first - second).abs(), first * second], dim=1)


def _features(
    tower: Any, count: int, encode: Callable[[slice], Tensor], what: str, batch_size: int, progress: bool
) -> Tensor:
    if count == 0:
        raise ValueError(f"no {what} to read")
    with evaluating(tower):
        chunks = [encode(rows).cpu() for rows in batches(count, batch_size, what, progress)]
    features = torch.cat(chunks)  # (n, D)

    # a probe could not learn from them, or would not terminate
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features)).any(1).sum())
        raise ValueError(f"features of {bad} of {count} {what} are not finite")
    return features
