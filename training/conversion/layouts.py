"""Foreign layouts of ViT, DeiT, MAE and BERT in one spelling each: timm's of a ViT, transformers' of a BERT.

D width. Names are those of timm's, DeiT's and MAE's own files, or of transformers', before and since its version 5.
"""

import re
from collections.abc import Mapping

import torch

from .names import Names
from .report import MissingWeightsError

# a name in one spelling -> the name in the file, and its tensor; where several made one, their names with " + "
Found = dict[str, tuple[str, torch.Tensor]]

# transformers' ViT, DeiT and ViTMAE -> timm's; queries, keys and values are joined before
TRANSFORMERS_VIT = Names(
    [
        ("embeddings.cls_token", "cls_token"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.mask_token", "mask_token"),
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("layernorm", "norm"),
        *(
            (f"{layers}.#.{left}", f"blocks.#.{right}")
            for layers in ("encoder.layer", "layers")
            for left, right in (
                ("layernorm_before", "norm1"),
                ("layernorm_after", "norm2"),
                ("attention.qkv", "attn.qkv"),
                ("attention.output.dense", "attn.proj"),
                ("attention.o_proj", "attn.proj"),
                ("intermediate.dense", "mlp.fc1"),
                ("output.dense", "mlp.fc2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            )
        ),
    ]
)

# the first of three matrices, before and since version 5, and how the three are spelled
QUERIES = re.compile(r"((?:encoder\.layer|layers)\.\d+\.attention\.)(?:attention\.query|q_proj)\.(weight|bias)")
SPELLINGS = (("attention.query", "attention.key", "attention.value"), ("q_proj", "k_proj", "v_proj"))
# BERT's first checkpoints call a norm's weight and bias so
OLD_NORM = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# of MAE, by facebook's names or transformers'; both keep a token there for what is masked
MAE_DECODER = re.compile(r"decoder[._].*")


def vision_names(state: Mapping[str, torch.Tensor]) -> Found:
    """A ViT by timm's names, queries, keys and values as one matrix. What is no ViT's keeps its name."""
    shorn = _without_prefix(state, ("vit.", "deit."), ("embeddings.", "layers.", "encoder."))
    return _timm_names(shorn) if any(name.startswith("embeddings.") for name in shorn) else shorn


def text_names(state: Mapping[str, torch.Tensor]) -> Found:
    """A BERT by transformers' names, "encoder.layer.0..." and, of its head of words, "cls.predictions..."."""
    found = {}
    for name, value in _without_prefix(state, ("bert.",), ("embeddings.", "encoder.")).items():
        for old, new in OLD_NORM.items():
            name = name.replace(old, new)
        found[name] = value
    return found


def is_decoder(name: str, found: Found) -> bool:
    """Whether a name of `vision_names` is of MAE's decoder, of which facebook's mask token has no other sign."""
    if MAE_DECODER.fullmatch(name):
        return True
    return name == "mask_token" and any(MAE_DECODER.fullmatch(other) for other in found)


def _without_prefix(state: Mapping[str, torch.Tensor], prefixes: tuple[str, ...], of: tuple[str, ...]) -> Found:
    """Names shorn of what transformers' task models put before their tower's."""
    for prefix in prefixes:
        if any(name.startswith(prefix + first) for name in state for first in of):
            return {name.removeprefix(prefix): (name, tensor) for name, tensor in state.items()}
    return {name: (name, tensor) for name, tensor in state.items()}


def _timm_names(shorn: Found) -> Found:
    """transformers' names as timm's, with queries, keys and values as one matrix, whose name here is their sum."""
    shorn = dict(shorn)
    for name in list(shorn):
        match = QUERIES.fullmatch(name)
        if match is None:
            continue

        # all three, in the spelling of the first
        spelling = next(spelling for spelling in SPELLINGS if f"{spelling[0]}." in name)
        parts = [shorn.get(f"{match[1]}{part}.{match[2]}") for part in spelling]
        if any(part is None for part in parts):
            raise MissingWeightsError(f"beside {name} there are no keys and values; expected all three")

        # one matrix in their place, (3D, D), or a bias (3D,)
        for part in spelling:
            shorn.pop(f"{match[1]}{part}.{match[2]}")
        joined = " + ".join(official for official, _ in parts)
        shorn[f"{match[1]}qkv.{match[2]}"] = (joined, torch.cat([tensor for _, tensor in parts]))
    return {TRANSFORMERS_VIT(name) or name: value for name, value in shorn.items()}


__all__ = ["Found", "is_decoder", "text_names", "vision_names"]
