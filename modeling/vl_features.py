"""What a class over any family's tower is asked for: embeddings by name, retrieval by cosine, masked tokens.

B rows, L positions of `input_ids`, P embedding width, D width, V tokens of the vocabulary.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .vl_inputs import check_images_alone, check_text_alone
from .vl_outputs import ImageTextRetrievalOutput, VisionLanguageModelOutput, without_patches


class RetrievalFeatures:
    """Beside `PreTrainedModel`: the tower is the attribute that `base_model_prefix` names, or the model itself."""

    @property
    def tower(self) -> nn.Module:
        return getattr(self, self.base_model_prefix, self)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Text alone: (B, L) -> `pooler_output` (B, P). A family that reads pairs in the joint layout accepts a text in
        it, and passes over the placeholders. Raises `ValueError` when pictures come along.
        """
        check_text_alone(pixel_values)

        # a text in the joint layout, with its placeholders hidden
        if self.config.pair_layout == "joint":
            is_text = input_ids != self.config.image_token_id  # (B, L)
            attention_mask = is_text.long() if attention_mask is None else attention_mask * is_text
            # a hidden placeholder must not be an id that the checks take for a patch
            input_ids = torch.where(is_text, input_ids, self.config.pad_token_id or 0)
        return self._features(self.tower(input_ids, attention_mask, return_dict=True, **kwargs))

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.FloatTensor, input_ids: torch.LongTensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Pictures alone: (B, C, H, W) -> `pooler_output` (B, P). `input_ids` may hold [CLS] and the placeholders of the
        joint layout. Raises `ValueError` when a text comes along.
        """
        check_images_alone(input_ids, pixel_values, self.config)
        return self._features(self.tower(input_ids=input_ids, pixel_values=pixel_values, return_dict=True, **kwargs))

    @can_return_tuple
    def get_multimodal_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Picture and text, as the family reads pairs: `pooler_output` (B, P), of a tower for each the mean of the two
        unit embeddings. Raises `ValueError` when either is missing.
        """
        if pixel_values is None or input_ids is None:
            raise ValueError("get_multimodal_features expects both input_ids and pixel_values")
        return self._features(
            self.tower(
                input_ids=input_ids,
                attention_mask=attention_mask,
                pixel_values=pixel_values,
                return_dict=True,
                **kwargs,
            )
        )

    @staticmethod
    def _features(outputs: VisionLanguageModelOutput) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.pooler_output,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class CosineRetrieval(RetrievalFeatures):
    """Pictures against texts. A class of it has `scaled`: cosines (pictures, texts) to logits by its temperature."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        return_loss: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageTextRetrievalOutput:
        r"""
        Each modality is embedded alone, so the numbers of texts and pictures may differ.

        Args:
            input_ids, attention_mask (`(texts, L)`): [CLS] and tokens; placeholders are passed over.
            pixel_values (`(pictures, C, H, W)`): Normalised pictures.
            return_loss: Also the symmetric InfoNCE of the pairs; expects as many texts as pictures.

        Raises:
            ValueError: as the family's tower; `return_loss` without pairs.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("got neither input_ids nor pixel_values; expected text, pictures, or both")
        image_embeds = text_embeds = logits = None

        # each modality alone
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, return_dict=True, **kwargs)
            image_embeds = nn.functional.normalize(features.pooler_output, dim=-1)  # (pictures, P)
        if input_ids is not None:
            features = self.get_text_features(input_ids, attention_mask, return_dict=True, **kwargs)
            text_embeds = nn.functional.normalize(features.pooler_output, dim=-1)  # (texts, P)

        # all against all
        if image_embeds is not None and text_embeds is not None:
            logits = self.scaled(image_embeds @ text_embeds.T)  # (pictures, texts)
        return ImageTextRetrievalOutput(
            loss=pair_loss(logits) if return_loss else None,
            logits_per_image=logits,
            logits_per_text=logits.T if logits is not None else None,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
        )


def pair_loss(logits: torch.Tensor | None) -> torch.Tensor:
    """Symmetric InfoNCE of pairs, logits (pictures, texts). Raises `ValueError` without as many texts as pictures."""
    if logits is None or logits.shape[0] != logits.shape[1]:
        got = "one modality" if logits is None else f"{logits.shape[0]} pictures and {logits.shape[1]} texts"
        raise ValueError(f"return_loss expects pairs, got {got}")
    labels = torch.arange(logits.shape[0], device=logits.device)  # (pairs,), the diagonal
    return (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2


class TokenPredictions:
    """Beside `PreTrainedModel`: `lm_head` is a `LanguageModelHead`, whose decoder may be the embeddings themselves."""

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.decoder = new_embeddings


class MaskedTokens(TokenPredictions):
    """The language-model head on every state of the tower, which the attribute of `base_model_prefix` is."""

    # the mean is over all the tokens of a step, however they are spread over its batches
    accepts_loss_kwargs = True

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """
        `logits` (B, L, V) speak of the positions of `input_ids`; `labels` (B, L), -100 where there is no loss. The
        loss is a sum over `num_items_in_batch`, which Trainer counts over the batches of a step; the mean when None.
        """
        if input_ids is None:
            raise ValueError(f"{type(self).__name__} expects input_ids, got None")
        tower = getattr(self, self.base_model_prefix)
        outputs = tower(input_ids, attention_mask, pixel_values, return_dict=True, **kwargs)

        # the places that ids speak of
        states = without_patches(outputs.last_hidden_state, input_ids.shape[1])  # (B, L, D)
        logits = self.lm_head(states)  # (B, L, V)
        loss = None
        if labels is not None:
            options = {"vocab_size": self.config.vocab_size, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, **options)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["CosineRetrieval", "MaskedTokens", "RetrievalFeatures", "TokenPredictions"]
