"""Rows to a batch of pictures alone, for what is trained on pictures and never reads the captions beside them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .collation import Example, PairCollator
from .quarantine import BadRow
from .sampling import concept_id


class PictureCollator(PairCollator):
    """`PairCollator` without words, masks and layout; bad rows are replaced in the same way.

    Args:
        image_transform: (PIL RGB, numpy generator) -> (3, H, W) float tensor.
        seed: seed of the run.
        max_pixels: largest picture that is decoded; None keeps the decoder's own cap.
        source: name of the data, for error messages.
    """

    def __init__(
        self,
        image_transform: Callable[[Image.Image, np.random.Generator], torch.Tensor],
        seed: int = 0,
        max_pixels: int | None = None,
        source: str = "the data set",
    ) -> None:
        # a layout of words is all that the parent's own __init__ would check and keep
        self.image_transform, self.seed, self.max_pixels, self.source = image_transform, seed, max_pixels, source

    def __call__(self, items: Sequence[tuple]) -> dict[str, Any]:
        """Batch of `items`, (RowKey, row) or (RowKey, row, stand-ins).

        Returns:
            pixel_values (B, 3, H, W) float32; ids (B,) int64 concept ids; rows (B,) int64; and `quarantine` as
            `PairCollator` has it.

        Raises:
            ValueError, BadRowsError: as `PairCollator`.
        """
        if not items:
            raise ValueError("an empty batch: expected at least one (RowKey, row)")
        quarantine: list[dict[str, Any]] = []
        examples = [self._read(key, row) for key, row, *_ in items]
        for place, example in enumerate(examples):
            if isinstance(example, BadRow):
                examples[place] = self._stand_in(items[place], example, quarantine)
        ids = [concept_id(example.row.get("id", example.key.row)) for example in examples]
        batch: dict[str, Any] = {
            "pixel_values": torch.stack([example.pixels["pixel_values"] for example in examples]),
            "ids": torch.tensor(ids, dtype=torch.int64),
            "rows": torch.tensor([example.key.row for example in examples], dtype=torch.int64),
        }
        if quarantine:
            batch["quarantine"] = quarantine
        return batch

    def _with_words(self, examples: list[Example | BadRow]) -> list[Example | BadRow]:
        return examples
