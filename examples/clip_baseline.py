"""CLIP from open_clip_torch, at OneR's size and on OneR's batches: the two-tower row of the evidence.

    python examples/clip_baseline.py --config examples/configs/oner_emoji.yaml --output_dir runs/clip
    python examples/clip_baseline.py --conv_stem --sigmoid --config examples/configs/oner_emoji.yaml

The arguments are those of examples/pretrain.py; those for OneR's heads, losses and masks have no effect.

The image tower is open_clip's ViT, the text tower its causal transformer; both have the width, depth, heads, patches
and vocabulary of a `OneRConfig`, so the two towers together have about twice its parameters. The rest is as in CLIP:
patch projection, learnable positions, linear projections, learnable temperature from .07, `ClipLoss`, no teacher, no
masks. `--conv_stem` replaces the patch projection by the families' convolutional stem. `--sigmoid` uses SigLIP's loss,
which classifies each image-text combination as a pair or not, with a learnable bias. `ClipBaseline` implements
`get_image_features` and `get_text_features`, so evaluators accept it; probes use its `ClipTower`.

Shapes: B pairs, N patches, T words of the longest text, D width, P embedding width. Texts arrive in the processor's
layout and are converted to `[CLS] w1 ... wT [EOT] [PAD]*`.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from oner import OneRConfig
from oner.modeling.vl_embeddings import ConvStem
from oner.modeling.vl_outputs import VisionLanguageModelOutput
from oner.processing.data.chunks import split_pairs
from oner.training.objectives.objective import Batch, Comparison, Representations, SinglePortion, Targets
from oner.training.parallel.distributed import rank, world_size
from oner.training.run.arguments import Arguments
from oner.training.run.building import build_processor_and_config
from oner.training.run.collators import build_collators
from oner.training.run.engine import Engine
from oner.training.run.launch import make_accelerator
from oner.training.run.loading import RunLoader, open_portions
from oner.training.run.parsing import parse_arguments
from oner.training.run.summary import STOPPED

WEIGHTS = "clip.safetensors"
MAX_LOGIT_SCALE = math.log(100.0)  # the maximum in CLIP and in open_clip's training loop
# SigLIP's initial scale and bias (Zhai et al., 2023, section 3.2): almost nothing is predicted to be a pair
SIGMOID = {"init_logit_scale": math.log(10.0), "init_logit_bias": -10.0}


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("the CLIP baseline needs open_clip_torch: pip install 'oner[evidence]'") from error
    return open_clip


class Baseline(nn.Module):
    """A model outside the families, with the size of `config`."""

    def save(self, directory: str | Path) -> None:
        """Writes the weights and the configuration."""
        self.config.save_pretrained(directory)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, Path(directory) / WEIGHTS)


class ClipBaseline(Baseline):
    """open_clip's `CLIP` at the size of `config`, with the interface of a retrieval model.

    Args:
        config: gives width, depth, heads, image size, patch size, vocabulary, longest text and embedding width.
        conv_stem: convolutions instead of the patch projection.
        sigmoid: adds a bias, for SigLIP's loss.

    Raises:
        ImportError: open_clip_torch is not installed.
    """

    def __init__(self, config: OneRConfig, conv_stem: bool = False, sigmoid: bool = False) -> None:
        super().__init__()
        self.config = config
        # the end-of-text token has the largest id, so that CLIP's "argmax" pooling finds it
        self.end_of_text = config.vocab_size
        ratio = config.intermediate_size / config.hidden_size
        self.clip = _open_clip().model.CLIP(
            embed_dim=config.projection_dim,
            vision_cfg={
                "layers": config.num_hidden_layers,
                "width": config.hidden_size,
                "head_width": config.hidden_size // config.num_attention_heads,
                "mlp_ratio": ratio,
                "patch_size": config.patch_size,
                "image_size": config.image_size,
            },
            text_cfg={
                "context_length": config.max_text_length + 2,  # [CLS], words, [EOT]
                "vocab_size": config.vocab_size + 1,
                "width": config.hidden_size,
                "heads": config.num_attention_heads,
                "layers": config.num_hidden_layers,
                "mlp_ratio": ratio,
            },
            nonscalar_logit_scale=True,
            **(SIGMOID if sigmoid else {}),
        )
        if conv_stem:  # (B, 3, H, W) -> (B, D, H / patch, W / patch), as the projection that it replaces
            stem = ConvStem(config.patch_size, config.num_channels, config.hidden_size)
            self.clip.visual.conv1 = stem.layers

    @classmethod
    def from_directory(cls, directory: str | Path) -> "ClipBaseline":
        """Loads a model written by `save`."""
        weights = load_file(Path(directory) / WEIGHTS)
        kind = {"conv_stem": "clip.visual.conv1.weight" not in weights, "sigmoid": "clip.logit_bias" in weights}
        model = cls(OneRConfig.from_pretrained(directory), **kind)
        model.load_state_dict(weights)
        return model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor, Batch]:
        """Normalised images (B, P), normalised texts (B, P), and the scale and any bias of their products, (1,)."""
        images = nn.functional.normalize(self.clip.encode_image(pixel_values), dim=-1)
        texts = nn.functional.normalize(self.encode_text(self.clip_ids(input_ids, attention_mask)), dim=-1)
        learned = {"scale": self.clip.logit_scale.exp()}
        if self.clip.logit_bias is not None:
            learned["bias"] = self.clip.logit_bias
        return images, texts, learned

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the scale of the products."""
        return self.clip.logit_scale

    def clip_ids(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Converts the processor's layout, (B, 1 + N + T) or (B, 1 + T), to CLIP's, (B, T + 2)."""
        placeholders = (input_ids == self.config.image_token_id).any(0)
        ids, mask = input_ids[:, ~placeholders], attention_mask[:, ~placeholders].bool()
        ids = ids.masked_fill(~mask, self.config.pad_token_id)
        ids = nn.functional.pad(ids, (0, 1), value=self.config.pad_token_id)
        return ids.scatter(1, mask.sum(1, keepdim=True), self.end_of_text)

    def encode_text(self, ids: Tensor) -> Tensor:
        """open_clip's `encode_text` for texts of any length, (B, T + 2) -> (B, P). Raises as `text_states`."""
        return self.text_states(ids) @ self.clip.text_projection

    def text_states(self, ids: Tensor) -> Tensor:
        """The state of [EOT] after the last norm, which is then projected: (B, T + 2) -> (B, D).

        The result is the same as with padding to `context_length`: attention is causal, so [EOT] reads no padding.

        Raises:
            ValueError: a text longer than the context.
        """
        clip, length = self.clip, ids.shape[1]
        if length > clip.context_length:
            raise ValueError(f"a text of {length} tokens, [CLS] and [EOT] included, in {clip.context_length} places")
        states = clip.token_embedding(ids) + clip.positional_embedding[:length]
        states = clip.transformer(states, attn_mask=clip.attn_mask[:length, :length])
        ends = states[torch.arange(len(ids), device=ids.device), ids.argmax(1)]  # the norm is per position: pool first
        return clip.ln_final(ends)

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Images (B, 3, H, W) -> pooler_output (B, P)."""
        return BaseModelOutputWithPooling(pooler_output=self.clip.encode_image(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutputWithPooling:
        """Texts in the processor's layout -> pooler_output (B, P)."""
        return BaseModelOutputWithPooling(pooler_output=self.encode_text(self.clip_ids(input_ids, attention_mask)))


class ClipTower(nn.Module):
    """A `ClipBaseline` without its projections, for probes: [CLS] or [EOT] after the norm, (B, 1, D)."""

    def __init__(self, model: ClipBaseline) -> None:
        super().__init__()
        self.config = model.config
        self.model = copy.deepcopy(model)
        self.model.clip.visual.proj = None  # open_clip's tower then returns unprojected states

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> VisionLanguageModelOutput:
        """Images (B, 3, H, W), or texts in the processor's layout."""
        if pixel_values is not None:
            states = self.model.clip.encode_image(pixel_values)  # (B, D)
        else:
            states = self.model.text_states(self.model.clip_ids(input_ids, attention_mask))  # (B, D)
        return VisionLanguageModelOutput(last_hidden_state=states[:, None])


class ClipObjective(SinglePortion):
    """
    open_clip's `ClipLoss`, or `SigLipLoss` for a model with a bias, as an objective of the engine: unmasked images and
    texts, negatives from all processes.
    """

    def __init__(self, student: ClipBaseline, arguments: Any = None) -> None:
        self.student, self.arguments = student, arguments
        self.loss = None

    def split(self, batch: Batch, chunks: int) -> list[Batch]:
        return split_pairs(batch, chunks)

    def count(self, batch: Batch) -> Batch:
        return {}

    def represent(
        self, student: nn.Module, batch: Batch, targets: Targets, progress: float, counts: Batch | None = None
    ) -> Representations:
        images, texts, learned = student(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
        return Representations({"image": images, "text": texts}, learned)

    def compare(self, rows: Batch, common: Batch, targets: Batch, progress: float) -> Comparison:
        if self.loss is None:  # ranks are known only once the engine runs
            kinds = _open_clip().loss
            kind = kinds.SigLipLoss if "bias" in common else kinds.ClipLoss
            self.loss = kind(rank=rank(), world_size=world_size())
        with torch.autocast(rows["image"].device.type, enabled=False):  # the loss in fp32, as in info_nce
            learned = [value.float() for value in common.values()]  # scale, and bias
            loss = self.loss(rows["image"].float(), rows["text"].float(), *learned)
        return Comparison({"clip": loss})

    def weigh(self, parts: Batch) -> Tensor:
        return sum(parts.values())

    @torch.no_grad()
    def after_step(self, applied: Tensor | None = None, kept: Batch | None = None) -> None:
        """Keeps the temperature at .01 or above, as CLIP does; after a skipped step, this changes nothing."""
        self.student.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)

    def to(self, device: torch.device) -> "ClipObjective":
        return self

    def state_dict(self) -> Batch:
        return {}

    def load_state_dict(self, state: Batch) -> None:
        if state:
            raise ValueError(f"the CLIP objective has no state, got {sorted(state)}")


def main(argv: Sequence[str] | None = None) -> bool:
    """Trains the baseline; returns whether training was completed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--conv_stem", action="store_true")
    parser.add_argument("--sigmoid", action="store_true")
    own, rest = parser.parse_known_args(argv)
    return fit(parse_arguments(rest), partial(ClipBaseline, conv_stem=own.conv_stem, sigmoid=own.sigmoid))


def fit(arguments: Arguments, build: Callable[[OneRConfig], nn.Module]) -> bool:
    """
    Trains a baseline with OneR's loader, optimiser, schedule and engine, and writes `output_dir/model`.

    Returns:
        Whether training was completed, rather than stopped by a signal.
    """
    accelerator = make_accelerator(arguments.run)
    rows = open_portions(arguments)
    processor, config = build_processor_and_config(arguments, rows)
    torch.manual_seed(arguments.run.seed)
    model = build(config)
    loader = RunLoader(arguments, rows, build_collators(arguments, processor, config))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    steps = f"{loader.total_steps} steps of {arguments.run.batch_size}"
    accelerator.print(f"{type(model).__name__}, {millions:.1f} M parameters, {steps}")
    engine = Engine(
        accelerator=accelerator,
        model=model,
        objective=ClipObjective(model),
        arguments=arguments,
        loader=loader,
        total_steps=loader.total_steps,
        epoch_steps=loader.epoch_steps,
    )
    engine.fit()
    if engine.stopped:
        accelerator.print(f"stopped at step {engine.step}; go on with --resume auto")
        return False
    if accelerator.is_main_process:
        directory = Path(arguments.run.output_dir) / "model"
        model.save(directory)
        processor.save_pretrained(directory)
        print(f"model directory: {directory}")
    return True


if __name__ == "__main__":
    if not main():
        sys.exit(STOPPED)
