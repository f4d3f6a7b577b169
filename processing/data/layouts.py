"""Layouts of tokens and patches in tensors: one joint sequence for a one-tower family, or separate inputs.

Shapes: B rows, N patches of an image, W tokens of the longest text of the batch (at least 1), T tokens of a text,
n tokens of the batch, H ids before the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class SpecialTokens:
    """The special ids of a layout, which random tokens must not be.

    Args:
        cls, mask, pad: ids of [CLS], [MASK], [PAD].
        vocab_size: upper bound of all ids.
        image: id of the placeholder of a patch; None for a family without one.
        others: other special ids of the tokenizer.

    Attributes:
        ids: all special ids, ascending.

    Raises:
        ValueError: two ids are equal, or one is outside the vocabulary.
    """

    cls: int
    mask: int
    pad: int
    vocab_size: int
    image: int | None = None
    others: Sequence[int] = ()
    ids: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        layout = {"image": self.image, "cls": self.cls, "mask": self.mask, "pad": self.pad}
        layout = {name: number for name, number in layout.items() if number is not None}
        distinct = set(layout.values())
        if len(distinct) < len(layout) or min(distinct) < 0 or max(distinct) >= self.vocab_size:
            raise ValueError(f"special ids must be different ids in [0, {self.vocab_size}), got {layout}")
        # random tokens exclude these and all other special tokens of the tokenizer
        known = {number for number in self.others if 0 <= number < self.vocab_size}
        object.__setattr__(self, "ids", tuple(sorted(known | distinct)))

    @classmethod
    def of(cls, config: Any, tokenizer: Any) -> "SpecialTokens":
        """The special ids of a model's configuration and tokenizer."""
        return cls(
            cls=config.cls_token_id,
            mask=config.mask_token_id,
            pad=config.pad_token_id,
            vocab_size=config.vocab_size,
            image=getattr(config, "image_token_id", None),
            others=tuple(getattr(tokenizer, "all_special_ids", ())),
        )


class Layout(Protocol):
    """The ids before the text of a row, and the patch size.

    Attributes:
        special: special ids; None for images alone.
        patch_size: side of a square patch in pixels; None if patches are not counted.
    """

    special: SpecialTokens | None
    patch_size: int | None

    def head(self, n_patches: int) -> np.ndarray:
        """Ids before the text, (H,) int64."""
        ...


@dataclass(frozen=True)
class JointLayout:
    """Joint sequence for one tower: [CLS] [IMG]*N w1 ... wT [PAD]*, (B, 1+N+W), with one placeholder per patch."""

    special: SpecialTokens
    patch_size: int

    def __post_init__(self) -> None:
        if self.special.image is None:
            raise ValueError("the joint layout needs the id of an image token, got none")

    def head(self, n_patches: int) -> np.ndarray:
        return np.array([self.special.cls] + [self.special.image] * n_patches)  # (1+N,)


@dataclass(frozen=True)
class SeparateLayout:
    """Text separate from pixels, or text alone: [CLS] w1 ... wT [PAD]*, (B, 1+W)."""

    special: SpecialTokens
    patch_size: int | None = None

    def head(self, n_patches: int) -> np.ndarray:
        return np.array([self.special.cls])  # (1,)


@dataclass(frozen=True)
class ImageLayout:
    """Images alone."""

    patch_size: int | None = None
    special: None = None

    def head(self, n_patches: int) -> np.ndarray:
        raise ValueError("images alone have no row of tokens")


def patch_grid(pixels: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of (..., H, W). Raises `ValueError` unless the patch size divides H and W."""
    height, width = pixels.shape[-2:]
    # otherwise a margin would silently be lost
    if height % patch_size or width % patch_size:
        raise ValueError(f"pictures of {height}x{width} cannot be cut into patches of {patch_size}")
    return height // patch_size, width // patch_size


def real_slots(tokens: Sequence[np.ndarray]) -> np.ndarray:
    """Mask of the slots that hold a token: (B, W) bool, W at least 1."""
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)  # (B,)
    return np.arange(max(1, int(lengths.max()))) < lengths[:, None]  # (B, W)


def lay_out(tokens: Sequence[np.ndarray], head: np.ndarray, pad: int) -> torch.Tensor:
    """Rows of `head` (H,), tokens and padding: (B, H+W) int64."""
    real = real_slots(tokens)  # (B, W)
    ids = np.full((len(tokens), len(head) + real.shape[1]), pad, dtype=np.int64)  # (B, H+W)
    ids[:, : len(head)] = head
    ids[:, len(head) :][real] = np.concatenate(tokens)
    return torch.from_numpy(ids)


def attention_mask(tokens: Sequence[np.ndarray], n_head: int) -> torch.Tensor:
    """1 for every position except padding: (B, H+W) int64."""
    real = real_slots(tokens)  # (B, W)
    before = np.ones((len(tokens), n_head), dtype=bool)  # (B, H)
    return torch.from_numpy(np.concatenate([before, real], axis=1).astype(np.int64))  # (B, H+W)
