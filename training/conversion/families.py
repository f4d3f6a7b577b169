"""Weight names of each family's towers and of its authors' checkpoints. A new family adds an entry to each table.

D width, N patches.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from oner.modeling.configuration_codis import CodisConfig
from oner.modeling.configuration_simla import SimlaConfig
from oner.modeling.modeling_codis import (
    CodisForImageTextRetrieval,
    CodisForPreTraining,
    CodisForTextAssignment,
    CodisForVisualEntailment,
    CodisForVisualQuestionAnswering,
    CodisForVisualReasoning,
)
from oner.modeling.modeling_simla import SimlaForImageTextRetrieval
from oner.modeling.modeling_simla_pretraining import SimlaForPreTraining
from oner.modeling.modeling_simla_tasks import (
    SimlaForTextAssignment,
    SimlaForVisualEntailment,
    SimlaForVisualQuestionAnswering,
    SimlaForVisualReasoning,
)
from oner.modeling.vl_embeddings import sincos_2d

from .names import BERT, VISION, Names, official_names
from .shapes import TowerShape

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TowerNames:
    """
    Maps a published ViT and a published BERT to a family's tower. Our names are relative to its `base_model_prefix`.

    Attributes:
        vision: timm's name of a part of a ViT -> ours.
        text: transformers' name of a part of a BERT -> ours.
        vision_in, text_in: Prefixes of our names; weights with them that a file does not fill are reported.
        vision_fields: Sizes of a ViT -> configuration fields, None for those unknown.
        text_fields: Sizes of a BERT, and the fields already given -> configuration fields.
        begins_anew: Parts under these prefixes that no such file has.
        left: Prefix of a foreign name -> why the family does not use it.
        cls_word: If an image's [CLS] is a word: configuration and cls_token (1, 1, D) -> its row (D,).
        fixed_positions: If positions are not learned: configuration and side of the grid -> (N, D).
        mae_decoder: Name of the family's MAE decoder beside the tower, if it has one.
    """

    vision: Pairs
    text: Pairs
    vision_in: str
    text_in: str
    vision_fields: Callable[[TowerShape], dict[str, Any]]
    text_fields: Callable[[TowerShape, Mapping[str, Any]], dict[str, Any]]
    begins_anew: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    cls_word: Callable[[PreTrainedConfig, torch.Tensor], torch.Tensor] | None = None
    fixed_positions: Callable[[PreTrainedConfig, int], torch.Tensor] | None = None
    mae_decoder: str | None = None


def vit_fields(shape: TowerShape) -> dict[str, Any]:
    return {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.inner,
        "hidden_act": shape.activation,
        "layer_norm_eps": shape.eps,
        "patch_size": shape.patch,
        "num_channels": shape.channels,
    }


def bert_fields(shape: TowerShape, depth: Mapping[str, int]) -> dict[str, Any]:
    return {
        "hidden_size": shape.width,
        **depth,
        "text_attention_heads": shape.heads,
        "text_intermediate_size": shape.inner,
        "hidden_act": shape.activation,
        "text_layer_norm_eps": shape.eps,
        "vocab_size": shape.words,
        "max_position_embeddings": shape.positions,
    }


def one_stack(layers: int, given: Mapping[str, Any]) -> dict[str, int]:
    """All layers of a BERT become text layers."""
    return {"num_text_layers": layers}


def two_halves(layers: int, given: Mapping[str, Any]) -> dict[str, int]:
    """The upper half of a BERT becomes fusion layers, or as many layers as the given fields say."""
    text = given.get("num_text_layers", layers - given.get("num_fusion_layers", (layers + 1) // 2))
    return {"num_text_layers": text, "num_fusion_layers": layers - text}


def dual_towers(depth: Callable[[int, Mapping[str, Any]], dict[str, int]]) -> TowerNames:
    """Names for a family with a ViT and a BERT. `depth` maps BERT's layers and the given fields to depth fields."""
    return TowerNames(
        vision=tuple((left, f"vision.{right}") for left, right in VISION),
        text=tuple((left, f"text.{right}") for left, right in BERT),
        vision_in="vision.",
        text_in="text.",
        vision_fields=vit_fields,
        text_fields=lambda shape, given: bert_fields(shape, depth(shape.layers, given)),
        # neither a ViT nor a BERT has these
        begins_anew=("embeddings.mask_token", "cross_attention.", "cross_norm."),
    )


def sines(config: PreTrainedConfig, side: int) -> torch.Tensor:
    """MAE's 2-D sine-cosine table, (side², D)."""
    ticks = torch.arange(side, dtype=torch.float64)
    return sincos_2d(ticks, ticks, config.hidden_size).float()


def word_of_cls(config: PreTrainedConfig, cls_token: torch.Tensor) -> torch.Tensor:
    # (1, 1, D) -> (D,); divided because the tower multiplies its word embeddings by this root
    return cls_token.flatten() / (math.sqrt(config.hidden_size) if config.scale_word_embeddings else 1.0)


ONE_TOWER = "the single tower is initialised from the ViT"


def one_tower(mae_decoder: str | None = None) -> TowerNames:
    """Names for a family with one tower for images and texts."""
    return TowerNames(
        # [CLS] is a word, positions are fixed sines, and masked patches have our own token or none
        vision=tuple((left, right) for left, right in VISION if left not in ("cls_token", "pos_embed", "mask_token")),
        # the tower is filled from the ViT: only BERT's word embeddings fit
        text=(("embeddings.word_embeddings", "embeddings.word_embeddings"),),
        vision_in="",
        text_in="embeddings.word_embeddings",
        vision_fields=vit_fields,
        text_fields=lambda shape, given: {"hidden_size": shape.width, "vocab_size": shape.words},
        left={
            "encoder.layer.": ONE_TOWER,
            "embeddings.position_embeddings": "our word positions are fixed sines",
            "embeddings.LayerNorm": "our tower does not normalise word embeddings before its first layer",
            "mask_token": "our model has another token for masked patches",
        },
        cls_word=word_of_cls,
        fixed_positions=sines,
        mae_decoder=mae_decoder,
    )


# how each family's towers are filled from published ones
TOWERS = {
    "codis": dual_towers(two_halves),
    "momo": one_tower(mae_decoder="image_decoder"),
    "oner": one_tower(),
    "simla": dual_towers(one_stack),
}


@dataclass(frozen=True)
class OfficialFamily:
    """
    How to read and write the checkpoints of a family's authors, in the format of SIMLA and ALBEF.

    Attributes:
        config: The family's configuration class.
        retrieval, pretraining, answers, entailment, reasoning, assignment: Its model classes.
        pretraining_heads: Name prefixes of the heads that only pretraining has.
        heads: Official name -> ours, for the heads.
        depth: Number of text layers, and the first with cross-attention -> configuration fields.
        token_types: Whether the authors' text encoder always has token types; models of two images always have them.
    """

    config: type[PreTrainedConfig]
    retrieval: type[PreTrainedModel]
    pretraining: type[PreTrainedModel]
    answers: type[PreTrainedModel]
    entailment: type[PreTrainedModel]
    reasoning: type[PreTrainedModel]
    assignment: type[PreTrainedModel]
    pretraining_heads: tuple[str, ...]
    heads: Pairs
    depth: Callable[[int, int], dict[str, Any]]
    token_types: bool = False

    @property
    def prefix(self) -> str:
        """Name of the tower."""
        return self.retrieval.base_model_prefix

    def names(self, bert: str = "bert.", stack: int = 0) -> Names:
        """Maps official names to ours, see `official_names`."""
        return official_names(self.prefix, self.heads, bert, stack)


def all_fuse(layers: int, first_fusion: int) -> dict[str, Any]:
    """Every layer can read a text alone or with an image (SIMLA)."""
    return {"num_text_layers": layers}


def upper_fuse(layers: int, first_fusion: int) -> dict[str, Any]:
    """The lower layers read only text, the upper ones also the image; there is no codebook (ALBEF)."""
    return {"num_text_layers": first_fusion, "num_fusion_layers": layers - first_fusion, "num_codes": 0}


# how each family's official checkpoints are converted
OFFICIAL = {
    # CODIS has published none: these are ALBEF's, which is CODIS without its codebook
    "codis": OfficialFamily(
        config=CodisConfig,
        retrieval=CodisForImageTextRetrieval,
        pretraining=CodisForPreTraining,
        answers=CodisForVisualQuestionAnswering,
        entailment=CodisForVisualEntailment,
        reasoning=CodisForVisualReasoning,
        assignment=CodisForTextAssignment,
        pretraining_heads=("text_encoder.cls.",),
        heads=(
            ("vision_proj", "codis.vision_projection"),
            ("text_proj", "codis.text_projection"),
            ("temp", "temperature"),
            ("itm_head", "itm_head"),
            ("ta_head", "assignment_head"),
            ("cls_head.0", "classifier.0"),
            ("cls_head.2", "classifier.2"),
        ),
        depth=upper_fuse,
        token_types=True,
    ),
    "simla": OfficialFamily(
        config=SimlaConfig,
        retrieval=SimlaForImageTextRetrieval,
        pretraining=SimlaForPreTraining,
        answers=SimlaForVisualQuestionAnswering,
        entailment=SimlaForVisualEntailment,
        reasoning=SimlaForVisualReasoning,
        assignment=SimlaForTextAssignment,
        # a file with one of these is a pretraining checkpoint
        pretraining_heads=("text_encoder.cls.", "mim_head.", "concept_head."),
        heads=(
            ("vision_proj", "simla.vision_projection"),
            ("text_proj", "simla.text_projection"),
            ("temp", "temperature"),
            ("itm_head", "itm_head"),
            ("mim_head", "mim_head"),
            ("concept_head", "concept_head"),
            ("ta_head", "assignment_head"),
            # two linear layers; the activation between them has no weights
            ("cls_head.0", "classifier.0"),
            ("cls_head.2", "classifier.2"),
        ),
        depth=all_fuse,
    ),
}


def family_of(model_type: str, table: Mapping[str, Any], what: str) -> Any:
    """A family's entry in a table. Raises `ValueError` that lists the available families."""
    if model_type not in table:
        raise ValueError(f"family {model_type!r} has no {what}; expected one of {', '.join(sorted(table))}")
    return table[model_type]


__all__ = ["OFFICIAL", "TOWERS", "OfficialFamily", "TowerNames", "dual_towers", "family_of", "one_stack", "two_halves"]
