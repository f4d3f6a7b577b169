"""The transformer layers of every family, and the packing of several streams into one batch of tokens.

B pairs, L = S + W positions of a stream, S prefix positions ([CLS], or [CLS] and patches), W slots of a text, D width,
X any width, H heads, d = D / H, n tokens of the packed batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10, which pads instead
    varlen_attn = None


@dataclass
class Stream:
    """
    One stream of a packed batch: a rectangle of B x S prefix tokens, then the real tokens of B texts, concatenated.

    Attributes:
        name (`str`): Name by which other streams refer to it.
        batch_size, prefix (`int`): B and S.
        text_slots (`int`): W, slots a text has when padded; 0 for a stream without text.
        text_index (`torch.LongTensor` of shape `(n_text,)`, *optional*): Slot of each real token in the flat (B, W).
        context (`str`, *optional*): Stream whose keys and values this one attends to; its own if None. F(X|Y).
        attention_mask: Mask for (this stream, its context), in the form that the attention implementation needs.
    """

    name: str
    batch_size: int
    prefix: int
    text_slots: int = 0
    text_index: torch.Tensor | None = None
    context: str | None = None
    attention_mask: object = None

    @property
    def length(self) -> int:
        return self.prefix + self.text_slots

    def pad(self, prefix: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        """(B, S, X) and (n_text, X) -> (B, L, X), zeros where there is no token."""
        if text is None:
            return prefix
        slots = text.new_zeros(self.batch_size * self.text_slots, text.shape[-1])  # (B * W, X)
        slots = slots.index_copy(0, self.text_index, text)
        return torch.cat([prefix, slots.view(self.batch_size, self.text_slots, -1)], dim=1)

    def unpad(self, padded: torch.Tensor) -> list[torch.Tensor]:
        """(B, L, X) -> the stream's rows: (B * S, X) and, if it has a text, (n_text, X)."""
        if self.text_index is None:
            return [padded.flatten(0, 1)]
        prefix, slots = padded.split([self.prefix, self.text_slots], dim=1)  # (B, S, X), (B, W, X)
        return [prefix.flatten(0, 1), slots.flatten(0, 1).index_select(0, self.text_index)]

    def key_mask(self, text_mask: torch.Tensor, skip_cls: bool = False) -> torch.Tensor | None:
        """Which of the L positions may be attended. Real tokens (B, W) -> (B, L), or None for all."""
        if not self.text_slots and not skip_cls:
            return None
        mask = text_mask.new_ones(self.batch_size, self.length)
        if self.text_slots:
            mask[:, self.prefix :] = text_mask
        if skip_cls:
            mask[:, 0] = 0
        return mask

    def implementation(self, config: PreTrainedConfig) -> str:
        """
        The attention implementation; sdpa for F(X|Y) under flash, whose padding helper assumes equal queries and keys.
        """
        flash = self.context is not None and "flash" in config._attn_implementation
        return "sdpa" if flash else config._attn_implementation

    def set_mask(self, config: PreTrainedConfig, key_mask: torch.Tensor | None, like: torch.Tensor) -> None:
        """Prepares `attention_mask` from the context's `key_mask` (B, L_context); `like` gives dtype and device."""
        if key_mask is None:
            self.attention_mask = None
            return

        # a boolean mask for sdpa, the same for every query
        if self.implementation(config) != config._attn_implementation:
            self.attention_mask = key_mask[:, None, None, :].bool().expand(-1, 1, self.length, -1)
            return

        # only shapes, dtype and device of these are read
        queries = like.new_empty(self.batch_size, self.length, 1)
        keys = like.new_empty(self.batch_size, key_mask.shape[1], 1)
        self.attention_mask = create_bidirectional_mask(
            config=config,
            inputs_embeds=queries,
            attention_mask=key_mask,
            encoder_hidden_states=keys,
            # deciding from its values whether a mask can be omitted would make an accelerator synchronise
            allow_is_bidirectional_skip=like.device.type == "cpu",
        )


@dataclass
class Sequences:
    """
    Concatenated sequences of unequal length, each attending to itself: FlashAttention's form, without padding.

    Attributes:
        starts (`torch.IntTensor` of shape `(R + 1,)`): Where each of the R sequences begins; last, where all end.
        longest (`int`): Maximum sequence length; known on the host, so that it need not synchronise with the device.
    """

    starts: torch.Tensor
    longest: int


def sequences_of(streams: list[Stream], text_mask: torch.Tensor) -> tuple[torch.Tensor, Sequences]:
    """
    New index (n,) of each token of packed streams so that the tokens of a row are contiguous, and the sequences.
    `text_mask` (B, W) says which slots hold a token. A token's index is the number of tokens before it, because
    `text_index` ascends.
    """
    counts = text_mask.sum(1)  # (B,)
    before = counts.cumsum(0) - counts  # (B,), tokens of the texts before a row's
    places = []
    starts = []
    end = 0

    # prefixes of the stream, then its tokens, as they are packed
    for stream in streams:
        first = torch.arange(stream.batch_size, device=text_mask.device) * stream.prefix + end  # (B,)
        if stream.text_index is not None:
            first = first + before
        places.append((first[:, None] + torch.arange(stream.prefix, device=text_mask.device)).flatten())  # (B * S,)
        end += stream.batch_size * stream.prefix
        if stream.text_index is not None:
            row = stream.text_index // stream.text_slots  # (n_tokens,)
            number = torch.arange(len(row), device=first.device)
            places.append((row + 1 - stream.batch_size) * stream.prefix + number + end)  # (n_tokens,)
            end += len(stream.text_index)
        starts.append(first)
    starts.append(starts[0].new_full((1,), end))
    return torch.cat(places), Sequences(torch.cat(starts).int(), max(stream.length for stream in streams))


def attends_unpadded(config: PreTrainedConfig, streams: list[Stream], like: torch.Tensor, training: bool) -> bool:
    """
    Whether the kernel for unequal lengths can be used: on CUDA, in half precision, without cross-stream attention.
    """
    if varlen_attn is None or like.device.type != "cuda" or config._attn_implementation != "sdpa":
        return False

    # the dtype that attention will see, not that of the weights
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else like.dtype
    width = config.hidden_size // config.num_attention_heads
    alone = all(stream.context is None for stream in streams) and not (training and config.attention_dropout)
    return alone and autocast in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256


def split_streams(packed: torch.Tensor, streams: list[Stream]) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """
    (n, X) -> by stream, its prefix (B, S, X) and its text (n_text, X) or None. One split, so that the backward is
    one concatenation: a slice for each part would fill and add a tensor of n rows for each.
    """
    # the lengths in the order of packing: prefix, text, prefix, text ...
    sizes = []
    for stream in streams:
        sizes.append(stream.batch_size * stream.prefix)
        if stream.text_index is not None:
            sizes.append(len(stream.text_index))
    parts = iter(packed.split(sizes))
    return {
        stream.name: (
            next(parts).view(stream.batch_size, stream.prefix, -1),
            next(parts) if stream.text_index is not None else None,
        )
        for stream in streams
    }


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(Q K^T / sqrt(d)) V, equation 8. (B, H, L, d) -> (B, L, H, d) and weights (B, H, L, L)."""
    # scale the smaller factor; softmax sums in fp32 for any input dtype, so its result needs no cast
    scores = (query * scaling) @ key.transpose(2, 3)  # (B, H, L, L)
    if attention_mask is not None:
        # a mask is made in the dtype of the states; under autocast, in fp32, it would make the softmax fp32 too
        lowest = torch.finfo(scores.dtype).min
        scores = scores + attention_mask.clamp(min=lowest).to(scores.dtype)
    weights = nn.functional.softmax(scores, dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SelfAttention(nn.Module):
    """Multi-head attention with one fused projection, over padded sequences or over packed streams."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, L, 3D) -> query, key, value, each (B, H, L, d)."""
        return qkv.unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: object,
        implementation: str | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, H, L, d), (B, H, L', d) twice -> (B, L, D) and the weights where the implementation gives them."""
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation or self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return output.flatten(2), weights

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: object = None,
        streams: list[Stream] | Sequences | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        qkv = self.qkv(hidden_states)  # (B, L, 3D) or (n, 3D)

        # unpadded sequences, with the kernel for unequal lengths
        if isinstance(streams, Sequences):
            query, key, value = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(-3)  # (n, H, d) each
            starts, longest = streams.starts, streams.longest
            output = varlen_attn(query, key, value, starts, starts, longest, longest, scale=self.scaling)
            return self.proj(output.flatten(-2)), None  # (n, D)

        # one padded sequence per row
        if streams is None:
            output, weights = self._attend(*self._heads(qkv), attention_mask, **kwargs)
            return self.proj(output), weights

        # packed streams, each padded for its own call, with its own keys or those of its context
        parts = split_streams(qkv, streams)
        heads = {stream.name: self._heads(stream.pad(*parts[stream.name])) for stream in streams}
        rows = []
        for stream in streams:
            query, (_, key, value) = heads[stream.name][0], heads[stream.context or stream.name]
            implementation = stream.implementation(self.config)
            output, _ = self._attend(query, key, value, stream.attention_mask, implementation, **kwargs)  # (B, L, D)
            rows += stream.unpad(output)  # (B * S, D), (n_text, D)
        return self.proj(torch.cat(rows)), None  # (n, D)


@dataclass
class Watch:
    """
    A request for the attention probabilities of a layer in one forward pass. It is passed along as an argument, so
    that the module, which other threads may be using, is not changed.

    Attributes:
        attention (`nn.Module`): The layer.
        weights (`list[torch.Tensor]`): Its probabilities (B, H, L, S), one entry for each time the pass comes through;
            differentiable, whatever kernel the model is set to and whether or not its weights are frozen.
    """

    attention: nn.Module
    weights: list[torch.Tensor] = field(default_factory=list)


def attend(
    attention: nn.Module, watch: Watch | None, hidden_states: torch.Tensor, *args, **kwargs
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention(hidden_states, ...)`, recorded in `watch` if it requests this layer."""
    if watch is None or watch.attention is not attention:
        return attention(hidden_states, *args, **kwargs)
    # a leaf: the gradient with respect to the attention weights needs nothing of the layers before
    leaf = hidden_states.detach().requires_grad_()
    output, weights = attention(leaf, *args, implementation="eager", **kwargs)
    watch.weights.append(weights)
    return output, weights


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def run_layers(layers: nn.Sequential, states: torch.Tensor) -> torch.Tensor:
    """
    `layers(states)`, except that batch norms that are frozen while others train, as with an adapter, also freeze
    their statistics, because an adapter does not save these. A teacher, which runs without gradient, uses batch
    statistics.
    """
    norms = [layer for layer in layers if isinstance(layer, BATCH_NORMS)]
    learns = any(parameter.requires_grad for norm in norms for parameter in norm.parameters())
    if not norms or learns or not layers.training or not torch.is_grad_enabled():
        return nn.Sequential.forward(layers, states)
    for layer in layers:
        if isinstance(layer, BATCH_NORMS):
            mean, variance = layer.running_mean, layer.running_var
            states = nn.functional.batch_norm(states, mean, variance, layer.weight, layer.bias, eps=layer.eps)
        else:
            states = layer(states)
    return states


class FeedForward(nn.Module):
    def __init__(self, config: PreTrainedConfig, intermediate_size: int | None = None):
        super().__init__()
        width = config.intermediate_size if intermediate_size is None else intermediate_size
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class PreNormLayer(GradientCheckpointingLayer):
    """ViT's block: x + attention(norm(x)), then x + feed-forward(norm(x)). Padded (B, L, D) or packed (n, D)."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: object = None,
        streams: list[Stream] | Sequences | None = None,
        watch: Watch | None = None,
        **kwargs,
    ) -> torch.Tensor:
        attended, _ = attend(self.attention, watch, self.norm1(hidden_states), attention_mask, streams, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.norm2(hidden_states))
