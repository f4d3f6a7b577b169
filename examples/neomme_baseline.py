"""transformers' NeoMME, one tower for both patches and words, with CLIP's loss: a row of the family comparison.

    python examples/neomme_baseline.py --config examples/configs/compare_oner.yaml --output_dir runs/neomme

The arguments are those of examples/pretrain.py; clip_baseline.py says which have no effect. NeoMME keeps its own stem
(an MLP per patch), its rotary positions, and mean pooling for the embedding. All layers use full attention.

Shapes: B pairs, N patches of a square grid, T words of the longest text, L positions of a sequence, D width.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from clip_baseline import WEIGHTS, Baseline, fit
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import NeoMMEConfig, NeoMMEModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from oner import OneRConfig
from oner.modeling.vl_embeddings import patchify
from oner.modeling.vl_outputs import VisionLanguageModelOutput
from oner.training.objectives.objective import Batch
from oner.training.run.parsing import parse_arguments
from oner.training.run.summary import STOPPED


class NeoMmeBaseline(Baseline):
    """A `NeoMMEModel` with the width, depth, heads, patches and vocabulary of `config`, and the interface of a
    retrieval model; embeddings are mean-pooled states."""

    def __init__(self, config: OneRConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.num_attention_heads
        self.tower = NeoMMEModel(
            NeoMMEConfig(
                vocab_size=config.vocab_size,
                embedding_rank=config.hidden_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                head_dim=config.hidden_size // heads,
                layer_types=["full_attention"] * config.num_hidden_layers,
                patch_size=config.patch_size,
                pad_token_id=config.pad_token_id,
                image_token_id=config.image_token_id,
                document_token_id=None,  # no document marker
            )
        )
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))

    @classmethod
    def from_directory(cls, directory: str | Path) -> "NeoMmeBaseline":
        """Loads a model written by `save`."""
        model = cls(OneRConfig.from_pretrained(directory))
        model.load_state_dict(load_file(Path(directory) / WEIGHTS))
        return model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor, Batch]:
        """Normalised images (B, D), normalised texts (B, D), and the scale of their products, (1,)."""
        words = ~(input_ids == self.config.image_token_id).any(0)  # (1 + N + T,)
        images = self.get_image_features(pixel_values).pooler_output
        texts = self.get_text_features(input_ids[:, words], attention_mask[:, words]).pooler_output
        return *(nn.functional.normalize(one, dim=-1) for one in (images, texts)), {"scale": self.logit_scale.exp()}

    def mean_state(self, ids: Tensor, mask: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Mean state of [CLS], patches (if pixels are given) and words: (B, L) -> (B, D)."""
        patches = None if pixel_values is None else patchify(pixel_values, self.config.patch_size).flatten(0, 1)
        read = {"input_ids": ids, "attention_mask": mask, "pixel_values": patches}  # patches (B * N, 3 * p * p)
        states = self.tower(**read, position_ids=self.positions(ids)).last_hidden_state  # (B, L, D)
        shares = mask[..., None].to(states.dtype)  # (B, L, 1)
        return (states * shares).sum(1) / shares.sum(1)

    def positions(self, ids: Tensor) -> Tensor:
        """Row and column of patches, after [CLS]; for words, the position after the grid on both axes. (2, B, L)."""
        place = torch.arange(ids.shape[1], device=ids.device)  # (L,)
        side = self.config.image_size // self.config.patch_size if (ids == self.config.image_token_id).any() else 0
        patch, behind = place - 1, place - side**2 + side
        axes = [1 + patch // side, 1 + patch % side] if side else [place, place]
        axes = [torch.where((patch >= 0) & (patch < side**2), axis, behind.where(place > 0, place)) for axis in axes]
        return torch.stack(axes)[:, None].expand(-1, len(ids), -1)

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Images (B, 3, H, W) -> pooler_output (B, D)."""
        count = (self.config.image_size // self.config.patch_size) ** 2
        ids = torch.full((len(pixel_values), 1 + count), self.config.image_token_id, device=pixel_values.device)
        ids[:, 0] = self.config.cls_token_id
        return BaseModelOutputWithPooling(pooler_output=self.mean_state(ids, torch.ones_like(ids), pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutputWithPooling:
        """Texts (B, 1 + T) -> pooler_output (B, D)."""
        return BaseModelOutputWithPooling(pooler_output=self.mean_state(input_ids, attention_mask))

    def get_multimodal_features(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor
    ) -> BaseModelOutputWithPooling:
        """Both in one sequence (B, 1 + N + T) -> pooler_output (B, D)."""
        return BaseModelOutputWithPooling(pooler_output=self.mean_state(input_ids, attention_mask, pixel_values))


class NeoMmeTower(nn.Module):
    """A `NeoMmeBaseline` for probes: the mean state of an image or text, (B, 1, D)."""

    def __init__(self, model: NeoMmeBaseline) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, pixel_values: Tensor | None = None, **text: Tensor) -> VisionLanguageModelOutput:
        read = self.model.get_text_features if pixel_values is None else self.model.get_image_features
        states = read(**text) if pixel_values is None else read(pixel_values)
        return VisionLanguageModelOutput(last_hidden_state=states.pooler_output[:, None])


def main(argv: Sequence[str] | None = None) -> bool:
    """Trains NeoMME like the CLIP baseline; returns whether training was completed."""
    return fit(parse_arguments(argv), NeoMmeBaseline)


if __name__ == "__main__":
    if not main():
        sys.exit(STOPPED)
