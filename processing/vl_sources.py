"""Many inputs or one: lists, and what stands for a list in `datasets` and in transformers' pipelines."""

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
    Whether a value holds inputs, and is none itself: a list, a tuple, an iterator, a `datasets` column or data set,
    a `KeyDataset`, any sequence that is read by number. A text, encoded bytes, an array and a mapping are one input.
    """
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping, np.ndarray, np.generic, torch.Tensor)):
        return False
    return isinstance(value, Iterator) or (hasattr(value, "__len__") and hasattr(value, "__getitem__"))


def iterate(source: Any) -> Iterator[Any]:
    """As `iter`, also of what is read by number and does not say where it ends, such as torch's data sets."""
    return iter(source) if isinstance(source, Iterable) else (source[place] for place in range(len(source)))


def undecoded(source: Any) -> Any:
    """
    A data set or a column of `datasets`, or a `KeyDataset` over one, with pictures as they are stored; anything else
    as it is. A damaged picture would else end the whole iteration.
    """
    if isinstance(getattr(source, "column_name", None), str) and hasattr(source, "source"):
        return undecoded(source.source)[source.column_name]
    if hasattr(source, "dataset") and hasattr(source, "key"):
        return type(source)(undecoded(source.dataset), source.key)

    # a transform or a format of the user's own sees what it always saw
    features = getattr(source, "features", None) if hasattr(source, "cast_column") else None
    if not features or (getattr(source, "format", None) or {}).get("type") is not None:
        return source
    for name, feature in features.items():
        if getattr(feature, "decode", False) is True:
            source = source.cast_column(name, type(feature)(decode=False))
    return source


def warn_caller(message: str) -> None:
    """A warning that names the line outside of this package and of transformers' pipelines that led here."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and os.path.dirname(frame.f_code.co_filename) in INSIDE:
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)


__all__ = ["is_many", "iterate", "undecoded", "warn_caller"]
