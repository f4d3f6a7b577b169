"""BERT's post-norm transformer, with cross-attention to another sequence between self-attention and feed-forward.

R rows, L positions of a row, C contexts (such as images) of S positions, D width, H heads, d = D / H.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .vl_layers import FeedForward, Watch, attend, eager_attention_forward


class TextEmbeddings(nn.Module):
    """Tokens, learned positions, norm, dropout; no token types (SIMLA's code). Ids (R, L) or vectors (R, L, D)."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.text_layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        tokens = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # (R, L, D)
        # positions beyond the table are padding: longer texts and larger images were rejected before
        last = self.position_embeddings.num_embeddings - 1
        positions = torch.arange(tokens.shape[1], device=tokens.device).clamp(max=last)  # (L,)
        return self.dropout(self.norm(tokens + self.position_embeddings(positions)))


class FusionAttention(nn.Module):
    """Multi-head self-attention, or cross-attention to a context that several rows may share."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.text_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def heads(self, states: torch.Tensor) -> torch.Tensor:
        """(R, L, D) -> (R, H, L, d)."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor | None = None,
        attention_mask: object = None,
        context_index: torch.Tensor | None = None,
        implementation: str | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        (R, L, D) -> (R, L, D), and the weights (R, H, L, S) if the implementation returns them.

        `context` (C, S, D) is attended to instead of the row itself. Keys and values are computed once per context;
        `context_index` (R,) is the index of each row's context.
        """
        source = hidden_states if context is None else context
        key, value = self.heads(self.key(source)), self.heads(self.value(source))  # (C, H, S, d)
        if context_index is not None:
            key, value = key.index_select(0, context_index), value.index_select(0, context_index)  # (R, H, S, d)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation or self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            self.heads(self.query(hidden_states)),
            key,
            value,
            attention_mask,
            dropout=self.config.text_attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.proj(output.flatten(2)), weights

    def first_row(self, hidden_states: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of the first position, before dropout: (R, L, D), 1 for real keys (R, L) -> (R, H, L)."""
        query = self.heads(self.query(hidden_states[:, :1]))  # (R, H, 1, d)
        scores = (query * self.scaling) @ self.heads(self.key(hidden_states)).transpose(2, 3)  # (R, H, 1, L)
        if key_mask is not None:
            hidden = key_mask[:, None, None, :] == 0
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        return scores.softmax(-1)[:, :, 0]


class FusionLayer(GradientCheckpointingLayer):
    """
    norm(x + attention), norm(x + cross-attention) if there is a context, norm(x + feed-forward), with dropout on each
    sum's second term. (R, L, D) -> (R, L, D).
    """

    def __init__(self, config: PreTrainedConfig, cross_attention: bool = True, is_causal: bool = False):
        super().__init__()
        self.attention = FusionAttention(config)
        self.attention.is_causal = is_causal
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.text_layer_norm_eps)
        self.cross_attention = FusionAttention(config) if cross_attention else None
        self.cross_norm = nn.LayerNorm(config.hidden_size, eps=config.text_layer_norm_eps) if cross_attention else None
        self.feed_forward = FeedForward(config, config.text_intermediate_size)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.text_layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: object = None,
        context: torch.Tensor | None = None,
        context_mask: object = None,
        context_index: torch.Tensor | None = None,
        first_row: bool = False,
        key_mask: torch.Tensor | None = None,
        watch: Watch | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """With `first_row`, returns the attention of the first position (R, H, L); `key_mask` is 1 for real keys."""
        if first_row:  # called through the layer, so that a sharding engine gathers its weights
            return self.attention.first_row(hidden_states, key_mask)
        # self-attention
        attended, _ = attend(self.attention, watch, hidden_states, None, attention_mask, **kwargs)
        hidden_states = self.attention_norm(self.dropout(attended) + hidden_states)
        # cross-attention
        if context is not None:
            attended, _ = attend(
                self.cross_attention, watch, hidden_states, context, context_mask, context_index, **kwargs
            )
            hidden_states = self.cross_norm(self.dropout(attended) + hidden_states)
        return self.output_norm(self.dropout(self.feed_forward(hidden_states)) + hidden_states)


def self_mask(config: PreTrainedConfig, states: torch.Tensor, key_mask: torch.Tensor | None, causal: bool = False):
    """Self-attention mask in the form of the current implementation, from 1 for real positions (R, L) or None."""
    if causal:
        # the cache is passed by position: transformers 5.24 renames the argument and gives it no default
        return create_causal_mask(config, states, key_mask, None)
    return create_bidirectional_mask(
        config=config,
        inputs_embeds=states,
        attention_mask=key_mask,
        # deciding whether to skip the mask reads its values, which would synchronise an accelerator
        allow_is_bidirectional_skip=states.device.type == "cpu",
    )


def context_mask_of(
    config: PreTrainedConfig, states: torch.Tensor, context: torch.Tensor, key_mask: torch.Tensor | None
):
    """Cross-attention mask of queries (R, L, D), from 1 for real positions of each row's context (R, S)."""
    if key_mask is None:
        return None
    keys = context.new_empty(states.shape[0], key_mask.shape[1], 1)
    return create_bidirectional_mask(
        config=config,
        inputs_embeds=states,
        attention_mask=key_mask,
        encoder_hidden_states=keys,
        allow_is_bidirectional_skip=states.device.type == "cpu",
    )


__all__ = ["FusionAttention", "FusionLayer", "TextEmbeddings", "context_mask_of", "self_mask"]
