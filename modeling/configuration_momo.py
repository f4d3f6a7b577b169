"""Configuration of MoMo. Each choice that the paper leaves open is a field, with its source."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from .vl_configuration import VisionLanguageConfig

# name -> (hidden_size, layers, heads, decoder_hidden_size, decoder layers, decoder heads). base and large are the
# paper's, tiny and small have DeiT's widths, nano is for 64-pixel images and two CPU cores
MOMO_SIZES = {
    "nano": (192, 4, 3, 96, 2, 3),
    "tiny": (192, 12, 3, 128, 4, 4),
    "small": (384, 12, 6, 256, 8, 8),
    "base": (768, 12, 12, 512, 8, 16),
    "large": (1024, 24, 16, 512, 8, 16),
}
DECODERS = ("image", "text", "pair")


@strict
class MomoConfig(VisionLanguageConfig):
    r"""
    Configuration of a [`MomoModel`]. The defaults are the paper's base model: MAE's ViT-B/16 encodes images, texts and
    pairs, and decoders of 8 layers and width 512 reconstruct the masked positions (section 3.3).

    Args:
        vocab_size (`int`): BERT's uncased vocabulary, which gives the paper's 110 and 335 M parameters (Table 1).
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps: The
            encoder, pre-norm (MAE). `intermediate_size=None` means `4 * hidden_size`.
        attention_dropout (`float`): Dropout of the encoder's attention weights.
        image_size, patch_size, num_channels (`int`): Images are square, with sides of `image_size` pixels.
        position_image_size (`int`, *optional*): Image size for which the 2-D table is defined; the table is
            interpolated from there to `image_size`. Defaults to `image_size`.
        position_interpolation (`"bicubic"` or `"recompute"`): Interpolate the table bicubically as in MAE, or
            recompute the sines at the new patch centres in the old grid's coordinates.
        max_text_length (`int`): Maximum text length in tokens, without [CLS]: 512 as in FLAVA; the paper does not say.
        scale_word_embeddings (`bool`): Multiply word embeddings by sqrt(D) before the fixed sines are added (Vaswani
            et al., 2017, section 3.4). The paper does not say; off by default.
        initializer_range (`float`): Standard deviation of word and mask embeddings (MAE, BERT: 0.02).
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads (`int`): Size of each decoder
            (section 3.3; the number of heads is MAE's).
        decoders (`list[str]`): Which decoders to build, of `image`, `text`, `pair` (section 3.3). A stage needs those
            of its losses.
        pair_decoder (`"joint"` or `"separate"`): One decoder over [CLS], patches and words of a pair, or one per
            modality, over its tokens alone ("separate decoders for different modalities", section 4.2). Figure 3's box
            of stage 3 does not say.
        shared_decoder (`bool`): One decoder for images, texts and pairs (Table 6, "Shared decoder?").
        save_decoders (`bool`): Whether saved weights hold the decoders, which [`MomoForMaskedLM`] needs. The paper
            discards them after each stage; checkpoints of a run hold them in any case.
        projection_dim (`int`): Width of the contrastive space (FLAVA: 768; the paper does not say).
        temperature (`float`): Initial value of the learnable contrastive temperature (CLIP, FLAVA: 0.07).
        temperature_range (`tuple[float, float]`): The temperature is clamped to this range before each step (FLAVA's
            code clamps the logarithm of its inverse to [0, 4.6052]).
        pad_token_id, image_token_id, cls_token_id, mask_token_id (`int`): Ids in BERT's vocabulary; the image
            placeholder is `[unused0]`.
    """

    model_type = "momo"
    attribute_map = {"d_model": "hidden_size"}
    # a pair is one sequence of ids, with one placeholder per patch
    pair_layout = "joint"
    # with overlapping convolutions, visible patches would see the pixels of masked ones
    stem = "linear"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float | int = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    position_image_size: int | None = None
    position_interpolation: Literal["bicubic", "recompute"] = "bicubic"
    max_text_length: int = 512
    scale_word_embeddings: bool = False
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoders: list[str] | tuple[str, ...] = DECODERS
    pair_decoder: Literal["joint", "separate"] = "joint"
    shared_decoder: bool = False
    save_decoders: bool = False
    projection_dim: int = 768
    temperature: float | int = 0.07
    temperature_range: tuple[float, float] | list[float] = (0.01, 1.0)
    pad_token_id: int | None = 0
    image_token_id: int = 1
    cls_token_id: int = 101
    mask_token_id: int = 103
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.position_image_size is None:
            self.position_image_size = self.image_size

        # JSON turns both into lists
        self.decoders = list(self.decoders)
        self.temperature_range = tuple(self.temperature_range)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raises `ValueError` with the names of fields that are inconsistent."""
        # encoder and decoders
        for prefix in ("", "decoder_"):
            width = getattr(self, f"{prefix}hidden_size")
            heads = getattr(self, f"{prefix}num_attention_heads")
            if width % heads:
                raise ValueError(
                    f"{prefix}hidden_size ({width}) must be a multiple of {prefix}num_attention_heads ({heads})"
                )
            if width % 4:
                raise ValueError(f"{prefix}hidden_size must be a multiple of 4 for 2-D sines, got {width}")
        if len(set(self.decoders)) < len(self.decoders) or set(self.decoders) - set(DECODERS):
            raise ValueError(f"decoders are {list(self.decoders)}; expected any of {list(DECODERS)}, each once")

        # images, depth, lengths, the temperature's range
        for name in ("image_size", "position_image_size"):
            if getattr(self, name) % self.patch_size:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be a multiple of patch_size ({self.patch_size})"
                )
        for name in ("num_hidden_layers", "decoder_num_hidden_layers", "max_text_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        low, high = self.temperature_range
        if not 0 < low <= self.temperature <= high:
            raise ValueError(f"temperature is {self.temperature}; expected it within {(low, high)}, both above 0")
        self._check_special_ids()

    @classmethod
    def from_size(cls, size: str, **overrides) -> "MomoConfig":
        """The configuration of a named size (`MOMO_SIZES`), with any field overridden. Raises `ValueError`."""
        if size not in MOMO_SIZES:
            raise ValueError(f"unknown size {size!r}; expected one of {', '.join(MOMO_SIZES)}")
        names = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "decoder_hidden_size",
            "decoder_num_hidden_layers",
            "decoder_num_attention_heads",
        )
        fields = dict(zip(names, MOMO_SIZES[size], strict=True))
        if size == "nano":
            fields |= {"image_size": 64, "projection_dim": 256}
        return cls(**{**fields, **overrides})


__all__ = ["DECODERS", "MOMO_SIZES", "MomoConfig"]
