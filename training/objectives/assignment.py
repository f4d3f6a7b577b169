"""Whose picture is it: a text reads its own picture and another, or two others, and says which is its own, if any.

ALBEF's code, before NLVR2: of three texts two read their own picture, in a place drawn evenly, beside one like it; the
third reads two like its own. Alike are pictures of high cosine. B pairs.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .losses import in_full
from .objective import Batch
from .task import DistillationArguments, TaskObjective

FIRST, SECOND, NEITHER = range(3)


@dataclass
class AssignmentObjectiveArguments(DistillationArguments):
    """No teacher in ALBEF's code."""

    BOUNDS: ClassVar[dict[str, str]] = {"own_picture": "[0, 1]", "draw_temperature": "(0, inf)"}

    distillation: float = field(default=0.0, metadata={"help": "Must be 0: pictures are drawn once, for the student."})
    own_picture: float = field(default=2 / 3, metadata={"help": "Share of texts that read their own picture."})
    draw_temperature: float = field(default=0.07, metadata={"help": "Of the softmax that others are drawn by."})


def draw_two_pictures(
    cosines: torch.Tensor, allowed: torch.Tensor, own: float, temperature: float
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """
    Places of the two pictures (B,) each, and the label (B,). Draws from torch's generator, which checkpoints keep.

    Args:
        cosines (`(B, B)`), allowed (`(B, B)` bool): Of pictures, and which may stand beside or for a text's own; where
            fewer than two may, the text is labelled -100.
        own, temperature: As in `AssignmentObjectiveArguments`.
    """
    rows = torch.arange(len(cosines), device=cosines.device)  # (B,)
    if len(rows) < 2:
        return (rows, rows), torch.full_like(rows, -100)
    # a vanishing weight stays above zero, so that two can always be drawn; what may not be drawn comes last
    weights = (in_full(cosines) / temperature).softmax(1).clamp_min(1e-12).masked_fill(~allowed, 1e-30)  # (B, B)
    one, other = torch.multinomial(weights, 2).unbind(1)  # (B,) each
    kind, place = torch.rand(2, len(rows), device=cosines.device)  # (B,) each
    labels = torch.where(kind >= own, NEITHER, (place >= 0.5).long())  # (B,)

    # each text's own picture stands first, second, or nowhere
    first = torch.where(labels == FIRST, rows, one)
    second = torch.where(labels == SECOND, rows, torch.where(labels == FIRST, one, other))
    return (first, second), labels.masked_fill(allowed.sum(1) < 2, -100)


class AssignmentObjective(TaskObjective):
    """
    Over pairs. A batch may bring recorded draws: `first_pictures`, `second_pictures`, `labels` (B,).

    Raises:
        ValueError: a teacher is asked for, shares or a temperature out of range.
    """

    part = "assignment"

    def __init__(self, student: nn.Module, arguments: AssignmentObjectiveArguments):
        if arguments.distillation:
            raise ValueError(f"distillation is {arguments.distillation}; text assignment has no teacher, expected 0")
        if not 0 <= arguments.own_picture <= 1 or arguments.draw_temperature <= 0:
            raise ValueError(
                f"own_picture is {arguments.own_picture} and draw_temperature {arguments.draw_temperature}; expected "
                "a share in [0, 1] and a positive number"
            )
        super().__init__(student, arguments)

    def loss(self, student: nn.Module, batch: Batch, alpha: float, count: torch.Tensor) -> torch.Tensor:
        """Taken in chunks, a chunk draws its images from itself, as each of so many processes would."""
        options = self.arguments
        logits, labels = assign(student, batch, options.own_picture, options.draw_temperature)  # (B, 3), (B,)
        return F.cross_entropy(in_full(logits), labels, reduction="sum", ignore_index=-100) / count


def assign(student: nn.Module, batch: Batch, own: float, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's logits (B, 3) for pictures drawn, or recorded, and what would be right (B,)."""
    # filled in the middle of the student's pass, once its image features are there
    drawn = {}

    def choose(cosines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if "labels" in batch:
            drawn["labels"] = batch["labels"]
            return batch["first_pictures"], batch["second_pictures"]
        allowed = batch["ids"][:, None] != batch["ids"][None, :]  # (B, B)
        pictures, drawn["labels"] = draw_two_pictures(cosines, allowed, own, temperature)
        return pictures

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    return student(**inputs, choose=choose).logits, drawn["labels"]
