"""What would people answer: the likelihood of each answer, weighed by who gave it (section 3.4; ALBEF's protocol).

A question pays, over its answers, weight times the sum of (1 - alpha) CE(token) + alpha CE(the teacher's distribution)
over its tokens; the loss is the mean over questions. Where answers are classes, each pays a binary cross-entropy.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from .losses import in_full
from .objective import Batch
from .task import DistillationArguments, TaskObjective

# of a batch, what the model reads: the question and its image, and the answers to score
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

    def loss(self, student: nn.Module, batch: Batch, alpha: float, count: torch.Tensor) -> torch.Tensor:
        inputs = {name: batch[name] for name in INPUTS}

        # the teacher's distribution over the vocabulary at each place of an answer
        soft = in_full(self.teacher(**inputs).logits).softmax(-1) if alpha else None  # (R, A - 1, V)

        # the model's loss is a mean over these questions, the batch's `count` may be of more
        mean = student(**inputs, soft_labels=soft, alpha=alpha).loss
        return mean * (len(batch["input_ids"]) / count)


class AnswerClassObjective(TaskObjective):
    """For models whose `logits` (B, C) say of each answer of a list whether it is right, `labels` (B, C) in [0, 1]."""

    part = "answers"

    def loss(self, student: nn.Module, batch: Batch, alpha: float, count: torch.Tensor) -> torch.Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        labels = batch["labels"]  # (B, C)
        if alpha:
            soft = in_full(self.teacher(**inputs).logits).sigmoid()  # (B, C)
            labels = (1 - alpha) * labels + alpha * soft
        logits = in_full(student(**inputs).logits)  # (B, C)
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / count
