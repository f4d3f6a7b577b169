"""SIMLA: a visual encoder below, a text encoder that reads its states by cross-attention above (Khan et al., 2022).

B pairs, L positions of the joint layout, N patches, S = 1 + N, T positions of a text, D width, P embedding width.
The text encoder runs with cross-attention or, for text alone, without; it may also run over the tokens of an image.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_simla import SimlaConfig
from .vl_dual_encoder import DualEncoder, DualEncoderPreTrainedModel, ImageTextMatching
from .vl_features import CosineRetrieval, MaskedWords, RetrievalFeatures
from .vl_gradcam import GroundedMatching
from .vl_heads import HeadLinear, LanguageModelHead
from .vl_inputs import check_inputs, check_one_modality
from .vl_outputs import (
    CLS_TOKEN,
    PADDING_TOKEN,
    PATCH_TOKEN,
    WORD_TOKEN,
    VisionLanguageModelOutput,
)

# what a repository with these weights offers, whichever class saved it
AUTO_MAP = {
    "AutoConfig": "configuration_simla.SimlaConfig",
    "AutoModel": "modeling_simla.SimlaModel",
    "AutoModelForZeroShotImageClassification": "modeling_simla.SimlaForImageTextRetrieval",
    "AutoModelForMaskedLM": "modeling_simla.SimlaForMaskedLM",
}


class SimlaPreTrainedModel(DualEncoderPreTrainedModel):
    config: SimlaConfig
    base_model_prefix = "simla"
    # one checkpoint serves every class: what a class has no use for is left behind in silence
    _keys_to_ignore_on_load_unexpected = [
        r"(vision|text)_projection\.", r"^(itm|lm|mim|concept)_head\.", r"^temperature$", r"^(classifier|decoder)\.",
    ]  # fmt: skip

    def save_pretrained(self, *args, **kwargs) -> None:
        # transformers would list only the class that is saved; a repository serves all of them
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(*args, **kwargs)


class SimlaFeatures(RetrievalFeatures):
    """Positions are counted from the left, so a text in the joint layout closes up where its placeholders were."""

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Text alone: (B, L) -> `pooler_output` (B, P). The joint layout is accepted; its placeholders are passed over.
        Raises `ValueError` when pictures come along.
        """
        check_one_modality("get_text_features", input_ids, pixel_values, self.config.patch_size)
        is_word = input_ids != self.config.image_token_id
        real = is_word.long() if attention_mask is None else attention_mask * is_word
        order = (real == 0).long().argsort(dim=1, stable=True)  # words first, in their order
        words = torch.where(is_word, input_ids, self.config.pad_token_id or 0).gather(1, order)
        features = self._features(
            self.tower(input_ids=words, attention_mask=real.gather(1, order), return_dict=True, **kwargs)
        )
        places = order.argsort(dim=1)[..., None].expand_as(features.last_hidden_state)
        features.last_hidden_state = features.last_hidden_state.gather(1, places)
        return features

    @can_return_tuple
    def get_multimodal_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Picture and text in the joint layout. The states are fused; `pooler_output` (B, P) is the mean of the two unit
        embeddings, for SIMLA has no embedding of the two together: its own answer to pairs is the matching score.

        Raises `ValueError` when either is missing.
        """
        features = super().get_multimodal_features(input_ids, attention_mask, pixel_values, return_dict=True, **kwargs)
        tower = self.tower
        cls = tower.vision(pixel_values)[:, 0]
        image = nn.functional.normalize(tower.vision_projection(cls), dim=-1)
        text_ids, text_mask = tower.split_layout(input_ids, attention_mask, pixel_values)
        text = nn.functional.normalize(tower.text_projection(tower.encode_texts(text_ids, text_mask)[:, 0]), dim=-1)
        features.pooler_output = (image + text) / 2
        return features


class SimlaModel(DualEncoder, SimlaFeatures, SimlaPreTrainedModel):
    """
    Both encoders and the projections into the contrastive space. Reads text, images, or pairs.

    Args:
        config (`SimlaConfig`): The configuration.
        add_pooling_layer (`bool`, defaults to `True`): Whether to have the projections.
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
            input_ids (`(B, L)`): [CLS], a placeholder per patch if there are pictures, words, padding on the right.
            attention_mask (`(B, L)`): 1 for real tokens, 0 for padding.
            pixel_values (`(B, C, H, W)`): Normalised pictures; alone they are laid out as [CLS] and patches.
            bool_masked_pos (`(B, N)`): Patches to replace by the mask token.
            interpolate_pos_encoding: Accept other picture sizes by interpolating the positions.

        Of pairs, the first place and the words hold the states of the multimodal encoder, the patches those of the
        visual encoder, and `pooler_output` is None: see `get_multimodal_features`.

        Raises:
            ValueError: neither input, a picture of a wrong size, too long a text, ids out of range, NaN pixels, or
                placeholders that do not match the patches.
        """
        check_inputs(self, input_ids, attention_mask, pixel_values, interpolate_pos_encoding)
        if bool_masked_pos is not None and pixel_values is None:
            raise ValueError("got bool_masked_pos, which masks patches, but pixel_values is None")
        if pixel_values is None:
            hidden_states = self.encode_texts(input_ids, attention_mask, **kwargs)
            pooled = None if self.text_projection is None else self.text_projection(hidden_states[:, 0])
        else:
            hidden_states, pooled = self.vision(pixel_values, bool_masked_pos, **kwargs), None
            places = hidden_states.shape[1]
            if input_ids is not None and input_ids.shape[1] > places:
                text_ids, text_mask = self.split_layout(input_ids, attention_mask, pixel_values)
                fused = self.fuse(text_ids, text_mask, hidden_states, **kwargs)
                hidden_states = torch.cat([fused[:, :1], hidden_states[:, 1:], fused[:, 1:]], dim=1)
            elif self.vision_projection is not None:
                pooled = self.vision_projection(hidden_states[:, 0])
        return VisionLanguageModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=pooled,
            token_types=self._token_types(input_ids, attention_mask, hidden_states),
        )

    def _token_types(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, states: torch.Tensor
    ) -> torch.Tensor:
        """What each place is, (B, L)."""
        if input_ids is None:
            types = torch.full(states.shape[:2], PATCH_TOKEN, device=states.device)
        else:
            types = torch.full_like(input_ids, WORD_TOKEN)
            types = types.masked_fill(input_ids == self.config.image_token_id, PATCH_TOKEN)
            if attention_mask is not None:
                types = types.masked_fill(attention_mask == 0, PADDING_TOKEN)
        types[:, 0] = CLS_TOKEN
        return types


class SimlaForImageTextRetrieval(
    ImageTextMatching, GroundedMatching, CosineRetrieval, SimlaFeatures, SimlaPreTrainedModel
):
    """
    Pictures against texts by cosine, then the best of them by matching (section 3.6: the slower encoder re-ranks).
    `AutoModelForZeroShotImageClassification` returns this class.
    """

    def __init__(self, config: SimlaConfig):
        super().__init__(config)
        self.simla = SimlaModel(config)
        self.temperature = nn.Parameter(torch.zeros(1))  # not 0-dim: ZeRO-3 cannot partition a scalar
        self.itm_head = HeadLinear(config.hidden_size, 2)
        self.post_init()

    def scaled(self, cosines: torch.Tensor) -> torch.Tensor:
        return cosines / self.temperature


class SimlaForMaskedLM(MaskedWords, SimlaPreTrainedModel):
    """BERT's language-model head on the multimodal encoder, or on the text encoder when there is no picture."""

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
