"""Tells one input from many: lists, and the list-like types of `datasets` and of transformers' pipelines."""

import inspect
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import transformers

# the folders of this package and of transformers' pipelines
INSIDE = {os.path.dirname(__file__), os.path.join(os.path.dirname(transformers.__file__), "pipelines")}


def is_many(value: Any) -> bool:
    """
    Whether a value is a collection of inputs: a list, a tuple, an iterator, a `datasets` column or dataset, a
    `KeyDataset`, or any indexable sequence. A text, encoded bytes, an array and a mapping are one input.
    """
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping, np.ndarray, np.generic, torch.Tensor)):
        return False
    return isinstance(value, Iterator) or (hasattr(value, "__len__") and hasattr(value, "__getitem__"))


def iterate(source: Any) -> Iterator[Any]:
    """`iter`, also for indexable objects that are not iterable, such as torch's datasets."""
    return iter(source) if isinstance(source, Iterable) else (source[place] for place in range(len(source)))


def undecoded(source: Any) -> Any:
    """
    Turns off image decoding in a dataset or column of `datasets`, or a `KeyDataset` over one; returns anything else
    unchanged. Otherwise a damaged image would end the whole iteration.
    """
    if isinstance(getattr(source, "column_name", None), str) and hasattr(source, "source"):
        return undecoded(source.source)[source.column_name]
    if hasattr(source, "dataset") and hasattr(source, "key"):
        return type(source)(undecoded(source.dataset), source.key)

    # leave the user's own transform or format unchanged
    features = getattr(source, "features", None) if hasattr(source, "cast_column") else None
    if not features or (getattr(source, "format", None) or {}).get("type") is not None:
        return source
    for name, feature in features.items():
        if getattr(feature, "decode", False) is True:
            source = source.cast_column(name, type(feature)(decode=False))
    return source


def warn_caller(message: str) -> None:
    """Warns with the location of the first caller outside of this package and of transformers' pipelines."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and os.path.dirname(frame.f_code.co_filename) in INSIDE:
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)


__all__ = ["is_many", "iterate", "undecoded", "warn_caller"]
