"""Many inputs or one: lists, and what stands for a list in `datasets` and in transformers' pipelines."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def is_many(value: Any) -> bool:
    """
    Whether a value holds inputs, and is none itself: a list, a tuple, an iterator, a `datasets` column or data set,
    a `KeyDataset`, any sequence that is read by number. A text, encoded bytes, an array and a mapping are one input.
    """
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping, np.ndarray, np.generic, torch.Tensor)):
        return False
    return isinstance(value, Iterator) or (hasattr(value, "__len__") and hasattr(value, "__getitem__"))


__all__ = ["is_many"]
