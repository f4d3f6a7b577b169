"""Model of the toy family. B rows, N patches, W slots, M masked tokens, D width, V vocabulary."""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


@strict
class ToyConfig(PreTrainedConfig):
    """Texts and images through the same layer; a pair is read as text and image apart."""

    model_type = "toy"
    pair_layout = "separate"

    vocab_size: int = 300
    hidden_size: int = 16
    image_size: int = 32
    patch_size: int = 16
    max_text_length: int = 8
    dropout: float | int = 0.1
    pad_token_id: int | None = 0
    cls_token_id: int = 101
    mask_token_id: int = 103
    image_token_id: int = 1

    @classmethod
    def from_size(cls, size: str, **overrides) -> "ToyConfig":
        return cls(**overrides)  # there is one size


class ToyModel(PreTrainedModel):
    config: ToyConfig

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stem = nn.Linear(3 * config.patch_size**2, config.hidden_size)  # pairs alone touch it
        self.layer = nn.Sequential(nn.Linear(config.hidden_size, config.hidden_size), nn.GELU())
        self.drop = nn.Dropout(config.dropout)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None) -> BaseModelOutputWithPooling:
        if pixel_values is None:
            states = self.drop(self.layer(self.embed_tokens(input_ids)))  # (B, 1 + W, D)
            mask = attention_mask[..., None]
            return BaseModelOutputWithPooling(states, (states * mask).sum(1) / mask.sum(1))
        side = self.config.patch_size
        patches = nn.functional.unfold(pixel_values, side, stride=side).transpose(1, 2)  # (B, N, 3 * p * p)
        states = self.drop(self.layer(self.stem(patches)))  # (B, N, D)
        return BaseModelOutputWithPooling(states, states.mean(1))


class ToyForPreTraining(PreTrainedModel):
    config: ToyConfig
    base_model_prefix = "toy"
    _no_split_modules = ["Sequential"]

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.toy = ToyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)  # texts alone touch it
        self.logit_scale = nn.Parameter(torch.zeros(1))  # pairs alone touch it
        self.post_init()

    def forward(self, input_ids, attention_mask, pixel_values=None, mlm_places=None) -> dict[str, torch.Tensor]:
        text = self.toy(input_ids, attention_mask)
        output = {"text": text.pooler_output}  # (B, D)
        if mlm_places is not None:
            output["logits"] = self.lm_head(text.last_hidden_state.flatten(0, 1)[mlm_places])  # (M, V)
        if pixel_values is not None:
            output |= {"image": self.toy(pixel_values=pixel_values).pooler_output, "logit_scale": self.logit_scale}
        return output
