"""The list of families: one line each, and every test that takes `family` runs on it.

What oner itself says of a family, its classes, its objective and the names of its losses, is read there. What is left
is how to make it small; that stands in the family's own tests/tiny_NAME.py.
"""

from dataclasses import dataclass, fields
from importlib import import_module
from types import ModuleType
from typing import Any

import tiny_codis
import tiny_momo
import tiny_oner
import tiny_simla
import torch
from torch import nn
from transformers import PreTrainedModel

import oner
from oner.training.objectives.objective import OBJECTIVES, Objective, build_objective, objective_classes

MODELS = "AutoModel"
PRETRAINING = "AutoModelForPreTraining"
RETRIEVAL = "AutoModelForZeroShotImageClassification"
MASKED_LM = "AutoModelForMaskedLM"
CLASSIFICATION = "AutoModelForImageClassification"
# what a tower reads
KINDS = ("text", "image", "pair")


def inputs_of(model: PreTrainedModel, kind: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is of a kind in pairs of `tiny_oner.joint_batch`; a pair as one sequence, or each of its parts as it is."""
    image = {"pixel_values": batch["pixel_values"]}
    if kind == "image":
        return image
    if kind == "text" or model.config.pair_layout == "separate":
        text = tiny_oner.text_of(batch)
    else:
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return text if kind == "text" else {**text, **image}


@dataclass(frozen=True)
class Family:
    """
    Args:
        name: As in `--family`.
        tiny: The module that makes it small, with

            tiny_config: (**fields) -> the configuration that `tiny_oner.joint_batch` fits;
            make_batch: (lengths of captions, ...) -> what its objective reads;
            OBJECTIVE: arguments of the objective over such a model;
            PAIRED: the losses that read a batch of pairs, where the family has others too;
            SHRUNK: arguments of examples/pretrain.py for a model of some thousand weights, `model_config` among them;
            stand_ins: () -> those that name files which a run reads beside its data, made small;
            RUN: those by which a tiny run has every loss of the paper;
            APART: fields under which a row's losses see no other row but through a contrast, and nothing is drawn;
            in_one_process: (objective, student, parts of a batch, progress) -> loss and what is told of it: what the
                losses of as many processes come to on average, and the state after the step;
            DRAWN: fields with dropout, so that the state of the generators counts.
    """

    name: str
    tiny: ModuleType

    @property
    def classes(self) -> dict[str, type[PreTrainedModel]]:
        """Auto class -> class, of models alone."""
        return {auto: cls for auto, cls in oner.FAMILIES[self.name].items() if auto.startswith(MODELS)}

    @property
    def losses(self) -> tuple[str, ...]:
        """Every loss that the objective knows, in its order."""
        return import_module(OBJECTIVES[self.name][0]).LOSSES

    @property
    def pair_losses(self) -> tuple[str, ...]:
        """Those of them that read a batch of pairs."""
        return getattr(self.tiny, "PAIRED", self.losses)

    @property
    def run(self) -> dict[str, Any]:
        """Arguments of examples/pretrain.py for a tiny run."""
        return {**self.tiny.SHRUNK, **self.tiny.stand_ins(), **self.tiny.RUN}

    def build(self, auto: str = MODELS, **overrides: Any) -> PreTrainedModel:
        """A tiny model in eval mode, its statistics, biases and norms moved from 0 and 1."""
        model = tiny_oner.randomised(self.classes[auto](self.tiny.tiny_config(**overrides))).train()
        size = model.config.image_size
        with torch.no_grad():
            self.tower(model)(pixel_values=torch.randn(8, model.config.num_channels, size, size))
        return model.eval()

    def tower(self, model: PreTrainedModel) -> nn.Module:
        return getattr(model, model.base_model_prefix, model)

    @property
    def has_teacher(self) -> bool:
        return "ema_momentum" in {entry.name for entry in fields(objective_classes(self.name)[1])}

    def objective(self, student: nn.Module, **arguments: Any) -> Objective:
        made = objective_classes(self.name)[1](**{**self.tiny.OBJECTIVE, **arguments})
        return build_objective(self.name, student, made)


FAMILIES = {
    "codis": Family("codis", tiny_codis),
    "momo": Family("momo", tiny_momo),
    "oner": Family("oner", tiny_oner),
    "simla": Family("simla", tiny_simla),
}
