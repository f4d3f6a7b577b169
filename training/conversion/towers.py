"""A model that begins with a published ViT or DeiT below and a published BERT above, as the paper's does.

D width, N patches. Names are those of timm's and DeiT's files, or of transformers', before and since its version 5.
"""

import math
import os
import re
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from .checkpoints import resize_position_table
from .names import BERT, LANGUAGE_HEAD, VISION, Names
from .reading import read_weights
from .report import ConversionReport, MissingWeightsError

# transformers' ViT and DeiT -> timm's; queries, keys and values are joined before
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
QUERIES = re.compile(r"((?:encoder\.layer|layers)\.\d+\.attention\.)(?:attention\.query|q_proj)\.(weight|bias)")
SPELLINGS = (("attention.query", "attention.key", "attention.value"), ("q_proj", "k_proj", "v_proj"))
# BERT's first checkpoints call a norm's weight and bias so
OLD_NORM = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
DRAWN = "as the model drew it"
VISION_TOWER, TEXT_TOWER = "simla.vision.", "simla.text."
WHOLE_TOWER = re.compile(r"^(blocks|encoder\.layer|layers)\.\d+\.")

Source = str | os.PathLike | Mapping[str, torch.Tensor]


def initialise(
    model: PreTrainedModel,
    vision: Source | None = None,
    text: Source | None = None,
    fold_token_types: bool = False,
) -> ConversionReport:
    """
    Fills the towers of a SIMLA model in place, and says what it used and what it left.

    The visual encoder takes a ViT or DeiT whose position table may be of another picture size. The text encoder takes
    a BERT of the same vocabulary; its cross-attention stays as the model drew it, and so do the heads but for that of
    words, if the file has one.

    Args:
        model: With `simla` in it, on the CPU.
        vision, text: A path or a name on the Hub for `read_weights`, or a state dict.
        fold_token_types: Add BERT's first token type to every position, which makes texts come out as BERT has them;
            SIMLA's code drops it.

    Raises:
        ValueError: a model without two towers.
        MissingWeightsError: names weights of a tower that are missing, of another shape, or that a plain ViT or BERT
            does not have (layer scale, say), without which the tower would compute something else.
        CheckpointFileError: what cannot be read.
    """
    if not hasattr(model, "simla"):
        raise ValueError(
            f"{type(model).__name__} has no encoder for pictures and another for texts; expected a SIMLA model, for "
            f"which a ViT and a BERT are made"
        )
    report = ConversionReport()
    if vision is not None:
        report.merge(_fill_vision(model, _weights(vision)))
    if text is not None:
        report.merge(_fill_text(model, _weights(text), fold_token_types))
    return report


def _weights(source: Source) -> dict[str, torch.Tensor]:
    return dict(source) if isinstance(source, Mapping) else read_weights(source)


def _without_prefix(state: Mapping[str, torch.Tensor], prefixes: tuple[str, ...], of: tuple[str, ...]) -> dict:
    """Names shorn of what transformers' task models put before their tower's. -> shorn name: (name, tensor)."""
    for prefix in prefixes:
        if any(name.startswith(prefix + first) for name in state for first in of):
            return {name.removeprefix(prefix): (name, tensor) for name, tensor in state.items()}
    return {name: (name, tensor) for name, tensor in state.items()}


def _fill_vision(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> ConversionReport:
    report = ConversionReport()
    shorn = _without_prefix(state, ("vit.", "deit."), ("embeddings.", "layers.", "encoder."))
    timm = _timm_names(shorn) if any(name.startswith("embeddings.") for name in shorn) else shorn
    names, found = Names(VISION), {}
    for name, (official, tensor) in timm.items():
        ours = names(name)
        if name == "pos_embed":
            tensor, what = _position_table(tensor, model.config.position_image_size // model.config.patch_size)
            if what:
                report.changed[official] = what
        if ours is None:
            report.left_over[official] = "no part of a visual encoder's tokens and layers"
            continue
        for part in official.split(" + "):
            report.used[part] = VISION_TOWER + ours
        if " + " in official:
            report.changed |= dict.fromkeys(official.split(" + "), "queries, keys and values as one matrix")
        found[VISION_TOWER + ours] = tensor
    _fill(model, found, report, VISION_TOWER, ("embeddings.mask_token",))
    return report


def _timm_names(shorn: dict[str, tuple[str, torch.Tensor]]) -> dict[str, tuple[str, torch.Tensor]]:
    """transformers' names as timm's, with queries, keys and values as one matrix, whose name here is their sum."""
    shorn = dict(shorn)
    for name in list(shorn):
        match = QUERIES.fullmatch(name)
        if match is None:
            continue
        spelling = next(spelling for spelling in SPELLINGS if f"{spelling[0]}." in name)
        parts = [shorn.get(f"{match[1]}{part}.{match[2]}") for part in spelling]
        if any(part is None for part in parts):
            raise MissingWeightsError(f"beside {name} there are no keys and values; expected all three")
        for part in spelling:
            shorn.pop(f"{match[1]}{part}.{match[2]}")
        joined = " + ".join(official for official, _ in parts)
        shorn[f"{match[1]}qkv.{match[2]}"] = (joined, torch.cat([tensor for _, tensor in parts]))
    return {TRANSFORMERS_VIT(name) or name: value for name, value in shorn.items()}


def _position_table(table: torch.Tensor, side: int) -> tuple[torch.Tensor, str | None]:
    """
    (1, k + n*n, D) -> (1, 1 + side², D), and what was done to it. k is 1 for [CLS], 2 with a token of distillation
    after it, which has no place here, 0 in tables of patches alone.
    """
    places, done = table.shape[1], []
    own = math.isqrt(places)
    extra = places - own**2
    if extra == 0:
        table, extra = torch.cat([table.new_zeros(1, 1, table.shape[2]), table], dim=1), 1
        done.append("zeros for [CLS], of which the table says nothing")
    elif extra == 2:
        table = torch.cat([table[:, :1], table[:, 2:]], dim=1)
        done.append("the distillation token's row was dropped")
    elif extra != 1:
        raise MissingWeightsError(f"a table of {places} positions is not [CLS] and a square of patches")
    if own != side:
        table = resize_position_table(table, side)
        done.append(f"{own} x {own} places to {side} x {side}, bicubic")
    return table, "; ".join(done) or None


def _fill_text(model: PreTrainedModel, state: Mapping[str, torch.Tensor], fold_token_types: bool) -> ConversionReport:
    report = ConversionReport()
    shorn = _without_prefix(state, ("bert.",), ("embeddings.", "encoder."))
    names, head, found = Names(BERT), Names((f"cls.{left}", right) for left, right in LANGUAGE_HEAD), {}
    mine = model.state_dict()
    for name, (official, tensor) in shorn.items():
        for old, new in OLD_NORM.items():
            name = name.replace(old, new)
        if name == "cls.predictions.bias":
            ours = "lm_head.decoder.bias"
        elif (tower := names(name)) is not None:
            ours = TEXT_TOWER + tower
        else:
            ours = None if (part := head(name)) is None else f"lm_head.{part}"
        if ours is None or (ours.startswith("lm_head.") and ours not in mine):
            report.left_over[official] = _why_not_text(name)
            continue
        found[ours] = tensor
        report.used[official] = ours
    _fit_positions(model, shorn, found, report, fold_token_types)
    _fill(model, found, report, TEXT_TOWER, ("cross_attention.", "cross_norm."))
    head_names = (name for name in mine if name.startswith("lm_head.") and name != "lm_head.decoder.weight")
    report.missing |= {name: DRAWN for name in head_names if name not in found}
    return report


def _why_not_text(name: str) -> str:
    if name.endswith("token_type_embeddings.weight"):
        return "SIMLA has no token types (SIMLA's code drops them; fold_token_types keeps what they did)"
    if name.endswith("position_ids"):
        return "a buffer that counts; nothing here needs it"
    return "this model has no such part"


def _fit_positions(
    model: PreTrainedModel, shorn: dict, found: dict, report: ConversionReport, fold_token_types: bool
) -> None:
    """Token types into the table of positions if asked for, and its first rows only where the model has fewer."""
    ours = f"{TEXT_TOWER}embeddings.position_embeddings.weight"
    if ours not in found:
        return
    types = shorn.get("embeddings.token_type_embeddings.weight")
    if fold_token_types and types is not None:
        found[ours] = found[ours] + types[1][0]
        report.left_over.pop(types[0])
        report.used[types[0]] = ours
        report.changed[types[0]] = "its first row was added to every position"
    rows = model.config.max_position_embeddings
    if len(found[ours]) > rows:
        report.changed[shorn["embeddings.position_embeddings.weight"][0]] = (
            f"the first {rows} of {len(found[ours])} rows"
        )
        found[ours] = found[ours][:rows]


@torch.no_grad()
def _fill(
    model: PreTrainedModel,
    found: dict[str, torch.Tensor],
    report: ConversionReport,
    tower: str,
    begins_anew: tuple[str, ...],
) -> None:
    """Copies into the model, after a look at all of it, so that an error leaves the model as it was."""
    mine = model.state_dict()
    foreign = [name for name in report.left_over if WHOLE_TOWER.match(re.sub(r"^(vit|deit|bert)\.", "", name))]
    foreign += [name for name in found if name.startswith(tower) and name not in mine]
    if foreign:
        raise MissingWeightsError(
            f"{len(foreign)} weights of layers have no place in the model: {foreign[:10]}; expected a plain ViT or "
            f"BERT of {model.config.num_hidden_layers} and {model.config.num_text_layers} layers"
        )
    missing = [name for name in mine if name.startswith(tower) and name not in found]
    lacking = [name for name in missing if not any(part in name for part in begins_anew)]
    if lacking:
        raise MissingWeightsError(f"{len(lacking)} weights are not in the checkpoint: {lacking[:10]}; expected all")
    wrong = {
        name: f"{tuple(tensor.shape)}, expected {tuple(mine[name].shape)}"
        for name, tensor in found.items()
        if tensor.shape != mine[name].shape
    }
    if wrong:
        raise MissingWeightsError(f"wrong shapes {dict(list(wrong.items())[:10])}: the checkpoint is of another model")
    for name, tensor in found.items():
        mine[name].copy_(tensor)
    report.missing |= dict.fromkeys(missing, DRAWN)


__all__ = ["initialise"]
