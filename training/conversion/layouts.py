"""Normalises the weight names of foreign checkpoints: a ViT, DeiT, MAE or DINOv2 to timm's, a BERT to transformers'.

D width. It accepts the names in timm's, DeiT's, MAE's and DINOv2's own files, and those of transformers before and
since version 5.
"""

import re
from collections.abc import Mapping

import torch

from .names import Names
from .report import MissingWeightsError

# normalised name -> name in the file, and its tensor; if several tensors were joined, their names with " + "
Found = dict[str, tuple[str, torch.Tensor]]

# transformers' ViT, DeiT, ViTMAE and DINOv2 -> timm's; queries, keys and values are joined first
TRANSFORMERS_VIT = Names(
    [
        ("embeddings.cls_token", "cls_token"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.mask_token", "mask_token"),
        ("embeddings.register_tokens", "register_tokens"),
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("layernorm", "norm"),
        *(
            (f"{layers}.#.{left}", f"blocks.#.{right}")
            for layers in ("encoder.layer", "layers")
            for left, right in (
                ("layernorm_before", "norm1"),
                ("layernorm_after", "norm2"),
                ("norm1", "norm1"),
                ("norm2", "norm2"),
                ("layer_scale1.lambda1", "ls1.gamma"),
                ("layer_scale2.lambda1", "ls2.gamma"),
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

# the query matrix, before and since version 5, and the names of query, key and value
QUERIES = re.compile(r"((?:encoder\.layer|layers)\.\d+\.attention\.)(?:attention\.query|q_proj)\.(weight|bias)")
SPELLINGS = (("attention.query", "attention.key", "attention.value"), ("q_proj", "k_proj", "v_proj"))
# names of a norm's weight and bias in BERT's first checkpoints
OLD_NORM = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# MAE's decoder, by facebook's or transformers' names; it includes the mask token
MAE_DECODER = re.compile(r"decoder[._].*")
# LayerScale of DINOv2 and CaiT -> the linear layer whose output it scales
SCALES = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}
SCALE = re.compile(r"(blocks\.\d+\.)(ls[12]\.gamma)")
# parts that a plain ViT does not have: pattern of the name -> why it cannot be used
REGISTERS = "register tokens, which every layer attends to: our model has no such tokens"
GATED = "a gated feed-forward (SwiGLU): our model's is two linear layers with an activation between them"
FOREIGN_PARTS = (
    (re.compile(r"register_tokens|reg_token"), REGISTERS),
    (re.compile(r".*\.\d+\.mlp\.(?:w12|w3|weights_in|weights_out|gate_proj|up_proj)\..*"), GATED),
)


def vision_names(state: Mapping[str, torch.Tensor]) -> Found:
    """
    A ViT by timm's names, with queries, keys and values joined into one matrix, and LayerScale folded into the linear
    layers that it scales. Tensors of other modules keep their names.

    Raises:
        MissingWeightsError: there are parts that a plain ViT does not have; a LayerScale lacks its linear layer.
    """
    prefixes = ("vit.", "deit.", "dinov2.", "dinov2_with_registers.")
    found = _without_prefix(state, prefixes, ("embeddings.", "layers.", "encoder."))
    if any(name.startswith("embeddings.") for name in found):
        found = _timm_names(found)
    _refuse_foreign_parts(found)
    return _fold_scales(found)


def text_names(state: Mapping[str, torch.Tensor]) -> Found:
    """A BERT by transformers' names: "encoder.layer.0...", and for its language-model head "cls.predictions..."."""
    found = {}
    for name, value in _without_prefix(state, ("bert.",), ("embeddings.", "encoder.")).items():
        for old, new in OLD_NORM.items():
            name = name.replace(old, new)
        found[name] = value
    return found


def is_decoder(name: str, found: Found) -> bool:
    """Whether a name of `vision_names` belongs to MAE's decoder, as facebook's mask_token does if there is one."""
    if MAE_DECODER.fullmatch(name):
        return True
    return name == "mask_token" and any(MAE_DECODER.fullmatch(other) for other in found)


def decoder_names(found: Found) -> Found:
    """MAE's decoder among `vision_names`, by facebook's names without "decoder_": "embed.weight", "blocks.0..."."""
    part = {
        name.removeprefix("decoder.").removeprefix("decoder_"): value
        for name, value in found.items()
        if is_decoder(name, found)
    }
    return _timm_names(part)


def _without_prefix(state: Mapping[str, torch.Tensor], prefixes: tuple[str, ...], of: tuple[str, ...]) -> Found:
    """Removes the prefix that transformers' task models put before the names of their tower."""
    for prefix in prefixes:
        if any(name.startswith(prefix + first) for name in state for first in of):
            return {name.removeprefix(prefix): (name, tensor) for name, tensor in state.items()}
    return {name: (name, tensor) for name, tensor in state.items()}


def _refuse_foreign_parts(found: Found) -> None:
    for pattern, why in FOREIGN_PARTS:
        if names := [official for name, (official, _) in found.items() if pattern.fullmatch(name)]:
            raise MissingWeightsError(f"{names[:3]} belong to {why}; expected a plain ViT")

    # timm names a gated feed-forward like a plain one: half of the first layer's outputs are the gate
    into, out = found.get("blocks.0.mlp.fc1.weight"), found.get("blocks.0.mlp.fc2.weight")
    if into is not None and out is not None and len(into[1]) == 2 * out[1].shape[-1]:
        raise MissingWeightsError(f"{[into[0], out[0]]} belong to {GATED}; expected a plain ViT")


def _fold_scales(found: Found) -> Found:
    """Folds LayerScale g (D,) into its linear layer: x + g * (W y + b) = x + (g * W) y + g * b."""
    found = dict(found)
    for name in list(found):
        match = SCALE.fullmatch(name)
        if match is None:
            continue
        official, scale = found.pop(name)
        for part in ("weight", "bias"):
            scaled = f"{match[1]}{SCALES[match[2]]}.{part}"
            if scaled not in found:
                raise MissingWeightsError(f"{official} scales {scaled}, which is not in the checkpoint")
            theirs, tensor = found[scaled]
            factor = scale[:, None] if tensor.ndim == 2 else scale  # (D, 1) or (D,)
            found[scaled] = (f"{theirs} + {official}", factor * tensor)
    return found


def what_was_joined(official: str) -> str | None:
    """How tensors, named with " + " between them, were joined into one; None for a single name."""
    if " + " not in official:
        return None
    if official.endswith(("gamma", "lambda1")):
        return "LayerScale folded into its linear layer"
    return "queries, keys and values joined into one matrix"


def _timm_names(shorn: Found) -> Found:
    """Translates transformers' names to timm's, and joins queries, keys and values into one matrix."""
    shorn = dict(shorn)
    for name in list(shorn):
        match = QUERIES.fullmatch(name)
        if match is None:
            continue

        # all three, spelled like the query
        spelling = next(spelling for spelling in SPELLINGS if f"{spelling[0]}." in name)
        parts = [shorn.get(f"{match[1]}{part}.{match[2]}") for part in spelling]
        if any(part is None for part in parts):
            raise MissingWeightsError(f"{name} has no keys and values beside it; expected all three")

        # replaced by one matrix (3D, D), or a bias (3D,)
        for part in spelling:
            shorn.pop(f"{match[1]}{part}.{match[2]}")
        joined = " + ".join(official for official, _ in parts)
        shorn[f"{match[1]}qkv.{match[2]}"] = (joined, torch.cat([tensor for _, tensor in parts]))
    return {TRANSFORMERS_VIT(name) or name: value for name, value in shorn.items()}


__all__ = ["Found", "decoder_names", "is_decoder", "text_names", "vision_names", "what_was_joined"]
