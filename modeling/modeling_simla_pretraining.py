"""SIMLA's pre-training forward: contrast, matching, masked tokens, masked patches and concepts in one call.

B pairs, N patches, S = 1 + N, T positions of a text with its [CLS], D width, P embedding width, M masked tokens,
K masked patches, V tokens of the text vocabulary, Z visual codes, H heads.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_simla import SimlaConfig
from .modeling_simla import SimlaModel, SimlaPreTrainedModel
from .vl_dual_encoder import ChooseNegatives, FusedPredictions, ImageTextMatching, check_passes
from .vl_features import RetrievalFeatures, TokenPredictions
from .vl_fusion import self_mask
from .vl_gradcam import GroundedConcepts, GroundedMatching
from .vl_heads import HeadLinear, LanguageModelHead
from .vl_inputs import check_inputs, check_masks

PASSES = ("contrast", "match", "tokens", "patches", "concepts", "keywords")


@dataclass
class SimlaPreTrainingOutput(ModelOutput):
    """
    Args:
        temperature (`(1,)`): The learnable divisor of cosines; None for a teacher, which has none.
        image_embeds, text_embeds (`(B, P)`): Unit embeddings (equation 1).
        image_states (`(B, S, D)`): Output of the visual encoder for unmasked images.
        itm_logits (`(3B, 2)`): Matching logits of the pairs, of each text with its negative image, and of each image
            with its negative text (equation 5).
        mlm_logits (`(M, V)`, or `(B, T, V)` without places): Logits of masked tokens, given the image (equation 6).
        mim_logits (`(K, Z)`, or `(B, N, Z)` without places): Logits of masked patches' codes, given the text
            (equation 6).
        text_context (`(B, T, D)`): Text states that the masked images attended to.
        concept_logits (`(B, V)`): Tokens predicted from the image (equation 8).
        keyword_attention (`(B, H, T)`): Attention of [CLS] in the last layer (supplement, section 3).
    """

    temperature: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    image_states: torch.FloatTensor | None = None
    itm_logits: torch.FloatTensor | None = None
    mlm_logits: torch.FloatTensor | None = None
    mim_logits: torch.FloatTensor | None = None
    text_context: torch.FloatTensor | None = None
    concept_logits: torch.FloatTensor | None = None
    keyword_attention: torch.FloatTensor | None = None


class SimlaForPreTraining(
    FusedPredictions,
    GroundedConcepts,
    TokenPredictions,
    ImageTextMatching,
    GroundedMatching,
    RetrievalFeatures,
    SimlaPreTrainedModel,
):
    """
    Both encoders with everything that is trained: temperature, matching, language-model, code and concept heads. It
    computes embeddings and logits; the objective owns losses, teacher, queues and negative sampling.
    """

    _tied_weights_keys = {"lm_head.decoder.weight": "simla.text.embeddings.word_embeddings.weight"}

    def __init__(self, config: SimlaConfig):
        super().__init__(config)
        self.simla = SimlaModel(config)
        self.temperature = nn.Parameter(torch.zeros(1))  # not 0-dim: ZeRO-3 cannot partition a scalar
        self.itm_head = HeadLinear(config.hidden_size, 2)
        self.lm_head = LanguageModelHead(config, config.text_layer_norm_eps)
        self.mim_head = HeadLinear(config.hidden_size, config.num_visual_codes)
        width = config.projection_dim if config.concept_input == "projected" else config.hidden_size
        self.concept_head = HeadLinear(width, config.vocab_size)
        self.post_init()

    def _resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        # transformers resizes one input and one output table; the concept head predicts tokens too
        tokens = super()._resize_token_embeddings(*args, **kwargs)
        self.concept_head = self.concept_head.resized(tokens.num_embeddings)
        return tokens

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        pixel_values: torch.FloatTensor,
        masked_input_ids: torch.LongTensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        mlm_places: torch.LongTensor | None = None,
        mim_places: torch.LongTensor | None = None,
        passes: tuple[str, ...] = ("contrast", "tokens", "patches", "concepts"),
        choose_negatives: ChooseNegatives | None = None,
        image_states: torch.FloatTensor | None = None,
        text_context: torch.FloatTensor | None = None,
        checked: bool = False,
        **kwargs,
    ) -> SimlaPreTrainingOutput:
        r"""
        Args:
            input_ids, attention_mask (`(B, T)`): Texts, padded on the right.
            pixel_values (`(B, C, H, W)`): Their images.
            masked_input_ids (`(B, T)`): The same ids after masking, for "tokens".
            bool_masked_pos (`(B, N)`): True for masked patches, for "patches".
            mlm_places (`(M,)`), mim_places (`(K,)`): Indices of the tokens and patches to predict in the flat (B, T)
                and (B, N); None predicts all.
            passes: What to compute, of `contrast`, `match`, `tokens`, `patches`, `concepts`, `keywords`.
            choose_negatives: For "match"; called after the embeddings of "contrast". A pure function of tensors.
            image_states (`(B, S, D)`), text_context (`(B, T, D)`): Replace this model's own, as the teacher uses the
                student's for keywords and masked patches (SIMLA's code).
            checked: Whether texts and images were already validated; the shapes of masks are checked in any case.

        Raises:
            ValueError: a pass is unknown or lacks an input that it needs, and the errors of [`SimlaModel`].
        """
        check_needs(passes, masked_input_ids, bool_masked_pos, choose_negatives)
        if not checked:
            check_inputs(self.simla, input_ids, attention_mask, pixel_values)
        check_masks(input_ids, pixel_values, masked_input_ids, bool_masked_pos, self.config.patch_size)
        output = SimlaPreTrainingOutput(temperature=self.temperature)

        # unmasked images, for all passes but "patches"
        if image_states is None and set(passes) - {"patches"}:
            image_states = self.simla.vision(pixel_values)  # (B, S, D)
        output.image_states = image_states

        # image and text embeddings in the contrastive space
        text_states = None
        if "contrast" in passes:
            text_states = self._embed_each(output, input_ids, attention_mask)  # (B, T, D)

        # texts that read an unmasked image: pairs, negatives, masked texts
        negatives = None
        if "match" in passes:
            negatives = choose_negatives(output.image_embeds, output.text_embeds, self.temperature)  # (B,), (B,)
        masked_ids = masked_input_ids if "tokens" in passes else None
        self.predict_fused(output, input_ids, attention_mask, negatives, masked_ids, mlm_places, self.simla.fuse)

        # masked images that read an unmasked text
        if "patches" in passes:
            if text_context is None:
                text_context = self._text_context(input_ids, attention_mask, text_states)
            output.text_context = text_context  # (B, T, D)
            masked_images = (pixel_values, bool_masked_pos, mim_places)
            output.mim_logits = self._predict_codes(*masked_images, text_context, attention_mask)  # (K, Z)

        # concepts of an image, and attention of a pair's [CLS]
        if "concepts" in passes:
            output.concept_logits = self.concept_head(self._concept_input(output, image_states))  # (B, V)
        if "keywords" in passes:
            output.keyword_attention = self._keyword_attention(input_ids, attention_mask, image_states)  # (B, H, T)
        return output

    def _embed_each(
        self, output: SimlaPreTrainingOutput, text_ids: torch.Tensor, text_mask: torch.Tensor
    ) -> torch.Tensor:
        """Writes the unit embeddings of images and texts to `output` and returns the text states (B, T, D)."""
        text_states = self.simla.encode_texts(text_ids, text_mask)  # (B, T, D)
        output.image_embeds = self.simla.embed_images(output.image_states)  # (B, P)
        output.text_embeds = self.simla.embed_texts(text_states)  # (B, P)
        return text_states

    def _concept_input(self, output: SimlaPreTrainingOutput, image_states: torch.Tensor) -> torch.Tensor:
        if self.config.concept_input == "cls":
            return image_states[:, 0]
        return self.simla.embed_images(image_states) if output.image_embeds is None else output.image_embeds

    def _keyword_attention(
        self, text_ids: torch.Tensor, text_mask: torch.Tensor, image_states: torch.Tensor
    ) -> torch.Tensor:
        """Attention of the multimodal [CLS] to the tokens in the last layer (supplement 3). -> (B, H, T)."""
        text = self.simla.text
        hidden_states = text.embeddings(text_ids)  # (B, T, D)
        mask = self_mask(self.config, hidden_states, text_mask)
        for layer in text.layers[:-1]:
            hidden_states = layer(hidden_states, mask, image_states)
        return text.layers[-1](hidden_states, first_row=True, key_mask=text_mask)

    def _text_context(
        self, text_ids: torch.Tensor, text_mask: torch.Tensor, text_states: torch.Tensor | None
    ) -> torch.Tensor:
        """The text states that a masked image attends to, (B, T, D)."""
        if self.config.mim_context == "embeddings":
            return self.simla.text.embeddings(text_ids)
        return self.simla.encode_texts(text_ids, text_mask) if text_states is None else text_states

    def _predict_codes(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        mim_places: torch.Tensor | None,
        text_context: torch.Tensor,
        text_mask: torch.Tensor,
    ) -> torch.Tensor:
        """
        Runs the masked image's tokens through the text encoder, with the text as context: (B, N, Z) or (K, Z). They
        get BERT's positions, norm and dropout, as word embeddings do.
        """
        text, positions = self.simla.text, self.config.max_position_embeddings
        if bool_masked_pos.shape[1] >= positions:
            raise ValueError(
                f"the pass 'patches' gives each token of an image a position, and got {bool_masked_pos.shape[1]} "
                f"patches and [CLS]; expected {positions} at most (max_position_embeddings)"
            )
        tokens = text.embeddings(inputs_embeds=self.simla.vision(pixel_values, bool_masked_pos))  # (B, S, D)
        states = text.fuse(tokens, None, text_context, text_mask)[:, 1:]  # (B, N, D)
        if mim_places is not None:
            states = states.flatten(0, 1).index_select(0, mim_places)  # (K, D)
        return self.mim_head(states)


def check_needs(
    passes: tuple[str, ...],
    masked_input_ids: torch.Tensor | None,
    bool_masked_pos: torch.Tensor | None,
    choose_negatives: ChooseNegatives | None,
) -> None:
    """Raises `ValueError` for passes that are unknown or lack an input that they need."""
    needs = {
        "tokens": ("masked_input_ids", masked_input_ids),
        "patches": ("bool_masked_pos", bool_masked_pos),
        "match": ("choose_negatives", choose_negatives),
    }
    check_passes(passes, PASSES, needs)
    if "match" in passes and "contrast" not in passes:
        raise ValueError(f"the pass 'match' needs 'contrast' beside it, got {list(passes)}")


__all__ = ["SimlaForPreTraining", "SimlaPreTrainingOutput"]
