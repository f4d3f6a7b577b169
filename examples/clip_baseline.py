"""CLIP as open_clip_torch builds it, at OneR's size and on OneR's batches: the two-tower row of the evidence.

    python examples/clip_baseline.py --config examples/configs/oner_emoji.yaml --output_dir runs/clip
    python examples/clip_baseline.py --conv_stem --sigmoid --config examples/configs/oner_emoji.yaml

The arguments are those of examples/pretrain.py; what is about OneR's heads, losses and masks has no effect.

The image tower is open_clip's ViT, the text tower its causal transformer; both have the width, depth, heads, patches
and vocabulary of a `OneRConfig`, so the two towers together have about twice its parameters. What is CLIP's own stays
CLIP's: patch projection, learnable positions, linear projections, learnable temperature from .07, `ClipLoss`, no
teacher, no masks. With `--conv_stem` pictures pass the families' convolutions instead of the projection, with
`--sigmoid` the loss is SigLIP's: each picture with each text is a pair or is not, with a learnable bias.
`ClipBaseline` answers `get_image_features` and `get_text_features`, so evaluators take it as it is; probes take its
`ClipTower`.

Shapes: B pairs, N patches, T words of the longest text, D width, P embedding width. A text arrives in the processor's
layout and is read as `[CLS] w1 ... wT [EOT] [PAD]*`.
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
MAX_LOGIT_SCALE = math.log(100.0)  # CLIP clips its scale there, and so does open_clip's training loop
# where SigLIP's scale and bias begin (Zhai et al., 2023, section 3.2): as if almost nothing were a pair
SIGMOID = {"init_logit_scale": math.log(10.0), "init_logit_bias": -10.0}


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("the CLIP baseline needs open_clip_torch: pip install 'oner[evidence]'") from error
    return open_clip


class Baseline(nn.Module):
    """A model that is no family's, sized by `config`."""

    def save(self, directory: str | Path) -> None:
        """Weights, and the configuration that they were sized by."""
        self.config.save_pretrained(directory)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, Path(directory) / WEIGHTS)


class ClipBaseline(Baseline):
    """open_clip's `CLIP` at the size of `config`, behind the interface of a retrieval model.

    Args:
        config: gives width, depth, heads, picture, patch, vocabulary, longest text and width of the embedding.
        conv_stem: convolutions instead of the patch projection.
        sigmoid: a bias, for SigLIP's loss.

    Raises:
        ImportError: open_clip_torch is not installed.
    """

    def __init__(self, config: OneRConfig, conv_stem: bool = False, sigmoid: bool = False) -> None:
        super().__init__()
        self.config = config
        # the end-of-text token gets the largest id of all, where CLIP's "argmax" pooling looks for it
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
        if conv_stem:  # (B, 3, H, W) -> (B, D, H / patch, W / patch), as the projection in its place
            stem = ConvStem(config.patch_size, config.num_channels, config.hidden_size)
            self.clip.visual.conv1 = stem.layers

    @classmethod
    def from_directory(cls, directory: str | Path) -> "ClipBaseline":
        """The model that `save` wrote."""
        weights = load_file(Path(directory) / WEIGHTS)
        kind = {"conv_stem": "clip.visual.conv1.weight" not in weights, "sigmoid": "clip.logit_bias" in weights}
        model = cls(OneRConfig.from_pretrained(directory), **kind)
        model.load_state_dict(weights)
        return model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor, Batch]:
        """Normalised pictures (B, P), normalised texts (B, P), and of their products the factor and any bias, (1,)."""
        images = nn.functional.normalize(self.clip.encode_image(pixel_values), dim=-1)
        texts = nn.functional.normalize(self.encode_text(self.clip_ids(input_ids, attention_mask)), dim=-1)
        learned = {"scale": self.clip.logit_scale.exp()}
        if self.clip.logit_bias is not None:
            learned["bias"] = self.clip.logit_bias
        return images, texts, learned

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the factor on products."""
        return self.clip.logit_scale

    def clip_ids(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The processor's layout, (B, 1 + N + T) or (B, 1 + T), to CLIP's, (B, T + 2)."""
        placeholders = (input_ids == self.config.image_token_id).any(0)
        ids, mask = input_ids[:, ~placeholders], attention_mask[:, ~placeholders].bool()
        ids = ids.masked_fill(~mask, self.config.pad_token_id)
        ids = nn.functional.pad(ids, (0, 1), value=self.config.pad_token_id)
        return ids.scatter(1, mask.sum(1, keepdim=True), self.end_of_text)

    def encode_text(self, ids: Tensor) -> Tensor:
        """open_clip's `encode_text` over the columns in use alone, (B, T + 2) -> (B, P). Raises as `text_states`."""
        return self.text_states(ids) @ self.clip.text_projection

    def text_states(self, ids: Tensor) -> Tensor:
        """What is projected: [EOT] after the last norm, (B, T + 2) -> (B, D).

        Equal to padding up to `context_length`, as the attention is causal and what follows [EOT] is never read.

        Raises:
            ValueError: a text longer than the context.
        """
        clip, length = self.clip, ids.shape[1]
        if length > clip.context_length:
            raise ValueError(f"a text of {length} tokens, [CLS] and [EOT] included, in {clip.context_length} places")
        states = clip.token_embedding(ids) + clip.positional_embedding[:length]
        states = clip.transformer(states, attn_mask=clip.attn_mask[:length, :length])
        ends = states[torch.arange(len(ids), device=ids.device), ids.argmax(1)]  # the norm is by place: pool first
        return clip.ln_final(ends)

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Pictures (B, 3, H, W) -> pooler_output (B, P)."""
        return BaseModelOutputWithPooling(pooler_output=self.clip.encode_image(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutputWithPooling:
        """Texts in the processor's layout -> pooler_output (B, P)."""
        return BaseModelOutputWithPooling(pooler_output=self.encode_text(self.clip_ids(input_ids, attention_mask)))


class ClipTower(nn.Module):
    """A `ClipBaseline` below its projections, as probes read a tower: [CLS] or [EOT] after the norm, (B, 1, D)."""

    def __init__(self, model: ClipBaseline) -> None:
        super().__init__()
        self.config = model.config
        self.model = copy.deepcopy(model)
        self.model.clip.visual.proj = None  # open_clip's tower then ends before it

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> VisionLanguageModelOutput:
        """Pictures (B, 3, H, W), or texts in the processor's layout."""
        if pixel_values is not None:
            states = self.model.clip.encode_image(pixel_values)  # (B, D)
        else:
            states = self.model.text_states(self.model.clip_ids(input_ids, attention_mask))  # (B, D)
        return VisionLanguageModelOutput(last_hidden_state=states[:, None])


class ClipObjective(SinglePortion):
    """
    open_clip's `ClipLoss`, or `SigLipLoss` of a model with a bias, as the engine's objective: clean images and clean
    texts, negatives of all processes.
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
        with torch.autocast(rows["image"].device.type, enabled=False):  # as info_nce: the loss in fp32
            learned = [value.float() for value in common.values()]  # scale, and bias
            loss = self.loss(rows["image"].float(), rows["text"].float(), *learned)
        return Comparison({"clip": loss})

    def weigh(self, parts: Batch) -> Tensor:
        return sum(parts.values())

    @torch.no_grad()
    def after_step(self, applied: Tensor | None = None, kept: Batch | None = None) -> None:
        """Keeps the temperature at .01 or above, as CLIP does; one that did not move is there already."""
        self.student.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)

    def to(self, device: torch.device) -> "ClipObjective":
        return self

    def state_dict(self) -> Batch:
        return {}

    def load_state_dict(self, state: Batch) -> None:
        if state:
            raise ValueError(f"the CLIP objective has no state, got {sorted(state)}")


def main(argv: Sequence[str] | None = None) -> bool:
    """Trains the baseline as its own arguments say; whether it came to its end."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--conv_stem", action="store_true")
    parser.add_argument("--sigmoid", action="store_true")
    own, rest = parser.parse_known_args(argv)
    return fit(parse_arguments(rest), partial(ClipBaseline, conv_stem=own.conv_stem, sigmoid=own.sigmoid))


def fit(arguments: Arguments, build: Callable[[OneRConfig], nn.Module]) -> bool:
    """
    Trains a baseline with OneR's loader, optimiser, schedule and engine, and writes `output_dir/model`.

    Returns:
        Whether it came to its end, and was not stopped by a signal.
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
