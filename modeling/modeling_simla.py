"""SIMLA: a visual encoder, and a text encoder that reads its states by cross-attention (Khan et al., 2022).

B pairs, N patches, S = 1 + N, T positions of a text with its [CLS], D width, P embedding width.
The text encoder runs with cross-attention or, for text alone, without; it may also run over the tokens of an image.
"""

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_simla import SimlaConfig
from .vl_dual_encoder import DualEncoder, DualEncoderPreTrainedModel, ImageTextMatching
from .vl_features import CosineRetrieval, MaskedTokens
from .vl_gradcam import GroundedMatching
from .vl_heads import HeadLinear, LanguageModelHead
from .vl_inputs import check_inputs
from .vl_outputs import VisionLanguageModelOutput, token_types_of, with_patches
from .vl_saving import SavedWhole


class SimlaPreTrainedModel(SavedWhole, DualEncoderPreTrainedModel):
    """Base of the family's classes: weight initialisation, saving, and the features that transformers supports."""

    config: SimlaConfig
    base_model_prefix = "simla"
    # all classes load the same checkpoint: weights that a class does not use are ignored without a warning
    _keys_to_ignore_on_load_unexpected = [
        r"(vision|text)_projection\.", r"^(itm|lm|mim|concept)_head\.", r"^temperature$", r"^(classifier|decoder)\.",
    ]  # fmt: skip


class SimlaModel(DualEncoder, SimlaPreTrainedModel):
    """
    Both encoders and the projections into the contrastive space. Takes text, images, or pairs.

    Args:
        config (`SimlaConfig`): The configuration.
        add_pooling_layer (`bool`, defaults to `True`): Whether to add the projections.
    """

    masks_images = True

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
            input_ids (`(B, T)`): [CLS], the text's tokens, padding on the right.
            attention_mask (`(B, T)`): 1 for real tokens, 0 for padding.
            pixel_values (`(B, C, H, W)`): Normalised images.
            bool_masked_pos (`(B, N)`): True for patches to replace by the mask token.
            interpolate_pos_encoding: Accept other image sizes by interpolating the positions.

        A pair's `last_hidden_state` (B, N + T, D) is [CLS] of the multimodal encoder, the patches of the visual one,
        and the tokens of the multimodal one; `token_types` tells them apart. SIMLA has no joint embedding, so
        `pooler_output` (B, P) is the mean of the two unit embeddings; to score pairs, use the matching head.

        Raises:
            ValueError: neither input is given, an image has the wrong size, a text is too long, ids are out of range
                or contain placeholders, padding is not on the right, or pixels are NaN.
        """
        check_inputs(self, input_ids, attention_mask, pixel_values, interpolate_pos_encoding, bool_masked_pos)
        if input_ids is not None and attention_mask is None:
            attention_mask = torch.ones_like(input_ids)  # (B, T)

        # a text alone
        if pixel_values is None:
            return self.text_output(input_ids, attention_mask, **kwargs)

        # an image alone
        image_states = self.vision(pixel_values, bool_masked_pos, **kwargs)  # (B, S, D)
        if input_ids is None:
            return self.image_output(image_states)

        # a pair: encode its text alone, for the embedding, and again with the image
        beginning, pooled = self.text.begin(input_ids, attention_mask, **kwargs), None  # (B, T, D)
        if self.text_projection is not None:
            text_states = self.text.alone(beginning, attention_mask, **kwargs)  # (B, T, D)
            pooled = (self.embed_images(image_states) + self.embed_texts(text_states)) / 2  # (B, P)
        fused = self.text.fuse(beginning, attention_mask, image_states, **kwargs)  # (B, T, D)
        states = with_patches(fused, image_states)  # (B, N + T, D)
        return VisionLanguageModelOutput(
            last_hidden_state=states,
            pooler_output=pooled,
            token_types=token_types_of(image_states, attention_mask),  # (B, N + T)
        )


class SimlaForImageTextRetrieval(ImageTextMatching, GroundedMatching, CosineRetrieval, SimlaPreTrainedModel):
    """
    Scores images against texts by cosine, then re-ranks the best with the matching head (section 3.6: the slower
    encoder re-ranks). `AutoModelForZeroShotImageClassification` returns this class.
    """

    def __init__(self, config: SimlaConfig):
        super().__init__(config)
        self.simla = SimlaModel(config)
        self.temperature = nn.Parameter(torch.zeros(1))  # not 0-dim: ZeRO-3 cannot partition a scalar
        self.itm_head = HeadLinear(config.hidden_size, 2)
        self.post_init()

    def scaled(self, cosines: torch.Tensor) -> torch.Tensor:
        # clamped to its range, as before each training step, so that it stays above zero
        return cosines / self.temperature.clamp(*self.config.temperature_range)


class SimlaForMaskedLM(MaskedTokens, SimlaPreTrainedModel):
    """Masked language modelling: BERT's head on the multimodal encoder, or on the text encoder without an image."""

    _tied_weights_keys = {"lm_head.decoder.weight": "simla.text.embeddings.word_embeddings.weight"}

    def __init__(self, config: SimlaConfig):
        super().__init__(config)
        self.simla = SimlaModel(config, add_pooling_layer=False)
        self.lm_head = LanguageModelHead(config, config.text_layer_norm_eps)
        self.post_init()


__all__ = [
    "SimlaForImageTextRetrieval",
    "SimlaForMaskedLM",
    "SimlaModel",
    "SimlaPreTrainedModel",
]
