"""Configuration of CODIS, and of ALBEF (CODIS without its codebook). Choices that the paper leaves open are fields."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from .vl_dual_configuration import DualEncoderConfig

# base is the paper's; tiny and small are DeiT's widths, nano is for images of 64 pixels and two CPU cores
CODIS_SIZES = {
    "nano": {
        "hidden_size": 192, "num_hidden_layers": 4, "num_text_layers": 2, "num_fusion_layers": 2,
        "num_attention_heads": 4, "image_size": 64, "num_codes": 128,
    },
    "tiny": {"hidden_size": 192, "num_attention_heads": 3},
    "small": {"hidden_size": 384, "num_attention_heads": 6},
    "base": {},
}  # fmt: skip


@strict
class CodisConfig(DualEncoderConfig):
    r"""
    Configuration of a [`CodisModel`]. The defaults are the paper's (Duan et al., 2022, sections 3, 4.2.1): ViT-B/16,
    BERT-base, whose lower six layers read the text alone and whose upper six also read its image (123.7 M parameters
    with the masked-token head), and a codebook of 4,000 columns of width 256. `num_codes=0` gives ALBEF.

    Args:
        num_text_layers (`int`): Number of layers that read a text alone.
        num_fusion_layers (`int`): Number of layers above them that also read an image, by cross-attention.
        num_codes (`int`): K, the number of columns of the codebook C (section 3.2: 4,000). 0: no codebook.
        code_norm (`"forward"` or `"step"`): Normalise the codes to unit length in each forward pass, or after each
            optimiser step (SwAV). Equation 1 is a cosine and does not say which.
        kwargs: Arguments of [`DualEncoderConfig`].
    """

    model_type = "codis"
    sizes: ClassVar[dict[str, dict[str, int]]] = CODIS_SIZES
    counts: ClassVar[tuple[str, ...]] = (*DualEncoderConfig.counts, "num_fusion_layers")

    num_text_layers: int = 6
    num_fusion_layers: int = 6
    num_codes: int = 4000
    code_norm: Literal["forward", "step"] = "forward"

    def validate_architecture(self):
        super().validate_architecture()
        if self.num_codes < 0:
            raise ValueError(f"num_codes must be at least 0, which is no codebook; got {self.num_codes}")


__all__ = ["CODIS_SIZES", "CodisConfig"]
