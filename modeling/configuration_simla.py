"""Configuration of SIMLA. Choices that the paper leaves open, or that its code makes differently, are fields."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from .vl_dual_configuration import DualEncoderConfig

# base is the paper's; tiny and small are DeiT's widths, nano is for images of 64 pixels and two CPU cores
SIMLA_SIZES = {
    "nano": {
        "hidden_size": 192, "num_hidden_layers": 4, "num_text_layers": 2, "num_attention_heads": 4, "image_size": 64,
    },
    "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_text_layers": 12, "num_attention_heads": 3},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_text_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_text_layers": 12, "num_attention_heads": 12},
}  # fmt: skip


@strict
class SimlaConfig(DualEncoderConfig):
    r"""
    Configuration of a [`SimlaModel`]. The defaults are the paper's: ViT-B/16, and BERT-base with cross-attention in
    each layer above it (section 2.5), 223.10 M parameters.

    In masked image modelling, image tokens get the text encoder's positions (SIMLA's code), so the image must have
    fewer patches than `max_position_embeddings` (512 suffices for 256 pixels, but not for the 384 of fine-tuning,
    which masks no images).

    Args:
        num_visual_codes (`int`): Codes of the image tokenizer (section 2.3: 8192).
        concept_input (`"projected"` or `"cls"`): Input of the concept head: the unit embedding in the contrastive
            space (code, and the count of 238.26 M weights), or the image's [CLS] state (section 2.4).
        mim_context (`"embeddings"` or `"states"`): What a masked image attends to: the text's embeddings, the same at
            every layer (code), or the text encoder's states. The paper says "the caption as context".
        kwargs: Arguments of [`DualEncoderConfig`].
    """

    model_type = "simla"
    sizes: ClassVar[dict[str, dict[str, int]]] = SIMLA_SIZES
    counts: ClassVar[tuple[str, ...]] = (*DualEncoderConfig.counts, "num_visual_codes")

    num_visual_codes: int = 8192
    concept_input: Literal["projected", "cls"] = "projected"
    mim_context: Literal["embeddings", "states"] = "embeddings"


__all__ = ["SIMLA_SIZES", "SimlaConfig"]
