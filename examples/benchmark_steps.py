"""The training steps that examples/benchmark.py measures: OneR, and open_clip's and transformers' CLIP of its size.

All use the same batch, fp32 weights under autocast, and the run's fused AdamW. B pairs, N patches, W word slots.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from clip_baseline import ClipBaseline, ClipObjective
from torch import nn
from transformers import CLIPConfig, CLIPModel

from oner import OneRConfig
from oner.training.cost.flops_oner import PairShape, oner_step_flops
from oner.training.objectives.objective import build_objective
from oner.training.parallel.distributed import mean_counts
from oner.training.run.arguments import Arguments
from oner.training.run.building import build_model
from oner.training.run.optimization import build_optimizer, compile_regions

Batch = dict[str, torch.Tensor]
Timer = Callable[[str], AbstractContextManager]


class Step:
    """`step(batch)`: forward, backward, optimiser. `in_phases` does the same and times each phase."""

    def __init__(self, model: nn.Module, arguments: Arguments, device: torch.device, half: bool, compiled: bool):
        self.model = model.to(device).train()
        self.optimizer = build_optimizer(model, arguments.run, arguments.run.batch_size)
        self.device, self.half, self.compiled = device, half, compiled

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def loss(self, batch: Batch) -> torch.Tensor:
        raise NotImplementedError

    def compile(self) -> None:
        self.model.compile()

    def __call__(self, batch: Batch) -> None:
        with self.autocast():
            loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after()

    def after(self) -> None:
        """What follows the optimiser's step: a teacher update, a clamp."""

    def in_phases(self, batch: Batch, phase: Timer) -> None:
        with phase("forward"), self.autocast():
            loss = self.loss(batch)
        self._rest(loss, phase)

    def _rest(self, loss: torch.Tensor, phase: Timer) -> None:
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        with phase("teacher update"):
            self.after()

    def tokens(self, batch: Batch) -> int | None:
        """Tokens processed by the layers, if known."""
        return None

    def formula(self, batch: Batch) -> float | None:
        """Operations of the step by formula, if there is one."""
        return None


class ObjectiveStep(Step):
    """The objective of any family, built from the run's arguments."""

    def __init__(self, arguments: Arguments, config: Any, device: torch.device, half: bool, compiled: bool = False):
        if arguments.model.attn_implementation is None and device.type == "cpu" and half:
            arguments.model.attn_implementation = "eager"  # docs/performance.md: a third of sdpa's time there
        model = build_model(arguments, config)
        self.objective = build_objective(arguments.model.family, model, arguments.objective)
        super().__init__(model, arguments, device, half, compiled)
        self.objective.to(device)
        self.arguments, self.config = arguments, config
        self.kept: Batch = {}  # from the last forward pass, for `after`

    def compile(self) -> None:
        compile_regions([self.model, *(teacher.model for teacher in self.objective.teachers())])

    def loss(self, batch: Batch) -> torch.Tensor:
        taken = self.objective(self.model, batch, 0.5)
        self.kept = taken.kept
        return taken.loss

    def after(self) -> None:
        self.objective.after_step(kept=self.kept)

    def in_phases(self, batch: Batch, phase: Timer) -> None:
        objective = self.objective
        with self.autocast():
            with phase("teacher forward"):
                objective.before_step()
                targets = objective.targets(self.model, batch, 0.5)
            with phase("forward"):
                online = objective.represent(self.model, batch, targets, 0.5, mean_counts(objective.count(batch)))
            with phase("loss"):
                compared = objective.compare(online.rows, online.common, targets.rows, 0.5)
                loss = objective.weigh({**compared.parts, **online.parts})
        self.kept = compared.kept
        self._rest(loss, phase)

    def tokens(self, batch: Batch) -> int:
        # [CLS] and patches, [CLS] and words, and all of them with one [CLS]
        pairs, patches = batch["bool_masked_pos"].shape
        return 3 * pairs + 2 * pairs * patches + 2 * len(batch["text_index"])

    def formula(self, batch: Batch) -> float:
        pairs, patches = batch["bool_masked_pos"].shape
        shape = PairShape(
            pairs=pairs,
            slots=batch["input_ids"].shape[1] - 1 - patches,
            words=len(batch["text_index"]),
            masked_words=len(batch["mlm_index"]),
            keys=pairs,
        )
        return oner_step_flops(self.config, self.arguments.objective, shape).total


class OpenClipStep(Step):
    """open_clip's `CLIP` and `ClipLoss`; compiled as a whole, as open_clip does it."""

    def __init__(self, arguments: Arguments, config: OneRConfig, device: torch.device, half: bool, compiled=False):
        super().__init__(ClipBaseline(config), arguments, device, half, compiled)
        self.objective = ClipObjective(self.model)

    def loss(self, batch: Batch) -> torch.Tensor:
        return self.objective(self.model, batch, 0.5)[0]

    def after(self) -> None:
        self.objective.after_step()


def transformers_clip(config: OneRConfig, positions: int) -> CLIPModel:
    """Random weights; both towers have the configuration's width, depth and heads; texts have `positions`."""
    width = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "projection_dim": config.projection_dim,
    }
    vision = {**width, "image_size": config.image_size, "patch_size": config.patch_size}
    text = {**width, "vocab_size": config.vocab_size, "max_position_embeddings": positions}
    text |= {"bos_token_id": config.cls_token_id, "eos_token_id": config.vocab_size - 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.projection_dim))


class TransformersClipStep(Step):
    """transformers' `CLIPModel` of the same size, with its own loss, over texts padded to the longest of the batch."""

    def __init__(self, arguments: Arguments, config: OneRConfig, device: torch.device, half: bool):
        clip = transformers_clip(config, config.max_text_length + 1)
        super().__init__(clip, arguments, device, half, compiled=False)
        self.image_token_id = config.image_token_id

    def loss(self, batch: Batch) -> torch.Tensor:
        words = batch["input_ids"][0] != self.image_token_id
        return self.model(
            input_ids=batch["input_ids"][:, words],
            attention_mask=batch["attention_mask"][:, words],
            pixel_values=batch["pixel_values"],
            return_loss=True,
        ).loss


def padded(batch: Batch, config: OneRConfig) -> Batch:
    """The same images with every caption at the model's maximum length, to measure the cost of padding to it."""
    pairs, patches = batch["bool_masked_pos"].shape
    head, slots = 1 + patches, config.max_text_length
    wide = batch["input_ids"].new_full((pairs, head + slots), config.pad_token_id)
    wide[:, : batch["input_ids"].shape[1]] = batch["input_ids"]
    wide[:, head:] = wide[:, head:].clamp_min(max(config.cls_token_id, config.image_token_id) + 1)
    return {
        **batch,
        "input_ids": wide,
        "masked_input_ids": wide.clone(),
        "attention_mask": torch.ones_like(wide),
        "text_index": torch.arange(pairs * slots),
    }


# name -> how its step is built; `as_is` keeps the allocator's default settings
STEPS: dict[str, Callable[[Arguments, OneRConfig, torch.device], Step]] = {
    "oner_bf16": lambda *given: ObjectiveStep(*given, half=True),
    "oner_bf16_compiled": lambda *given: ObjectiveStep(*given, half=True, compiled=True),
    "oner_bf16_padded": lambda *given: ObjectiveStep(*given, half=True),
    "oner_bf16_as_is": lambda *given: ObjectiveStep(*given, half=True),
    "clip_bf16": lambda *given: OpenClipStep(*given, half=True),
    "clip_bf16_compiled": lambda *given: OpenClipStep(*given, half=True, compiled=True),
    "transformers_clip_bf16": lambda *given: TransformersClipStep(*given, half=True),
    "oner_fp32": lambda *given: ObjectiveStep(*given, half=False),
    "clip_fp32": lambda *given: OpenClipStep(*given, half=False),
}
