"""Objective of the toy family: masked tokens and contrast of texts with a teacher's, contrast of pairs."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from oner.training.objectives.losses import info_nce, masked_language_loss
from oner.training.objectives.objective import Comparison, Objective, Portion, Representations, Targets
from oner.training.objectives.teacher import EMATeacher
from oner.training.parallel.distributed import gather_without_gradient, rank


@dataclass
class ToyObjectiveArguments:
    BOUNDS: ClassVar[dict[str, str]] = {"ema_momentum": "[0, 1]"}
    ema_momentum: float = 0.9


class Contrast(Portion):
    """What both portions share: keys of the teacher, contrast with them, a plain sum."""

    def __init__(self, teacher: EMATeacher):
        self.teacher = teacher

    def targets(self, student, batch, progress) -> Targets:
        inputs = ("input_ids", "attention_mask", "pixel_values")
        made = self.teacher(**{name: batch[name] for name in inputs if name in batch})
        return Targets({f"key of {key}": made[key] for _, key in self.queries})

    def compare(self, rows, common, targets, progress) -> Comparison:
        temperature = (-common["logit_scale"]).exp() if common else 0.5
        losses = []
        for query, key in self.queries:
            keys = gather_without_gradient(targets[f"key of {key}"])  # (G, D), of all processes
            losses.append(info_nce(rows[query], keys, temperature, offset=len(rows[query]) * rank()))
        return Comparison({self.name: torch.stack(losses).mean()})

    def weigh(self, parts) -> torch.Tensor:
        return sum(parts.values())


class Texts(Contrast):
    name, queries = "text contrast", (("text", "text"),)

    def count(self, batch):
        return {"mlm": torch.tensor(len(batch["mlm_labels"]), device=batch["mlm_labels"].device)}

    def represent(self, student, batch, targets, progress, counts=None) -> Representations:
        flat = batch["text_index"][batch["mlm_index"]]  # (M,) in (B, W)
        places = flat + flat // (batch["input_ids"].shape[1] - 1) + 1  # (M,) in (B, 1 + W)
        made = student(batch["masked_input_ids"], batch["attention_mask"], mlm_places=places)
        if counts is None:
            return Representations({"text": made["text"]})
        mlm = masked_language_loss(made["logits"], batch["mlm_labels"], counts["mlm"])
        return Representations({"text": made["text"]}, parts={"mlm": mlm})


class Pairs(Contrast):
    name, queries = "pair contrast", (("image", "text"), ("text", "image"))

    def represent(self, student, batch, targets, progress, counts=None) -> Representations:
        made = student(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
        return Representations({"image": made["image"], "text": made["text"]}, {"logit_scale": made["logit_scale"]})


class ToyObjective(Objective):
    def __init__(self, student, arguments: ToyObjectiveArguments):
        self.teacher = EMATeacher(student, arguments.ema_momentum)
        self.portions = {"texts": Texts(self.teacher), "pairs": Pairs(self.teacher)}

    def after_step(self, applied=None, kept=None) -> None:
        self.teacher.update(applied)
