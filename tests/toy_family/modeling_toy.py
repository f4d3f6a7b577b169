"""Model of the toy family. B rows, N patches, W slots, M masked tokens, D width, V vocabulary."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_toy import ToyConfig


class ToyLayer(nn.Module):
    """(B, L, D) -> (B, L, D)."""

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.map = nn.Linear(config.hidden_size, config.hidden_size)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.drop(nn.functional.gelu(self.map(states)))


class ToyPreTrainedModel(PreTrainedModel):
    config: ToyConfig
    base_model_prefix = "toy"
    _no_split_modules = ["ToyLayer"]


class ToyModel(ToyPreTrainedModel):
    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stem = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)  # pairs alone touch it
        self.layer = ToyLayer(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None) -> BaseModelOutputWithPooling:
        if pixel_values is None:
            states = self.layer(self.words(input_ids))  # (B, 1 + W, D)
            mask = attention_mask[..., None]
            return BaseModelOutputWithPooling(states, (states * mask).sum(1) / mask.sum(1))
        side = self.config.patch_size
        patches = nn.functional.unfold(pixel_values, side, stride=side).transpose(1, 2)  # (B, N, C * p * p)
        states = self.layer(self.stem(patches))  # (B, N, D)
        return BaseModelOutputWithPooling(states, states.mean(1))


class ToyForPreTraining(ToyPreTrainedModel):
    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.toy = ToyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)  # texts alone touch it
        self.logit_scale = nn.Parameter(torch.zeros(1))  # pairs alone touch it
        self.post_init()

    def forward(self, input_ids, attention_mask, pixel_values=None, mlm_places=None) -> dict[str, torch.Tensor]:
        """All that a batch of a portion needs, in one call."""
        text = self.toy(input_ids, attention_mask)
        output = {"text": text.pooler_output}  # (B, D)
        if mlm_places is not None:
            output["logits"] = self.lm_head(text.last_hidden_state.flatten(0, 1)[mlm_places])  # (M, V)
        if pixel_values is not None:
            output["image"] = self.toy(pixel_values=pixel_values).pooler_output  # (B, D)
            output["logit_scale"] = self.logit_scale
        return output
