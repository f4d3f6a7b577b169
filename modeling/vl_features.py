"""Methods shared by the classes of all families: embeddings by name, retrieval by cosine, masked tokens.

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
    """Mixin for a `PreTrainedModel` whose tower is the attribute `base_model_prefix`, or the model itself."""

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
        Embeds texts: (B, L) -> `pooler_output` (B, P). A family with the joint layout also accepts a text in
        that layout, and ignores the placeholders. Raises `ValueError` if images are given.
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
        Embeds images: (B, C, H, W) -> `pooler_output` (B, P). `input_ids` may contain [CLS] and the placeholders of
        the joint layout. Raises `ValueError` if a text is given.
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
        Embeds image-text pairs: `pooler_output` (B, P); for families with two towers it is the mean of the two
        unit embeddings. Raises `ValueError` if either is missing.
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
    """
    Scores images against texts. Subclasses define `scaled`: cosines (images, texts) to logits by the temperature.
    """

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
        Each modality is embedded separately, so the numbers of texts and images may differ.

        Args:
            input_ids, attention_mask (`(texts, L)`): [CLS] and tokens; placeholders are ignored.
            pixel_values (`(images, C, H, W)`): Normalised images.
            return_loss: Also return the symmetric InfoNCE of the pairs; needs as many texts as images.

        Raises:
            ValueError: errors of the family's tower; `return_loss` without pairs.
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
    """Symmetric InfoNCE of pairs, from logits (images, texts). Raises `ValueError` if their numbers differ."""
    if logits is None or logits.shape[0] != logits.shape[1]:
        got = "one modality" if logits is None else f"{logits.shape[0]} pictures and {logits.shape[1]} texts"
        raise ValueError(f"return_loss expects pairs, got {got}")
    labels = torch.arange(logits.shape[0], device=logits.device)  # (pairs,), the diagonal
    return (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2


class TokenPredictions:
    """
    Mixin for a `PreTrainedModel` with a `LanguageModelHead` as `lm_head`, whose decoder may be tied to the embeddings.
    """

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.decoder = new_embeddings


class MaskedTokens(TokenPredictions):
    """Masked language modelling: the head on every state of the tower, which is the attribute `base_model_prefix`."""

    # the loss is a mean over all tokens of a step, across its accumulated batches
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
        `logits` (B, L, V) correspond to the positions of `input_ids`; `labels` (B, L) are -100 where there is no loss.
        The loss is the sum divided by `num_items_in_batch`, which Trainer counts over the batches of a step; the mean
        if None.
        """
        if input_ids is None:
            raise ValueError(f"{type(self).__name__} expects input_ids, got None")
        tower = getattr(self, self.base_model_prefix)
        outputs = tower(input_ids, attention_mask, pixel_values, return_dict=True, **kwargs)

        # states at the positions of the ids, without patches
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
