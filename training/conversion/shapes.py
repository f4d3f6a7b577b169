"""Reads the sizes of a published tower, for the configuration of a model that is initialised from it.

Width, depth, patches and vocabulary follow from shapes. Heads, activation and the norms' eps are only in the
configuration beside the weights.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .layouts import Found
from .report import MissingWeightsError


@dataclass(frozen=True)
class TowerShape:
    """
    Attributes:
        width, layers: D, and the number of layers.
        inner: Inner width of the feed-forward.
        patch, channels (*optional*): Of an image tower: side of a patch in pixels, and colour channels.
        words, positions (*optional*): Of a text tower: rows of its two embedding tables.
        heads, eps, activation (*optional*): From the configuration; None if there is none beside the weights.
    """

    width: int
    layers: int
    inner: int | None
    patch: int | None = None
    channels: int | None = None
    words: int | None = None
    positions: int | None = None
    heads: int | None = None
    eps: float | None = None
    activation: str | None = None


def vision_shape(found: Found, said: Mapping[str, Any]) -> TowerShape:
    """
    The sizes of an image tower as `vision_names` returns it. `said` is the configuration beside the weights, empty if
    there is none.

    Raises:
        MissingWeightsError: the tensor that gives the width is missing.
    """
    width = _length(found, "blocks.0.norm1.weight", "a ViT, DeiT, MAE or DINOv2")
    patches = found.get("patch_embed.proj.weight")  # (D, C, p, p)
    return TowerShape(
        width=width,
        layers=_count(found, "blocks."),
        inner=_length(found, "blocks.0.mlp.fc1.weight"),
        patch=None if patches is None else patches[1].shape[-1],
        channels=None if patches is None else patches[1].shape[1],
        **_said(said, width),
    )


def text_shape(found: Found, said: Mapping[str, Any]) -> TowerShape:
    """Like `vision_shape`, for a text tower as `text_names` returns it."""
    width = _length(found, "embeddings.word_embeddings.weight", "a BERT", dim=1)
    return TowerShape(
        width=width,
        layers=_count(found, "encoder.layer."),
        inner=_length(found, "encoder.layer.0.intermediate.dense.weight"),
        words=_length(found, "embeddings.word_embeddings.weight"),
        positions=_length(found, "embeddings.position_embeddings.weight"),
        **_said(said, width),
    )


def _said(said: Mapping[str, Any], width: int) -> dict[str, Any]:
    # a configuration of another width belongs to another model
    if said.get("hidden_size") != width:
        return {}
    return {
        "heads": said.get("num_attention_heads"),
        "eps": said.get("layer_norm_eps"),
        "activation": said.get("hidden_act"),
    }


def _length(found: Found, name: str, expected: str | None = None, dim: int = 0) -> int | None:
    if name in found:
        return found[name][1].shape[dim]
    if expected is not None:
        raise MissingWeightsError(
            f"the checkpoint has no {name}; it has {list(found)[:3]} and others; expected {expected}"
        )
    return None


def _count(found: Found, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return 1 + max((int(match[1]) for name in found if (match := pattern.match(name))), default=-1)


__all__ = ["TowerShape", "text_shape", "vision_shape"]
