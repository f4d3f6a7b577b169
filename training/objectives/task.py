"""What the objectives of fine-tuning on rows with labels share: no row meets another, and an EMA teacher may help."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from .objective import Batch, Representations, SinglePortion, Targets
from .teacher import EMATeacher


@dataclass
class DistillationArguments:
    """Momentum distillation when fine-tuning (section 3.1; ALBEF's code)."""

    BOUNDS: ClassVar[dict[str, str]] = {
        "ema_momentum": "[0, 1]",
        "distillation": "[0, 1]",
        "distillation_ramp": "[0, 1]",
    }

    ema_momentum: float = field(default=0.995, metadata={"help": "Momentum of the teacher (section 2.5)."})
    distillation: float = field(default=0.4, metadata={"help": "alpha, the weight of soft targets; 0: no teacher."})
    distillation_ramp: float = field(
        default=0.0, metadata={"help": "Share of the run in which alpha rises from 0; 0: it is whole at once."}
    )


class TaskObjective(SinglePortion):
    """
    One part, `part`, that each row pays by itself: subclasses give its sum over rows. `student` may be any model of
    the task; where it has parameters that no task's loss reaches, its `freeze_unused` says so.

    Args:
        student (`PreTrainedModel`): Unwrapped, with its weights in place; the teacher starts as its copy.
        arguments (`DistillationArguments`): Or what derives from it.

    Raises:
        ValueError: a share that is none.
    """

    part: str

    def __init__(self, student: nn.Module, arguments: DistillationArguments):
        for name in ("distillation", "distillation_ramp"):
            if not 0 <= getattr(arguments, name) <= 1:
                raise ValueError(f"{name} is {getattr(arguments, name)}; expected a share in [0, 1]")

        # what no loss reaches is frozen before the teacher copies it
        self.arguments = arguments
        self.config = student.config
        if hasattr(student, "freeze_unused"):
            student.freeze_unused()
        self.teacher = EMATeacher(student, arguments.ema_momentum) if self.distils() else None

    def distils(self) -> bool:
        """Whether soft targets ever count."""
        return self.arguments.distillation > 0

    def alpha(self, progress: float) -> float:
        """The weight of soft targets at this share of the run."""
        ramp = self.arguments.distillation_ramp
        # no teacher, no soft targets
        if self.teacher is None:
            return 0.0
        return self.arguments.distillation * (min(1.0, progress / ramp) if ramp else 1.0)

    @abstractmethod
    def loss(self, student: nn.Module, batch: Batch, alpha: float, count: torch.Tensor) -> torch.Tensor:
        """The sum over the batch's rows, divided by `count`, 0-dim."""

    def before_step(self) -> None:
        # towards whatever the student now is: here the teacher moves before a step instead of after it
        if self.teacher is not None:
            self.teacher.update()

    def count(self, batch: Batch) -> Batch:
        return {self.part: torch.tensor(len(batch["input_ids"]), device=batch["input_ids"].device)}

    def represent(
        self, student: nn.Module, batch: Batch, targets: Targets, progress: float, counts: Batch | None = None
    ) -> Representations:
        # no row meets another: without counts nothing is asked
        if counts is None:
            return Representations()
        return Representations(parts={self.part: self.loss(student, batch, self.alpha(progress), counts[self.part])})

    def weigh(self, parts: Batch) -> torch.Tensor:
        return sum(parts.values())
