"""What would people answer: the likelihood of each answer, weighed by who gave it (section 3.4; ALBEF's protocol).

A question pays, over its answers, weight times the sum of its tokens' (1 - alpha) CE(token) + alpha CE(teacher's
words); the loss is the mean over questions.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from oner.processing.data.task_collation import split_answers

from .layout import as_read
from .losses import in_full
from .task import Batch, DistillationArguments, TaskObjective

INPUTS = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "answer_ids",
    "answer_mask",
    "answer_weights",
    "answers_per_question",
)


@dataclass
class AnswerObjectiveArguments(DistillationArguments):
    """The paper's momentum distillation, and where its code does something else."""

    distillation_ramp: float = field(
        default=1 / 8, metadata={"help": "Share of the run in which alpha rises from 0 (the first of 8 epochs)."}
    )
    pass_alpha: bool = field(
        default=True,
        metadata={"help": "False: as SIMLA's code, which forgets alpha on its way, so that no soft target counts."},
    )


class AnswerObjective(TaskObjective):
    """For models of `AnswerGeneration`."""

    part = "answers"

    def distils(self) -> bool:
        return super().distils() and self.arguments.pass_alpha

    def split(self, batch: Batch, pieces: int) -> list[Batch]:
        return split_answers(batch, pieces)

    def loss(self, student: nn.Module, batch: Batch, alpha: float, count: torch.Tensor) -> torch.Tensor:
        inputs = as_read({name: batch[name] for name in INPUTS}, self.config)
        soft = in_full(self.teacher(**inputs).logits).softmax(-1) if alpha else None
        mean = student(**inputs, soft_labels=soft, alpha=alpha).loss
        return mean * (len(batch["input_ids"]) / count)
