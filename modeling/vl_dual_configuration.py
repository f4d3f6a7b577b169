"""Base configuration of families with a ViT for images and a BERT for texts: SIMLA, CODIS, ALBEF."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from .vl_configuration import VisionLanguageConfig


@strict
class DualEncoderConfig(VisionLanguageConfig):
    r"""
    The defaults are ALBEF's: ViT-B/16 and BERT-base. Each family defines how many layers read a text and which of them
    also read an image.

    Args:
        vocab_size (`int`): BERT's uncased vocabulary by default.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps,
        attention_dropout: The visual encoder, a pre-norm ViT. `intermediate_size=None` means `4 * hidden_size`.
        num_text_layers, text_attention_heads, text_intermediate_size, text_layer_norm_eps, text_attention_dropout,
        hidden_dropout: The text and multimodal encoder, a post-norm BERT of the same width and activation. None gives
            as many heads as the visual encoder, and an intermediate size of `4 * hidden_size`.
        max_position_embeddings (`int`): Learned positions of the text encoder.
        max_text_length (`int`): Maximum text length in tokens, without [CLS] (ALBEF's code: 25 with it).
        image_size, patch_size, num_channels (`int`): Images are square, with sides of `image_size` pixels.
        stem (`"linear"` or `"conv"`): ViT's patch projection, or early convolutions, which learn faster from few pairs
            (Xiao et al., 2021; not used in these papers).
        position_image_size (`int`, *optional*): Image size of the learned table of positions, which is interpolated
            from there to `image_size` (bicubic, as in ALBEF). Defaults to `image_size`.
        initializer_range (`float`): Standard deviation of weights, embeddings and tokens (ViT, BERT: 0.02).
        projection_dim (`int`): Width of the contrastive space.
        temperature (`float`): Initial value of the learnable temperature (ALBEF's code: 0.07).
        temperature_range (`tuple[float, float]`): The temperature is clamped to this range before each step (ALBEF's
            code: 0.001, 0.5).
        grounding_layer (`int`): Cross-attention layer for Grad-CAM, from 0 (ALBEF: 8). If the model has fewer layers,
            the last one.
        answer_decoder_layers (`int`): Layers of the decoder that generates answers (ALBEF's code: 6).
        pad_token_id, image_token_id, cls_token_id, sep_token_id, mask_token_id (`int`): Ids in BERT's vocabulary; the
            image placeholder is `[unused0]`. [SEP] ends answers only: a text is [CLS] and its tokens (ALBEF's code).
            `sep_token_id` is None for a vocabulary without [SEP].
    """

    attribute_map = {"d_model": "hidden_size"}
    # text and image of a pair are separate inputs
    pair_layout = "separate"
    special_ids = ("pad_token_id", "image_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    # layers above the text-only ones; without them, the text layers read images themselves
    num_fusion_layers = 0
    # name -> fields of a named size; each family defines its own
    sizes: ClassVar[dict[str, dict[str, int]]] = {}
    # fields that must be at least 1
    counts: ClassVar[tuple[str, ...]] = ("num_hidden_layers", "num_text_layers", "max_text_length")

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float | int = 1e-6
    attention_dropout: float | int = 0.0
    num_text_layers: int = 12
    text_attention_heads: int | None = None
    text_intermediate_size: int | None = None
    text_layer_norm_eps: float | int = 1e-12
    text_attention_dropout: float | int = 0.1
    hidden_dropout: float | int = 0.1
    max_position_embeddings: int = 512
    max_text_length: int = 24
    image_size: int = 256
    patch_size: int = 16
    num_channels: int = 3
    stem: Literal["linear", "conv"] = "linear"
    position_image_size: int | None = None
    initializer_range: float | int = 0.02
    projection_dim: int = 256
    temperature: float | int = 0.07
    temperature_range: tuple[float, float] | list[float] = (0.001, 0.5)
    grounding_layer: int = 8
    answer_decoder_layers: int = 6
    pad_token_id: int | None = 0
    image_token_id: int = 1
    cls_token_id: int = 101
    sep_token_id: int | None = 102
    mask_token_id: int = 103
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        for name in ("intermediate_size", "text_intermediate_size"):
            if getattr(self, name) is None:
                setattr(self, name, 4 * self.hidden_size)
        if self.text_attention_heads is None:
            self.text_attention_heads = self.num_attention_heads
        if self.position_image_size is None:
            self.position_image_size = self.image_size

        # JSON turns the tuple into a list
        self.temperature_range = tuple(self.temperature_range)
        super().__post_init__(**kwargs)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def validate_architecture(self):
        """Raises `ValueError` with the names of fields that are inconsistent."""
        # both towers
        for name in ("num_attention_heads", "text_attention_heads"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) must be a multiple of {name} ({getattr(self, name)})"
                )

        # images and their stem
        for name in ("image_size", "position_image_size"):
            if getattr(self, name) % self.patch_size:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be a multiple of patch_size ({self.patch_size})"
                )
        stages = self.patch_size.bit_length() - 1
        if self.stem == "conv" and (self.patch_size != 2**stages or self.hidden_size % 2 ** max(0, stages - 1)):
            raise ValueError(
                f"a convolutional stem needs a patch_size that is a power of two and a hidden_size divisible by half "
                f"of it, got {self.patch_size} and {self.hidden_size}"
            )

        # depth, lengths, the temperature's range
        for name in self.counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_position_embeddings < 1 + self.max_text_length:
            raise ValueError(
                f"max_position_embeddings is {self.max_position_embeddings}; expected at least "
                f"{1 + self.max_text_length}: [CLS] and {self.max_text_length} tokens (max_text_length)"
            )
        low, high = self.temperature_range
        if not 0 < low <= self.temperature <= high:
            raise ValueError(f"temperature is {self.temperature}; expected it within {(low, high)}, both above 0")
        self._check_special_ids()

    @classmethod
    def from_size(cls, size: str, **overrides) -> "DualEncoderConfig":
        """The configuration of a named size (`sizes`), with any field overridden. Raises `ValueError`."""
        if size not in cls.sizes:
            raise ValueError(f"unknown size {size!r}; expected one of {', '.join(cls.sizes)}")
        return cls(**{**cls.sizes[size], **overrides})


__all__ = ["DualEncoderConfig"]
