"""Which class is it: (1 - alpha) CE(label) + alpha CE(the teacher's classes), mean over rows (ALBEF's protocol).

Of texts alone also which score, by squared errors in the place of cross-entropies.
"""

import torch
from torch import nn

from oner.modeling.vl_task_heads import text_losses

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


class TextObjective(TaskObjective):
    """For models of texts alone whose `logits` (B, classes), or (B, 1) of scores, answer `labels` (B,): GLUE."""

    part = "texts"

    def loss(self, student: nn.Module, batch: Batch, alpha: float, count: torch.Tensor) -> torch.Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = student(**inputs).logits  # (B, classes) or (B, 1)
        soft = self.teacher(**inputs).logits if alpha else None  # likewise
        if logits.shape[-1] > 1:
            return distilled_cross_entropy(logits, batch["labels"], soft, alpha, count)

        # a score, and the teacher's
        losses = text_losses(logits, batch["labels"])  # (B,)
        if alpha:
            losses = (1 - alpha) * losses + alpha * text_losses(logits, soft[:, 0])
        return losses.sum() / count
