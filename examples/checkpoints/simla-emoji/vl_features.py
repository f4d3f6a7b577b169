"""The embeddings of the one space, asked for by name: text, pictures, or both. For every class that keeps a tower.

B rows, L positions of the joint layout, P embedding width.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .vl_inputs import check_one_modality
from .vl_outputs import VisionLanguageModelOutput


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
        Text alone: (B, L) -> `pooler_output` (B, P). The joint layout is accepted; its placeholders are passed over.
        Raises `ValueError` when pictures come along.
        """
        check_one_modality("get_text_features", input_ids, pixel_values, self.config.patch_size)
        is_word = input_ids != self.config.image_token_id
        real = is_word.long() if attention_mask is None else attention_mask * is_word
        # a hidden placeholder must not be an id that the checks take for a patch
        words = torch.where(is_word, input_ids, self.config.pad_token_id or 0)
        return self._features(self.tower(input_ids=words, attention_mask=real, return_dict=True, **kwargs))

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.FloatTensor, input_ids: torch.LongTensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Pictures alone: (B, C, H, W) -> `pooler_output` (B, P). `input_ids` may hold [CLS] and the placeholders.
        Raises `ValueError` when words come along.
        """
        check_one_modality("get_image_features", input_ids, pixel_values, self.config.patch_size)
        return self._features(self.tower(input_ids=input_ids, pixel_values=pixel_values, return_dict=True, **kwargs))

    @can_return_tuple
    def get_multimodal_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Picture and text as one sequence, in the joint layout: `pooler_output` (B, P).

        Raises `ValueError` when either is missing.
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


def pair_loss(logits: torch.Tensor | None) -> torch.Tensor:
    """Symmetric InfoNCE of pairs, logits (pictures, texts). Raises `ValueError` without as many texts as pictures."""
    if logits is None or logits.shape[0] != logits.shape[1]:
        got = "one modality" if logits is None else f"{logits.shape[0]} pictures and {logits.shape[1]} texts"
        raise ValueError(f"return_loss expects pairs, got {got}")
    labels = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2


__all__ = ["RetrievalFeatures", "pair_loss"]
