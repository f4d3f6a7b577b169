"""Heads on top of the transformer layers: contrastive, masked-language and masked-image heads."""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN

from .vl_layers import run_layers

# (width, affine) -> the normalisation after a linear layer of a head
HEAD_NORMS = {
    "batch": lambda width, affine: nn.BatchNorm1d(width, affine=affine),
    "layer": lambda width, affine: nn.LayerNorm(width, elementwise_affine=affine),
    "none": lambda width, affine: None,
}


class HeadLinear(nn.Linear):
    """
    A linear layer with torch's default initialisation: MoCo-v3 creates its heads after initialising the trunk. It is a
    separate class because transformers initialises, in models with custom code, only modules that directly hold
    parameters.
    """

    def reset(self) -> None:
        # U(-1 / sqrt(fan-in), 1 / sqrt(fan-in))
        bound = self.in_features**-0.5
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def resized(self, out_features: int) -> "HeadLinear":
        """The same layer with more outputs, the new ones random, or with fewer."""
        options = {"device": self.weight.device, "dtype": self.weight.dtype}
        head = HeadLinear(self.in_features, out_features, self.bias is not None, **options)
        head.requires_grad_(self.weight.requires_grad)

        # rows that both have
        kept = min(self.out_features, out_features)
        for name, value in self.named_parameters():
            head.get_parameter(name)[:kept] = value[:kept]
        return head


class ContrastiveHead(nn.Sequential):
    """
    MoCo-v3's projector or predictor: `num_layers` linear layers, normalisation and ReLU between them, normalisation
    without affine parameters at the end. (R, D) -> (R, P). Zero layers mean the identity; one layer is just a linear
    layer.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int, norm: str):
        widths = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        layers = []
        for number, (narrow, wide) in enumerate(zip(widths[:-1], widths[1:], strict=True), start=1):
            if num_layers == 0:
                break
            last = number == num_layers
            normalisation = None if num_layers == 1 else HEAD_NORMS[norm](wide, not last)

            # no bias before a norm, as in MoCo-v3's code
            layers.append(HeadLinear(narrow, wide, bias=normalisation is None))
            if normalisation is not None:
                layers.append(normalisation)
            if not last:
                layers.append(nn.ReLU())
        super().__init__(*layers)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return run_layers(self, states)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, input_dim: int, num_layers: int) -> "ContrastiveHead":
        """A head to `projection_dim`, with the configuration's widths and norm."""
        return cls(input_dim, config.projection_hidden_size, config.projection_dim, num_layers, config.head_norm)


class LanguageModelHead(nn.Module):
    """BERT's head: dense, GELU, norm, then the tied embeddings with a bias. (..., D) -> (..., V)."""

    def __init__(self, config: PreTrainedConfig, layer_norm_eps: float | None = None):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

        # a text tower may have an epsilon of its own
        eps = config.layer_norm_eps if layer_norm_eps is None else layer_norm_eps
        self.norm = nn.LayerNorm(config.hidden_size, eps=eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(self.activation(self.dense(hidden_states))))


class PixelHead(nn.Linear):
    """Predicts a patch's pixels from its state, without a decoder. (..., D) -> (..., p*p*C)."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config.hidden_size, config.patch_size**2 * config.num_channels)
