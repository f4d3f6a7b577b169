"""A family such as ALBEF, for tests alone: two layers that read a text, two above them that read its image too.

What it costs to have one on the shared nouns: a configuration, and classes that say what goes where. B pairs,
N patches, S = 1 + N, T positions of a text with its [CLS], D width, P embedding width, M masked tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from tiny_oner import CLS, IMAGE, MASK, VOCAB
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from oner.modeling.vl_dual_encoder import DualEncoder, DualEncoderPreTrainedModel, ImageTextMatching
from oner.modeling.vl_dual_tasks import FusedAnswerGeneration, TextAssignment, TwoImageReasoning
from oner.modeling.vl_features import CosineRetrieval, MaskedTokens, RetrievalFeatures, TokenPredictions
from oner.modeling.vl_gradcam import GroundedMatching
from oner.modeling.vl_heads import HeadLinear, LanguageModelHead
from oner.modeling.vl_inputs import check_inputs
from oner.modeling.vl_outputs import VisionLanguageModelOutput, token_types_of
from oner.modeling.vl_task_heads import AnswerDecoder, PairClassificationHead


@strict
class TinyAlbefConfig(PreTrainedConfig):
    """Two towers of width 32, and the depth at which they meet."""

    model_type = "tiny_albef"
    pair_layout = "separate"

    vocab_size: int = VOCAB
    hidden_size: int = 32
    hidden_act: str = "gelu"
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 128
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    num_text_layers: int = 2
    num_fusion_layers: int = 2
    text_attention_heads: int = 4
    text_intermediate_size: int = 64
    text_layer_norm_eps: float = 1e-12
    text_attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    max_position_embeddings: int = 32
    max_text_length: int = 12
    image_size: int = 16
    position_image_size: int = 16
    patch_size: int = 4
    num_channels: int = 3
    stem: str = "linear"
    initializer_range: float = 0.02
    projection_dim: int = 8
    temperature: float = 0.07
    grounding_layer: int = 8
    answer_decoder_layers: int = 2
    pad_token_id: int | None = 0
    image_token_id: int = IMAGE
    cls_token_id: int = CLS
    sep_token_id: int | None = 2
    mask_token_id: int = MASK
    tie_word_embeddings: bool = True


class TinyAlbefPreTrainedModel(DualEncoderPreTrainedModel):
    config: TinyAlbefConfig
    base_model_prefix = "albef"
    _keys_to_ignore_on_load_unexpected = [r"(vision|text)_projection\.", r"^(itm|lm)_head\.", r"^temperature$"]


class TinyAlbefModel(DualEncoder, TinyAlbefPreTrainedModel):
    """E_v, E_l, and E_mm, which stands on E_l."""

    @capture_outputs
    def forward(
        self, input_ids=None, attention_mask=None, pixel_values=None, interpolate_pos_encoding=False, **kwargs
    ):
        check_inputs(self, input_ids, attention_mask, pixel_values, interpolate_pos_encoding)
        image_states = text_states = pooled = mask = None
        if pixel_values is not None:
            image_states = states = self.vision(pixel_values, **kwargs)  # (B, S, D)
            pooled = self.project_images(states)  # (B, P)
        if input_ids is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            text_states = states = self.encode_texts(input_ids, mask, **kwargs)  # (B, T, D)
            pooled = self.project_texts(states)  # (B, P)
        if image_states is not None and text_states is not None:
            fused = self.text.fuse(text_states, mask, image_states, **kwargs)  # (B, T, D)
            states = torch.cat([fused[:, :1], image_states[:, 1:], fused[:, 1:]], dim=1)  # (B, N + T, D)
            if pooled is not None:
                pooled = (self.embed_images(image_states) + self.embed_texts(text_states)) / 2  # (B, P)
        types = token_types_of(image_states, mask)
        return VisionLanguageModelOutput(last_hidden_state=states, pooler_output=pooled, token_types=types)


class TinyAlbefForImageTextRetrieval(ImageTextMatching, GroundedMatching, CosineRetrieval, TinyAlbefPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.albef = TinyAlbefModel(config)
        self.temperature = nn.Parameter(torch.zeros(1))
        self.itm_head = HeadLinear(config.hidden_size, 2)
        self.post_init()

    def scaled(self, cosines):
        return cosines / self.temperature


class TinyAlbefForMaskedLM(MaskedTokens, TinyAlbefPreTrainedModel):
    _tied_weights_keys = {"lm_head.decoder.weight": "albef.text.embeddings.word_embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.albef = TinyAlbefModel(config, add_pooling_layer=False)
        self.lm_head = LanguageModelHead(config, config.text_layer_norm_eps)
        self.post_init()


@dataclass
class TinyAlbefPreTrainingOutput(ModelOutput):
    temperature: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    itm_logits: torch.FloatTensor | None = None
    mlm_logits: torch.FloatTensor | None = None


class TinyAlbefForPreTraining(TokenPredictions, ImageTextMatching, RetrievalFeatures, TinyAlbefPreTrainedModel):
    """Contrast, matching and masked tokens, as ALBEF's step has them."""

    _tied_weights_keys = {"lm_head.decoder.weight": "albef.text.embeddings.word_embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.albef = TinyAlbefModel(config)
        self.temperature = nn.Parameter(torch.zeros(1))
        self.itm_head = HeadLinear(config.hidden_size, 2)
        self.lm_head = LanguageModelHead(config, config.text_layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids, attention_mask, pixel_values, masked_input_ids, mlm_places, choose_negatives, **kwargs
    ) -> TinyAlbefPreTrainingOutput:
        check_inputs(self.albef, input_ids, attention_mask, pixel_values)
        # each alone
        image_states = self.albef.vision(pixel_values)  # (B, S, D)
        text_states = self.albef.encode_texts(input_ids, attention_mask)  # (B, T, D)
        image, text = self.albef.embed_images(image_states), self.albef.embed_texts(text_states)  # (B, P) each
        # pairs and their negatives begin at states that are there, masked texts anew
        own, (images, texts) = torch.arange(len(input_ids)), choose_negatives(image, text, self.temperature)
        masked = self.albef.text.begin(masked_input_ids, attention_mask)  # (B, T, D)
        rows = torch.cat([text_states, text_states, text_states[texts], masked])  # (4B, T, D)
        masks = torch.cat([attention_mask, attention_mask, attention_mask[texts], attention_mask])
        read = torch.cat([own, images, own, own])
        fused = self.albef.text.fuse(rows, masks, image_states, context_index=read)  # (4B, T, D)
        return TinyAlbefPreTrainingOutput(
            temperature=self.temperature,
            image_embeds=image,
            text_embeds=text,
            itm_logits=self.itm_head(fused[: 3 * len(own), 0]),  # (3B, 2)
            mlm_logits=self.lm_head(fused[3 * len(own) :].flatten(0, 1)[mlm_places]),  # (M, V)
        )


class TinyAlbefForVisualQuestionAnswering(FusedAnswerGeneration, TinyAlbefPreTrainedModel):
    _tied_weights_keys = {"decoder.lm_head.decoder.weight": "decoder.embeddings.word_embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.albef = TinyAlbefModel(config, add_pooling_layer=False)
        self.decoder = AnswerDecoder(config, config.answer_decoder_layers)
        self.post_init()


class TinyAlbefForVisualReasoning(TwoImageReasoning, TinyAlbefPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.albef = TinyAlbefModel(config, add_pooling_layer=False)
        self.add_second_layers(config)
        self.classifier = PairClassificationHead(config.hidden_size, config.hidden_size, config.num_labels)
        self.post_init()


class TinyAlbefForTextAssignment(TextAssignment, TinyAlbefPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.albef = TinyAlbefModel(config)
        self.add_second_layers(config)
        self.assignment_head = HeadLinear(config.hidden_size, 3)
        self.post_init()


__all__ = [
    "TinyAlbefConfig",
    "TinyAlbefForImageTextRetrieval",
    "TinyAlbefForMaskedLM",
    "TinyAlbefForPreTraining",
    "TinyAlbefForTextAssignment",
    "TinyAlbefForVisualQuestionAnswering",
    "TinyAlbefForVisualReasoning",
    "TinyAlbefModel",
]
