"""Which class is it: (1 - alpha) CE(label) + alpha CE(the teacher's classes), mean over rows (ALBEF's protocol)."""

import torch
from torch import nn

from .losses import distilled_cross_entropy
from .objective import Batch
from .task import TaskObjective

INPUTS = ("input_ids", "attention_mask", "pixel_values")


class ClassificationObjective(TaskObjective):
    """For models whose `logits` (B, classes) answer `labels` (B,): entailment, sentences about two pictures."""

    part = "classes"

    def loss(self, student: nn.Module, batch: Batch, alpha: float, count: torch.Tensor) -> torch.Tensor:
        inputs = {name: batch[name] for name in INPUTS}
        logits = student(**inputs).logits  # (B, classes)
        soft = self.teacher(**inputs).logits if alpha else None  # (B, classes)
        return distilled_cross_entropy(logits, batch["labels"], soft, alpha, count)
