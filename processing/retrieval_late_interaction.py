"""Late interaction: re-ranks retrieved items by comparing their tokens or patches with those of the query.

    score = the mean over the query's states of the maximum cosine with a state of the item       (MaxSim)

as in ColBERT (Khattab and Zaharia, SIGIR 2020, equation 3), with a mean instead of the sum, so that it can be mixed
with a cosine. A one-tower model needs no training for it: its tokens and patches share one space after the last layer
and before any projector; the same states localise a text in an image.

Shapes: S states of the query, S' of an item, D their width, c items.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import normalize

from .retrieval_sources import is_picture_file

RERANK_WEIGHT = 0.25

OpenItem = Callable[[Any], Any]


def late_interaction(query: torch.Tensor, items: Sequence[torch.Tensor]) -> torch.Tensor:
    """States (S, D) of a query and of each item (S', D) → scores (c,) from -1 to 1.

    Raises:
        ValueError: the query or an item has no states.
    """
    if not len(query) or not all(map(len, items)):
        raise ValueError("a text without a word, or a picture without a patch, has no states to compare")
    asked = normalize(query, dim=-1)  # (S, D)
    scores = [(asked @ normalize(states, dim=-1).T).amax(1).mean() for states in items]  # of (S, S') each
    return torch.stack(scores) if scores else torch.empty(0)


def check_reranking(config: Any, rerank_k: int, weight: float) -> None:
    """Raises ValueError for a model whose tokens and patches have separate spaces, or a weight outside [0, 1]."""
    if getattr(config, "pair_layout", "separate") != "joint":
        raise ValueError(f"late interaction needs one tower for tokens and patches, got a {config.model_type} model")
    if not 0 <= weight <= 1:
        raise ValueError(f"rerank_weight must lie between 0 and 1, got {weight!r}")


def query_of_item(item: Any) -> Any:
    """The query for an item: the image at a path, or at a mapping's "image" or "path"; any other str is a text.

    A name with an image suffix is never a text, so that an image that was moved is an error, not a comparison with
    its file name.

    Raises:
        ValueError: the item names neither an image nor a text.
    """
    if isinstance(item, Mapping):
        picture = next((item[key] for key in ("image", "path") if item.get(key) is not None), None)
        if picture is not None:
            return {"image": picture}
    if isinstance(item, str):
        return {"image": item} if is_picture_file(item) or os.path.isfile(item) else {"text": item}
    raise ValueError(f"re-ranking cannot open the item {item!r:.120}; say how by open_item=")


__all__ = ["RERANK_WEIGHT", "OpenItem", "check_reranking", "late_interaction", "query_of_item"]
