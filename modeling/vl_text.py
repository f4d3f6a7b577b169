"""The text tower of families that fuse: BERT's layers over a text, alone or with an image that they read.

R rows of text, T positions, C contexts (images, say) of S positions, D width.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig

from .vl_fusion import FusionLayer, TextEmbeddings, context_mask_of, self_mask


class TextEncoder(nn.Module):
    """
    One stack of layers for a text alone and for a text that reads a context by cross-attention.

    The first `num_text_layers` read a text alone. `num_fusion_layers` more stand above them, have cross-attention, and
    take the text's states from below (ALBEF: 6 and 6). Where there are none, the text's own layers have
    cross-attention, and begin at the text's embeddings when they fuse (SIMLA, section 2.5).

    Attributes:
        first_fusion (`int`): The first layer with cross-attention.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        depth = config.num_text_layers + config.num_fusion_layers

        # without layers of fusion above them, all layers fuse
        self.first_fusion = config.num_text_layers if config.num_fusion_layers else 0
        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList([FusionLayer(config, number >= self.first_fusion) for number in range(depth)])

    def begin(self, input_ids: torch.Tensor, key_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """A text below the first layer that could read a context, for `alone` and `fuse`. (R, T) -> (R, T, D)."""
        embeddings = self.embeddings(input_ids)  # (R, T, D)
        return self._through(self.layers[: self.first_fusion], embeddings, key_mask, **kwargs)

    def alone(self, hidden_states: torch.Tensor, key_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """The rest of the layers that read a text alone; none where others fuse. (R, T, D) -> (R, T, D)."""
        layers = self.layers[self.first_fusion : self.config.num_text_layers]
        return self._through(layers, hidden_states, key_mask, **kwargs)

    def _through(
        self, layers: Iterable[FusionLayer], hidden_states: torch.Tensor, key_mask: torch.Tensor | None, **kwargs
    ) -> torch.Tensor:
        mask = self_mask(self.config, hidden_states, key_mask)
        for layer in layers:
            hidden_states = layer(hidden_states, mask, **kwargs)  # (R, T, D)
        return hidden_states

    def fuse(
        self,
        hidden_states: torch.Tensor,
        key_mask: torch.Tensor | None,
        context: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        context_index: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        The layers with cross-attention: (R, T, D) -> (R, T, D).

        Args:
            hidden_states (`(R, T, D)`): From `begin`, or vectors that pass as embeddings.
            key_mask (`(R, T)`): 1 for real positions; None for all.
            context (`(C, S, D)`): What cross-attention reads.
            context_mask (`(R, S)`): Its real positions, by row; None for all.
            context_index (`(R,)`): Which context a row reads; row r reads context r when None.
        """
        # what may be attended in the text, and in the context
        mask = self_mask(self.config, hidden_states, key_mask)
        across = context_mask_of(self.config, hidden_states, context, context_mask)
        for layer in self.layers[self.first_fusion :]:
            hidden_states = layer(hidden_states, mask, context, across, context_index, **kwargs)  # (R, T, D)
        return hidden_states


__all__ = ["TextEncoder"]
