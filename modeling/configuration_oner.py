"""Configuration of OneR. Everything that the paper leaves open is a field, with its source."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from .vl_configuration import VisionLanguageConfig

# name -> (hidden_size, num_hidden_layers, num_attention_heads, projection_hidden_size, projection_dim).
# base, large and huge are MAE's encoders, tiny and small DeiT's; nano is for images of 64 pixels and two CPU cores.
ONER_SIZES = {
    "nano": (256, 4, 4, 1024, 256),
    "tiny": (192, 12, 3, 4096, 256),
    "small": (384, 12, 6, 4096, 256),
    "base": (768, 12, 12, 4096, 256),
    "large": (1024, 24, 16, 4096, 256),
    "huge": (1280, 32, 16, 4096, 256),
}


@strict
class OneRConfig(VisionLanguageConfig):
    r"""
    Configuration of a [`OneRModel`]. The defaults are the paper's base model: MAE's ViT-B/16, a convolutional stem,
    BERT's tokens, MoCo-v3's heads (appendix C).

    Args:
        vocab_size (`int`): Number of tokens; BERT's uncased vocabulary by default.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps:
            The pre-norm transformer layers (MAE). `intermediate_size=None` means `4 * hidden_size`.
        image_size, patch_size, num_channels (`int`): Images are square, with sides of `image_size` pixels.
        stem (`"conv"` or `"linear"`): Learnable ConvStem (appendix C; channels D/8, D/4, D/2, D as in MoCo-v3's code)
            or the plain patch projection of ViT.
        mask_before_stem (`bool`): Also zero the masked pixels before the stem. The stem's receptive field (31 pixels)
            exceeds a patch, so masking after it leaks the border of the masked patch. The paper does not say; off by
            default.
        position_image_size (`int`, *optional*): Image size for which the 2-D table is defined; the table is
            interpolated from there to `image_size` (appendix C, the 384 stage). Defaults to `image_size`.
        position_interpolation (`"bicubic"` or `"recompute"`): Bicubic as in MAE, or sines at the centres of the
            patches on the old grid.
        max_text_length (`int`): Maximum text length in tokens, without [CLS]. The paper does not say.
        scale_word_embeddings (`bool`): Multiply word embeddings by sqrt(D) before the fixed sines are added (Vaswani
            et al., 2017, section 3.4). The paper does not say; off by default.
        initializer_range (`float`): Standard deviation of word and mask embeddings (MAE, BERT: 0.02).
        pooling (`"cls"` or `"mean"`): F(X): the final [CLS] state ("[CLS] prepended", Fig. 1) or the mean over patches
            and tokens (appendix A, equation 16).
        projection_dim, projection_hidden_size, projector_layers, predictor_layers (`int`): MoCo-v3's heads, 3 and 2
            layers. `projector_layers=1` is a single linear layer, `predictor_layers=0` means no predictor.
        head_norm (`"batch"`, `"layer"` or `"none"`): Normalisation in the heads. Not in the paper; MoCo-v3: batch.
        head_statistics (`"shared"` or `"separate"`): Whether one head call processes all streams (one set of batch
            statistics) or each stream has its own. Separate statistics remove the mean modality gap in training and
            restore it at evaluation, so the default is shared.
        two_heads (`bool`): A projector and predictor for each modality: the paper's baseline "ITC (two heads)".
        mixup_space (`"hidden"`, `"projected"` or `"normalized"`): Where (F(I)+F(T))/2 is computed (equation 2): on
            hidden states, literally; on projector outputs; on their unit vectors.
        context_states (`"own"`, `"co_attention"` or `"last_layer"`): The keys and values that F(X|Y) attends to at
            each layer (equation 3): Y's own stream; the other crossed stream; Y's own stream, at the last layer only.
        context_cls (`bool`): Whether the context's [CLS] is among the keys of F(X|Y).
        temperature (`float`): InfoNCE temperature (MoCo-v3's ViT: 0.2).
        learnable_temperature (`bool`): CLIP's learnable scale instead, initialised from `temperature` and clamped to
            at most 100, as in CLIP.
        pad_token_id, image_token_id, cls_token_id, mask_token_id (`int`): Ids in BERT's vocabulary; the image
            placeholder is `[unused0]`.
    """

    model_type = "oner"
    attribute_map = {"d_model": "hidden_size"}
    # a pair is one sequence of ids, with a placeholder for each patch
    pair_layout = "joint"

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
    stem: Literal["conv", "linear"] = "conv"
    mask_before_stem: bool = False
    position_image_size: int | None = None
    position_interpolation: Literal["bicubic", "recompute"] = "bicubic"
    max_text_length: int = 64
    scale_word_embeddings: bool = False
    pooling: Literal["cls", "mean"] = "cls"
    projection_dim: int = 256
    projection_hidden_size: int = 4096
    projector_layers: int = 3
    predictor_layers: int = 2
    head_norm: Literal["batch", "layer", "none"] = "batch"
    head_statistics: Literal["shared", "separate"] = "shared"
    two_heads: bool = False
    mixup_space: Literal["hidden", "projected", "normalized"] = "hidden"
    context_states: Literal["own", "co_attention", "last_layer"] = "own"
    context_cls: bool = True
    temperature: float | int = 0.2
    learnable_temperature: bool = False
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
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raises `ValueError` with the names of fields that are inconsistent."""
        # the tower
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4 for 2-D sines, got {self.hidden_size}")

        # images and their stem
        for name in ("image_size", "position_image_size"):
            if getattr(self, name) % self.patch_size:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be a multiple of patch_size ({self.patch_size})"
                )
        if self.stem == "conv":
            stages = self.patch_size.bit_length() - 1
            if self.patch_size != 2**stages or self.patch_size < 2:
                raise ValueError(
                    f"a convolutional stem needs a patch_size that is a power of two, got {self.patch_size}"
                )
            if self.hidden_size % 2 ** (stages - 1):
                raise ValueError(
                    f"a convolutional stem of {stages} stages needs hidden_size divisible by {2 ** (stages - 1)}, "
                    f"got {self.hidden_size}"
                )

        # heads, depth, lengths
        if self.projector_layers < 1 or self.predictor_layers < 0:
            raise ValueError(
                f"expected projector_layers >= 1 and predictor_layers >= 0, "
                f"got {self.projector_layers} and {self.predictor_layers}"
            )
        for name in ("num_hidden_layers", "max_text_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.learnable_temperature and self.temperature < 0.01:
            raise ValueError(f"a learnable temperature is held at 0.01 or above, got {self.temperature} to start from")
        self._check_special_ids()

    @classmethod
    def from_size(cls, size: str, **overrides) -> "OneRConfig":
        """The configuration of a named size (`ONER_SIZES`), with any field overridden. Raises `ValueError`."""
        if size not in ONER_SIZES:
            raise ValueError(f"unknown size {size!r}; expected one of {', '.join(ONER_SIZES)}")
        names = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "projection_hidden_size",
            "projection_dim",
        )
        fields = dict(zip(names, ONER_SIZES[size], strict=True))
        if size == "nano":
            fields["image_size"] = 64
        return cls(**{**fields, **overrides})


__all__ = ["ONER_SIZES", "OneRConfig"]
