"""CODIS: an image and a text encoder, fusion layers, and a codebook in the shared embedding space (Duan et al., 2022).

Without the codebook it is ALBEF (Li et al., 2021). B pairs, N patches, S = 1 + N, T positions of a text with its
[CLS], D width, P embedding width, K codes, M masked tokens, V vocabulary size.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_codis import CodisConfig
from .vl_dual_encoder import (
    ChooseNegatives,
    DualEncoder,
    DualEncoderPreTrainedModel,
    FusedPredictions,
    ImageTextMatching,
    check_passes,
)
from .vl_dual_tasks import (
    ENTAILMENT_LABELS,
    REASONING_LABELS,
    DualEncoderTask,
    FusedAnswerGeneration,
    TextAssignment,
    TextReading,
    TwoImageReasoning,
    name_labels,
)
from .vl_features import CosineRetrieval, MaskedTokens, RetrievalFeatures, TokenPredictions
from .vl_gradcam import GroundedMatching
from .vl_heads import HeadLinear, LanguageModelHead
from .vl_inputs import check_inputs, check_masks
from .vl_outputs import VisionLanguageModelOutput, token_types_of, with_patches
from .vl_saving import SavedWhole
from .vl_task_heads import (
    AnswerDecoder,
    PairClassification,
    PairClassificationHead,
    TextClassification,
    TextClassificationHead,
)

PASSES = ("contrast", "match", "tokens", "codes")


class CodisPreTrainedModel(SavedWhole, DualEncoderPreTrainedModel):
    """Base of the family's classes: weight initialisation, saving, and the features that transformers supports."""

    config: CodisConfig
    base_model_prefix = "codis"
    # all classes load the same checkpoint: weights that a class does not use are ignored without a warning
    _keys_to_ignore_on_load_unexpected = [
        r"(vision|text)_projection\.", r"^(itm|lm)_head\.", r"^temperature$", r"^(classifier|decoder)\.",
        r"^codebook\.", r"^assignment_head\.",
    ]  # fmt: skip

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Codebook):
            module.reset()
        else:
            super()._init_weights(module)


class CodisModel(DualEncoder, CodisPreTrainedModel):
    """
    Both towers, the fusion layers above the text tower, and the projections into the contrastive space. Takes text,
    images, or pairs.

    Args:
        config (`CodisConfig`): The configuration.
        add_pooling_layer (`bool`, defaults to `True`): Whether to add the projections.
    """

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisionLanguageModelOutput:
        r"""
        Args:
            input_ids (`(B, T)`): [CLS], the text's tokens, padding on the right.
            attention_mask (`(B, T)`): 1 for real tokens, 0 for padding.
            pixel_values (`(B, C, H, W)`): Normalised images.
            interpolate_pos_encoding: Accept other image sizes by interpolating the positions.

        A pair's `last_hidden_state` (B, N + T, D) is [CLS] of the fusion layers, the patches of the visual tower, and
        the tokens of the fusion layers; `token_types` tells them apart. Its `pooler_output` (B, P) is the mean of the
        two unit embeddings; to score pairs, use the matching head.

        Raises:
            ValueError: neither input is given, an image has the wrong size, a text is too long, ids are out of range
                or contain placeholders, padding is not on the right, or pixels are NaN.
        """
        check_inputs(self, input_ids, attention_mask, pixel_values, interpolate_pos_encoding)
        if input_ids is not None and attention_mask is None:
            attention_mask = torch.ones_like(input_ids)  # (B, T)

        # a text alone
        if pixel_values is None:
            return self.text_output(input_ids, attention_mask, **kwargs)

        # an image alone
        image_states = self.vision(pixel_values, **kwargs)  # (B, S, D)
        if input_ids is None:
            return self.image_output(image_states)

        # a pair: the fusion layers start from the text's states
        text_states = self.encode_texts(input_ids, attention_mask, **kwargs)  # (B, T, D)
        pooled = None
        if self.text_projection is not None:
            pooled = (self.embed_images(image_states) + self.embed_texts(text_states)) / 2  # (B, P)
        fused = self.text.fuse(text_states, attention_mask, image_states, **kwargs)  # (B, T, D)
        return VisionLanguageModelOutput(
            last_hidden_state=with_patches(fused, image_states),  # (B, N + T, D)
            pooler_output=pooled,
            token_types=token_types_of(image_states, attention_mask),  # (B, N + T)
        )


class CodisForImageTextRetrieval(ImageTextMatching, GroundedMatching, CosineRetrieval, CodisPreTrainedModel):
    """
    Scores images against texts by cosine, then re-ranks the best with the matching head (ALBEF's protocol).
    `AutoModelForZeroShotImageClassification` returns this class.
    """

    def __init__(self, config: CodisConfig):
        super().__init__(config)
        self.codis = CodisModel(config)
        self.temperature = nn.Parameter(torch.zeros(1))  # not 0-dim: ZeRO-3 cannot partition a scalar
        self.itm_head = HeadLinear(config.hidden_size, 2)
        self.post_init()

    def scaled(self, cosines: torch.Tensor) -> torch.Tensor:
        # clamped to its range, as before each training step, so that it stays above zero
        return cosines / self.temperature.clamp(*self.config.temperature_range)


class CodisForMaskedLM(MaskedTokens, CodisPreTrainedModel):
    """Masked language modelling: BERT's head on the fusion layers, or on the text layers if there is no image."""

    _tied_weights_keys = {"lm_head.decoder.weight": "codis.text.embeddings.word_embeddings.weight"}

    def __init__(self, config: CodisConfig):
        super().__init__(config)
        self.codis = CodisModel(config, add_pooling_layer=False)
        self.lm_head = LanguageModelHead(config, config.text_layer_norm_eps)
        self.post_init()


class Codebook(nn.Module):
    """K codes in the contrastive space, one per row: C of equation 1, transposed. (R, P) -> cosines (R, K)."""

    def __init__(self, config: CodisConfig):
        super().__init__()
        self.normalised = config.code_norm == "forward"
        self.weight = nn.Parameter(torch.zeros(config.num_codes, config.projection_dim))

    def reset(self) -> None:
        """Draws codes uniformly from the unit sphere."""
        init.normal_(self.weight)
        init.copy_(self.weight, nn.functional.normalize(self.weight, dim=-1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        codes = nn.functional.normalize(self.weight, dim=-1) if self.normalised else self.weight  # (K, P)
        return features @ codes.to(features.dtype).T


@dataclass
class CodisPreTrainingOutput(ModelOutput):
    """
    Args:
        temperature (`(1,)`): gamma, the learnable divisor of cosines; None for a teacher, which has none.
        image_embeds, text_embeds (`(B, P)`): Unit embeddings.
        image_states (`(B, S, D)`): Output of the visual tower.
        itm_logits (`(3B, 2)`): Matching logits of the pairs, of each text with its negative image, and of each image
            with its negative text (equation 7).
        mlm_logits (`(M, V)`, or `(B, T, V)` without places): Logits of masked tokens, given the image (equation 8).
        image_codes, text_codes (`(B, K)`): Cosines of the embeddings with the codes (equation 2).
        image_key_codes, text_key_codes (`(B, K)`): Cosines of the teacher's features with the codes (equation 1).
    """

    temperature: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    image_states: torch.FloatTensor | None = None
    itm_logits: torch.FloatTensor | None = None
    mlm_logits: torch.FloatTensor | None = None
    image_codes: torch.FloatTensor | None = None
    text_codes: torch.FloatTensor | None = None
    image_key_codes: torch.FloatTensor | None = None
    text_key_codes: torch.FloatTensor | None = None


class CodisForPreTraining(
    FusedPredictions, TokenPredictions, ImageTextMatching, GroundedMatching, RetrievalFeatures, CodisPreTrainedModel
):
    """
    Everything that is trained: towers, temperature, codebook, matching and language-model heads. It computes
    embeddings and logits; the objective owns losses, optimal transport, teacher, queues and negative sampling.
    """

    _tied_weights_keys = {"lm_head.decoder.weight": "codis.text.embeddings.word_embeddings.weight"}

    def __init__(self, config: CodisConfig):
        super().__init__(config)
        self.codis = CodisModel(config)
        self.temperature = nn.Parameter(torch.zeros(1))  # not 0-dim: ZeRO-3 cannot partition a scalar
        self.codebook = Codebook(config) if config.num_codes else None
        self.itm_head = HeadLinear(config.hidden_size, 2)
        self.lm_head = LanguageModelHead(config, config.text_layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        pixel_values: torch.FloatTensor,
        masked_input_ids: torch.LongTensor | None = None,
        mlm_places: torch.LongTensor | None = None,
        passes: tuple[str, ...] = ("contrast", "tokens"),
        choose_negatives: ChooseNegatives | None = None,
        keys: tuple[torch.Tensor, torch.Tensor] | None = None,
        image_states: torch.FloatTensor | None = None,
        checked: bool = False,
        **kwargs,
    ) -> CodisPreTrainingOutput:
        r"""
        Args:
            input_ids, attention_mask (`(B, T)`): Texts, padded on the right.
            pixel_values (`(B, C, H, W)`): Their images.
            masked_input_ids (`(B, T)`): The same ids after masking, for "tokens".
            mlm_places (`(M,)`): Indices into the flat (B, T) of the tokens to predict; None predicts all.
            passes: What to compute, of `contrast`, `match`, `tokens`, `codes`.
            choose_negatives: For "match"; called after the embeddings are computed. A pure function of tensors.
            keys (`(B, P)` twice): For "codes": the teacher's image and text features; None uses this model's own.
            image_states (`(B, S, D)`): Replaces the visual tower's output, which is then not computed.
            checked: Whether texts and images were already validated; the shapes of masks are checked in any case.

        Raises:
            ValueError: a pass is unknown or lacks an input that it needs, and the errors of [`CodisModel`].
        """
        needs = {
            "tokens": ("masked_input_ids", masked_input_ids),
            "match": ("choose_negatives", choose_negatives),
            "codes": ("a codebook (num_codes)", self.codebook),
        }
        check_passes(passes, PASSES, needs)
        if {"match", "codes"} & set(passes) and "contrast" not in passes:
            raise ValueError(f"the passes 'match' and 'codes' need 'contrast' beside them, got {list(passes)}")
        if not checked:
            check_inputs(self.codis, input_ids, attention_mask, pixel_values)
        check_masks(input_ids, pixel_values, masked_input_ids, None, self.config.patch_size)
        output = CodisPreTrainingOutput(temperature=self.temperature)

        # images
        if image_states is None:
            image_states = self.codis.vision(pixel_values)  # (B, S, D)
        output.image_states = image_states

        # image and text embeddings in the contrastive space
        text_states = None
        if "contrast" in passes:
            text_states = self.codis.encode_texts(input_ids, attention_mask)  # (B, T, D)
            output.image_embeds = self.codis.embed_images(image_states)  # (B, P)
            output.text_embeds = self.codis.embed_texts(text_states)  # (B, P)

        # cosines of all embeddings with the codes
        if "codes" in passes:
            image_key, text_key = keys or (output.image_embeds.detach(), output.text_embeds.detach())
            own = (output.image_embeds, output.text_embeds, image_key, text_key)
            cosines = self.codebook(torch.cat([part.to(output.image_embeds.dtype) for part in own]))  # (4B, K)
            output.image_codes, output.text_codes, output.image_key_codes, output.text_key_codes = cosines.chunk(4)

        # texts that read an image: pairs and negatives start from text_states, masked texts from their ids
        negatives = None
        if "match" in passes:
            negatives = choose_negatives(output.image_embeds, output.text_embeds, self.temperature)  # (B,), (B,)
        masked_states = None
        if "tokens" in passes:
            masked_states = self.codis.text.begin(masked_input_ids, attention_mask)  # (B, T, D)
        self.predict_fused(
            output, text_states, attention_mask, negatives, masked_states, mlm_places, self.codis.text.fuse
        )
        return output


class CodisTaskModel(CodisPreTrainedModel):
    """Base of the task models: a tower, with projections only where used (section 4.4; ALBEF's protocol)."""

    def __init__(self, config: CodisConfig, add_pooling_layer: bool = False):
        super().__init__(config)
        self.codis = CodisModel(config, add_pooling_layer)


class CodisForVisualQuestionAnswering(FusedAnswerGeneration, CodisTaskModel):
    """Generates answers from the fused states of a question with a decoder of `answer_decoder_layers` layers."""

    _tied_weights_keys = {"decoder.lm_head.decoder.weight": "decoder.embeddings.word_embeddings.weight"}

    def __init__(self, config: CodisConfig):
        super().__init__(config)
        self.decoder = AnswerDecoder(config, min(config.answer_decoder_layers, config.num_fusion_layers))
        self.post_init()


class CodisForVisualEntailment(PairClassification, DualEncoderTask, CodisTaskModel):
    """Visual entailment: the image contradicts, is neutral to, or entails the text; labels 0, 1, 2 (ALBEF's code)."""

    def __init__(self, config: CodisConfig):
        name_labels(config, ENTAILMENT_LABELS)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.classifier = PairClassificationHead(config.hidden_size, config.hidden_size, config.num_labels)
        self.post_init()


class CodisForSequenceClassification(TextClassification, TextReading, CodisTaskModel):
    """Classification of texts or text pairs (GLUE), from [CLS] of the text tower alone."""

    def __init__(self, config: CodisConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.classifier = TextClassificationHead(config.hidden_size, config.num_labels)
        self.post_init()


class CodisForVisualReasoning(TwoImageReasoning, CodisTaskModel):
    """Whether a sentence is true of two images (NLVR2); labels 0 and 1. The fusion layers are duplicated."""

    def __init__(self, config: CodisConfig):
        name_labels(config, REASONING_LABELS)
        super().__init__(config)
        self.add_second_layers(config)
        self.num_labels = config.num_labels
        self.classifier = PairClassificationHead(config.hidden_size, config.hidden_size, config.num_labels)
        self.post_init()


class CodisForTextAssignment(TextAssignment, CodisTaskModel):
    """Three-way classification: a text belongs to the first of two images, to the second, or to neither."""

    def __init__(self, config: CodisConfig):
        super().__init__(config, add_pooling_layer=True)
        self.add_second_layers(config)
        self.assignment_head = HeadLinear(config.hidden_size, 3)
        self.post_init()


__all__ = [
    "CodisForImageTextRetrieval",
    "CodisForMaskedLM",
    "CodisForPreTraining",
    "CodisForSequenceClassification",
    "CodisForTextAssignment",
    "CodisForVisualEntailment",
    "CodisForVisualQuestionAnswering",
    "CodisForVisualReasoning",
    "CodisModel",
    "CodisPreTrainedModel",
]
