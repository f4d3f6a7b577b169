"""Objective of the toy family: masked tokens and contrast of texts with a teacher's, contrast of pairs."""

from dataclasses import dataclass

import torch

from oner.processing.data.chunks import split_pairs
from oner.training.objectives.losses import info_nce, masked_language_loss
from oner.training.objectives.objective import Comparison, Objective, Portion, Representations, Targets
from oner.training.objectives.teacher import EMATeacher
from oner.training.parallel.distributed import gather_without_gradient, rank


@dataclass
class ToyObjectiveArguments:
    """Nothing to choose but the teacher's pace."""

    ema_momentum: float = 0.9


class ToyPortion(Portion):
    """What both portions share: keys of the teacher, contrast with them, a plain sum."""

    queries: tuple[tuple[str, str], ...]  # which of the student's meets which of the teacher's

    def __init__(self, teacher: EMATeacher):
        self.teacher = teacher

    def split(self, batch, chunks):
        return split_pairs(batch, chunks)

    def targets(self, student, batch, progress) -> Targets:
        inputs = ("input_ids", "attention_mask", "pixel_values")
        made = self.teacher(**{name: batch[name] for name in inputs if name in batch})
        return Targets({f"key of {key}": made[key] for _, key in self.queries})

    def compare(self, rows, common, targets, progress) -> Comparison:
        temperature = (-common["logit_scale"]).exp() if common else 0.5
        losses = [
            info_nce(rows[query], gather_without_gradient(targets[f"key of {key}"]), temperature,
                     offset=len(rows[query]) * rank())
            for query, key in self.queries
        ]  # fmt: skip
        return Comparison({self.name: torch.stack(losses).mean()})

    def weigh(self, parts):
        return sum(parts.values())


class Texts(ToyPortion):
    name, queries = "text contrast", (("text", "text"),)

    def count(self, batch):
        return {"mlm": torch.tensor(len(batch["mlm_labels"]), device=batch["mlm_labels"].device)}

    def represent(self, student, batch, targets, progress, counts=None) -> Representations:
        slots = batch["input_ids"].shape[1] - 1
        flat = batch["text_index"][batch["mlm_index"]]  # (M,) in (B, W)
        places = flat + flat // slots + 1  # in (B, 1 + W)
        made = student(batch["masked_input_ids"], batch["attention_mask"], mlm_places=places)
        parts = {} if counts is None else {
            "mlm": masked_language_loss(made["logits"], batch["mlm_labels"], counts["mlm"])
        }  # fmt: skip
        return Representations({"text": made["text"]}, parts=parts)


class Pairs(ToyPortion):
    name, queries = "pair contrast", (("image", "text"), ("text", "image"))

    def count(self, batch):
        return {}

    def represent(self, student, batch, targets, progress, counts=None) -> Representations:
        made = student(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
        return Representations({"image": made["image"], "text": made["text"]}, {"logit_scale": made["logit_scale"]})


class ToyObjective(Objective):
    def __init__(self, student, arguments: ToyObjectiveArguments):
        self.teacher = EMATeacher(student, arguments.ema_momentum)
        self.portions = {"texts": Texts(self.teacher), "pairs": Pairs(self.teacher)}

    def teachers(self):
        return (self.teacher,)

    def after_step(self, applied=None, kept=None):
        self.teacher.update(applied)

    def to(self, device):
        self.teacher.to(device)
        return self

    def state_dict(self):
        return {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}

    def load_state_dict(self, state):
        self.teacher.load_state_dict({name.removeprefix("teacher."): value for name, value in state.items()})
