"""What a published tower tells of the model that begins with it: width, depth, patches, words, heads.

Shapes tell most of it. Heads, activation and the norms' eps stand in a configuration beside the weights alone.
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
        width, layers: D, and how many layers.
        inner: Width within the feed-forward.
        patch, channels (*optional*): Of a tower for images: side of a patch in pixels, and colours.
        words, positions (*optional*): Of a tower for texts: rows of its two tables.
        heads, eps, activation (*optional*): As the configuration says; None where none lies beside the weights.
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
    Of `vision_names`. `said` is the configuration beside the weights, empty where there is none.

    Raises:
        MissingWeightsError: nothing tells the width.
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
    """As `vision_shape`, of `text_names`."""
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
    # a configuration of another width lies there by chance
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
            f"the checkpoint has no {name}, but {list(found)[:3]} and others; expected {expected}"
        )
    return None


def _count(found: Found, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return 1 + max((int(match[1]) for name in found if (match := pattern.match(name))), default=-1)


__all__ = ["TowerShape", "text_shape", "vision_shape"]
