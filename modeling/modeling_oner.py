"""OneR: one transformer, one representation space for images, text and the two mixed (Jang et al., 2022).

B pairs, L positions, N = h*w patches, T tokens of a text, D width, P embedding width, V vocabulary size. A sequence is
[CLS], N patches, T tokens; either part may be missing. The same weights read all three kinds.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_oner import OneRConfig
from .vl_embeddings import PatchProjection
from .vl_features import CosineRetrieval, MaskedTokens, RetrievalFeatures
from .vl_heads import ContrastiveHead, HeadLinear, LanguageModelHead
from .vl_inputs import check_inputs
from .vl_layers import PreNormLayer, SelfAttention
from .vl_localization import GroundedPatches
from .vl_one_tower import OneTowerEmbeddings
from .vl_outputs import PATCH_TOKEN, TEXT_TOKEN, VisionLanguageModelOutput
from .vl_saving import SavedWhole
from .vl_task_heads import ImageClassification, TextClassification, TextClassificationHead

# a learned scale of cosines is at most 100 (CLIP, section 2.5)
MAX_LOGIT_SCALE = math.log(100)


class OneREmbeddings(OneTowerEmbeddings):
    """Token and patch embeddings with a learned mask token for patches."""

    def __init__(self, config: OneRConfig):
        super().__init__(config)
        self.patch_mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def embed_patches(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, H, W) -> (B, N, D); masked patches (B, N) become the mask token after the stem."""
        if bool_masked_pos is None:
            return super().embed_patches(pixel_values)

        # masked patches, blank to the stem too if the configuration says so
        p = self.config.patch_size
        if self.config.mask_before_stem:
            h, w = pixel_values.shape[-2] // p, pixel_values.shape[-1] // p
            hidden = bool_masked_pos.view(-1, 1, h, w).repeat_interleave(p, 2).repeat_interleave(p, 3)
            pixel_values = pixel_values.masked_fill(hidden, 0.0)
        patches = self.stem(pixel_values.to(self.patch_mask_token.dtype))  # (B, N, D)
        patches = torch.where(bool_masked_pos[..., None], self.patch_mask_token.to(patches.dtype), patches)
        return patches + self.positions_of(pixel_values).to(patches.dtype)


class OneRPreTrainedModel(SavedWhole, PreTrainedModel):
    """Base of the family's classes: weight initialisation, saving, and the features that transformers supports."""

    config: OneRConfig
    base_model_prefix = "oner"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["PreNormLayer"]
    # Trainer then divides the loss by the accumulation steps
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": PreNormLayer, "attentions": SelfAttention}
    # all classes load the same checkpoint: weights that a class does not use are ignored without a warning
    _keys_to_ignore_on_load_unexpected = [
        r"predictor\.", r"projector\.", r"lm_head\.", r"pixel_head\.", r"classifier\.", r"^logit_scale$",
    ]  # fmt: skip

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """
        MAE's initialisation: Xavier for linear layers, N(0, .02) for embeddings; torch's default for convolutions.
        """
        # transformers calls this only for modules that hold parameters themselves, so each case is a leaf
        if isinstance(module, (HeadLinear, PatchProjection)):
            module.reset()
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, OneREmbeddings):
            init.normal_(module.patch_mask_token, std=self.config.initializer_range)
            module.reset_tables()
        elif hasattr(module, "logit_scale"):
            init.constant_(module.logit_scale, -math.log(self.config.temperature))
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self, "oner", self).embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        getattr(self, "oner", self).embeddings.word_embeddings = value


class OneRModel(RetrievalFeatures, OneRPreTrainedModel):
    """
    The tower. Takes text, images, or both; `pooler_output` is the retrieval embedding, not normalised: the
    projector's output, in the same space as the teacher's keys.

    Args:
        config (`OneRConfig`): The configuration.
        add_pooling_layer (`bool`, defaults to `True`): Whether to add the projector(s).
    """

    def __init__(self, config: OneRConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = OneREmbeddings(config)
        self.layers = nn.ModuleList([PreNormLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projector = self._make_projector() if add_pooling_layer else None
        self.text_projector = self._make_projector() if add_pooling_layer and config.two_heads else None
        self.post_init()

    def _make_projector(self) -> ContrastiveHead:
        return ContrastiveHead.from_config(self.config, self.config.hidden_size, self.config.projector_layers)

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisionLanguageModelOutput:
        r"""
        Args:
            input_ids (`(B, L)`): [CLS], one placeholder per patch if there are images, tokens, padding on the right.
            attention_mask (`(B, L)`): 1 for real tokens, 0 for padding.
            pixel_values (`(B, C, H, W)`): Normalised images; without ids the sequence is [CLS] and patches.
            bool_masked_pos (`(B, N)`): True for patches to replace by the mask token.
            interpolate_pos_encoding: Accept other image sizes by interpolating the 2-D positions.

        Raises:
            ValueError: neither input is given, an image has the wrong size, a text is too long, ids are out of range,
                pixels are NaN, or placeholders do not match the patches.
        """
        check_inputs(self, input_ids, attention_mask, pixel_values, interpolate_pos_encoding, bool_masked_pos)

        # one sequence of the given inputs
        hidden_states, token_types = self.embeddings(
            input_ids, attention_mask, pixel_values, bool_masked_pos=bool_masked_pos
        )

        # transformer layers, (B, L, D)
        mask = create_bidirectional_mask(self.config, hidden_states, attention_mask if input_ids is not None else None)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, **kwargs)
        hidden_states = self.norm(hidden_states)

        # F(X), projected into the contrastive space
        pooled = None
        if self.projector is not None:
            text_only = pixel_values is None and self.text_projector is not None
            projector = self.text_projector if text_only else self.projector
            pooled = projector(self.pool(hidden_states, token_types))  # (B, P)
        return VisionLanguageModelOutput(
            last_hidden_state=hidden_states, pooler_output=pooled, token_types=token_types
        )

    def pool(self, hidden_states: torch.Tensor, token_types: torch.Tensor) -> torch.Tensor:
        """F(X): the [CLS] state, or the mean over patches and tokens (equation 16). (B, L, D) -> (B, D)."""
        if self.config.pooling == "cls":
            return hidden_states[:, 0]
        content = ((token_types == PATCH_TOKEN) | (token_types == TEXT_TOKEN)).to(hidden_states.dtype)[..., None]
        return (hidden_states * content).sum(1) / content.sum(1).clamp_min(1)


class OneRForImageTextRetrieval(GroundedPatches, CosineRetrieval, OneRPreTrainedModel):
    """
    Scores images against texts by cosine, and locates a text in an image. `AutoModelForZeroShotImageClassification`
    returns this class.
    """

    def __init__(self, config: OneRConfig):
        super().__init__(config)
        self.oner = OneRModel(config)
        if config.learnable_temperature:
            self.logit_scale = nn.Parameter(torch.zeros(1))  # not 0-dim: ZeRO-3 cannot partition a scalar
        self.post_init()

    def scaled(self, cosines: torch.Tensor) -> torch.Tensor:
        if not self.config.learnable_temperature:
            return cosines * (1 / self.config.temperature)
        return cosines * self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()


class OneRForMaskedLM(MaskedTokens, OneRPreTrainedModel):
    """Masked language modelling: BERT's head on the tower, for texts with or without an image."""

    _tied_weights_keys = {"lm_head.decoder.weight": "oner.embeddings.word_embeddings.weight"}

    def __init__(self, config: OneRConfig):
        super().__init__(config)
        self.oner = OneRModel(config, add_pooling_layer=False)
        self.lm_head = LanguageModelHead(config)
        self.post_init()


class OneRForImageClassification(ImageClassification, OneRPreTrainedModel):
    """Image classification: a linear layer on F(I), or on F(I, T) if a text is given to say where to look."""

    main_input_name = "pixel_values"

    def __init__(self, config: OneRConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.oner = OneRModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def pooled(self, outputs: VisionLanguageModelOutput) -> torch.Tensor:
        return self.oner.pool(outputs.last_hidden_state, outputs.token_types)


class OneRForSequenceClassification(TextClassification, OneRPreTrainedModel):
    """Classification of texts or text pairs (GLUE): a linear layer on F(T) before the projector."""

    def __init__(self, config: OneRConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.oner = OneRModel(config, add_pooling_layer=False)
        self.classifier = TextClassificationHead(config.hidden_size, config.num_labels)
        self.post_init()

    def pooled(self, outputs: VisionLanguageModelOutput) -> torch.Tensor:
        return self.oner.pool(outputs.last_hidden_state, outputs.token_types)

    def freeze_unused(self) -> None:
        """Modules that read images: a data-parallel engine would wait for their gradients for ever."""
        self.oner.embeddings.stem.requires_grad_(False)
        self.oner.embeddings.patch_mask_token.requires_grad_(False)


__all__ = [
    "MAX_LOGIT_SCALE",
    "OneRForImageClassification",
    "OneRForImageTextRetrieval",
    "OneRForMaskedLM",
    "OneRForSequenceClassification",
    "OneRModel",
    "OneRPreTrainedModel",
]
