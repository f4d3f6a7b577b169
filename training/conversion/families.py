"""What every family's towers, and its authors' checkpoints, are called. A new family adds its line to each table.

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
    Where a published ViT and a published BERT go in a family's tower, names beneath its `base_model_prefix`.

    Attributes:
        vision: timm's name of a ViT's part -> ours.
        text: transformers' name of a BERT's part -> ours.
        vision_in, text_in: What ours begin with: of these, what a file does not fill is reported.
        vision_fields: What a ViT tells -> fields of the configuration, None for what it does not tell.
        text_fields: The same of a BERT, and of the fields that are given.
        begins_anew: Parts of ours among these that no such file has.
        left: What begins a foreign name -> why the family has no place for it.
        cls_word: Where an image's [CLS] is a word: configuration and cls_token (1, 1, D) -> its row (D,).
        fixed_positions: Where positions are not learned: configuration and side of the grid -> (N, D).
        mae_decoder: What a decoder in MAE's form is called beside the tower, where a family has one.
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
    """All layers of a BERT read a text."""
    return {"num_text_layers": layers}


def two_halves(layers: int, given: Mapping[str, Any]) -> dict[str, int]:
    """The upper half of a BERT reads images, or as many of its layers as the fields that are given leave to it."""
    text = given.get("num_text_layers", layers - given.get("num_fusion_layers", (layers + 1) // 2))
    return {"num_text_layers": text, "num_fusion_layers": layers - text}


def dual_towers(depth: Callable[[int, Mapping[str, Any]], dict[str, int]]) -> TowerNames:
    """Of every family with a ViT below and a BERT above it. `depth`: its layers, fields given -> fields of depth."""
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
    """MAE's 2-D table, (side², D)."""
    ticks = torch.arange(side, dtype=torch.float64)
    return sincos_2d(ticks, ticks, config.hidden_size).float()


def word_of_cls(config: PreTrainedConfig, cls_token: torch.Tensor) -> torch.Tensor:
    # (1, 1, D) -> (D,); divided, since the tower multiplies its words by the same root
    return cls_token.flatten() / (math.sqrt(config.hidden_size) if config.scale_word_embeddings else 1.0)


ONE_TOWER = "the one tower is a ViT's"


def one_tower(mae_decoder: str | None = None) -> TowerNames:
    """Of every family whose one tower reads images and texts."""
    return TowerNames(
        # [CLS] is a word, positions are sines, and masked patches have a token of our own or none
        vision=tuple((left, right) for left, right in VISION if left not in ("cls_token", "pos_embed", "mask_token")),
        # the one tower is filled from the ViT: of a BERT only the words fit
        text=(("embeddings.word_embeddings", "embeddings.word_embeddings"),),
        vision_in="",
        text_in="embeddings.word_embeddings",
        vision_fields=vit_fields,
        text_fields=lambda shape, given: {"hidden_size": shape.width, "vocab_size": shape.words},
        left={
            "encoder.layer.": ONE_TOWER,
            "embeddings.position_embeddings": "positions of words are fixed sines here",
            "embeddings.LayerNorm": "words are not normalised before the tower here",
            "mask_token": "a masked patch is another token here",
        },
        cls_word=word_of_cls,
        fixed_positions=sines,
        mae_decoder=mae_decoder,
    )


# published towers -> ours, by family
TOWERS = {
    "codis": dual_towers(two_halves),
    "momo": one_tower(mae_decoder="image_decoder"),
    "oner": one_tower(),
    "simla": dual_towers(one_stack),
}


@dataclass(frozen=True)
class OfficialFamily:
    """
    How a family's authors' checkpoints are read and written: those of SIMLA's and ALBEF's form.

    Attributes:
        config: The family's configuration class.
        retrieval, pretraining, answers, entailment, reasoning, assignment: Its classes.
        pretraining_heads: What begins the names of heads that pretraining alone has.
        heads: Official name -> ours, of what stands on the towers.
        depth: Layers of the text encoder, and the first of them with cross-attention -> fields of the configuration.
        token_types: Whether the authors' text encoder has token types in every model; in those of two images it has.
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
        """What the tower is called."""
        return self.retrieval.base_model_prefix

    def names(self, bert: str = "bert.", stack: int = 0) -> Names:
        """Official names -> ours, see `official_names`."""
        return official_names(self.prefix, self.heads, bert, stack)


def all_fuse(layers: int, first_fusion: int) -> dict[str, Any]:
    """Each layer reads a text alone or with an image."""
    return {"num_text_layers": layers}


def upper_fuse(layers: int, first_fusion: int) -> dict[str, Any]:
    """The lower layers read a text, the upper ones an image too; and there is no codebook (ALBEF)."""
    return {"num_text_layers": first_fusion, "num_fusion_layers": layers - first_fusion, "num_codes": 0}


# authors' checkpoints -> ours, by family
OFFICIAL = {
    # of CODIS there are none: these are ALBEF's, which is CODIS without its codebook
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
        # a file with one of these is of pretraining
        pretraining_heads=("text_encoder.cls.", "mim_head.", "concept_head."),
        heads=(
            ("vision_proj", "simla.vision_projection"),
            ("text_proj", "simla.text_projection"),
            ("temp", "temperature"),
            ("itm_head", "itm_head"),
            ("mim_head", "mim_head"),
            ("concept_head", "concept_head"),
            ("ta_head", "assignment_head"),
            # two linear maps with an activation, which has no weights, between them
            ("cls_head.0", "classifier.0"),
            ("cls_head.2", "classifier.2"),
        ),
        depth=all_fuse,
    ),
}


def family_of(model_type: str, table: Mapping[str, Any], what: str) -> Any:
    """A family's line of a table. Raises `ValueError` that names those there are."""
    if model_type not in table:
        raise ValueError(f"family {model_type!r} has no {what}; expected one of {', '.join(sorted(table))}")
    return table[model_type]


__all__ = ["OFFICIAL", "TOWERS", "OfficialFamily", "TowerNames", "dual_towers", "family_of", "one_stack", "two_halves"]
