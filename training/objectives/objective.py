"""What the engine knows of a family: a loss to minimise, something to do after the step, and state to keep."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import nn

from oner.training.parallel.distributed import mean_counts

from .teacher import EMATeacher

# family -> module of the objective and of its arguments; a new family adds its line here
OBJECTIVES = {
    "oner": ("oner.training.objectives.oner", "OneRObjective", "OneRObjectiveArguments"),
    "simla": ("oner.training.objectives.simla", "SimlaObjective", "SimlaObjectiveArguments"),
}


@dataclass
class Representations:
    """
    What a pass of the student gives for some rows of a batch.

    Attributes:
        rows: By name, (B, ...) each with gradient: what the loss compares with other rows, of the batch or of other
            processes. Those of a batch in pieces are laid end to end.
        common: By name, what every piece gives alike, for it belongs to the model and to no row: a temperature.
        parts: By name, 0-dim with gradient: what each row pays by itself, summed over these rows and divided by the
            count of the whole batch, so that the sum over its pieces, and the mean over processes, is the whole's.
    """

    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    common: dict[str, torch.Tensor] = field(default_factory=dict)
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(ABC):
    """
    Student, teacher and losses of one family. It owns no trainable parameter and knows no engine. Calling it takes a
    batch in one pass; `gradient_cache` takes it in pieces, by the very methods that the call is made of. The mean of
    the processes' losses is the loss of the global batch.
    """

    def __call__(
        self, student: nn.Module, batch: dict[str, torch.Tensor], progress: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch, and the parts to log as 0-dim tensors. `student` may be wrapped by an engine."""
        self.before_step()
        online = self.represent(student, batch, progress, mean_counts(self.count(batch)))
        targets = self.targets(student, batch, progress)
        parts = {**self.compare(online.rows, online.common, targets, progress), **online.parts}
        return self.weigh(parts), {name: part.detach() for name, part in parts.items()}

    def before_step(self) -> None:  # noqa: B027  most families have nothing to move
        """Called once before the passes of a step, in one go or in pieces: what has to move before it is taken."""

    @abstractmethod
    def split(self, batch: dict[str, torch.Tensor], pieces: int) -> list[dict[str, torch.Tensor]]:
        """A batch on the CPU in `pieces` of consecutive rows, as even as can be."""

    @abstractmethod
    def count(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """How many things each of `Representations.parts` is a mean of, 0-dim on the batch's device."""

    @abstractmethod
    def represent(
        self,
        student: nn.Module,
        batch: dict[str, torch.Tensor],
        progress: float,
        counts: dict[str, torch.Tensor] | None = None,
    ) -> Representations:
        """
        One pass of the student. `counts` holds means over processes of `count` of the whole batch. Without it only
        `rows` and `common` are asked for, and must come out as they do with it: a batch in pieces is represented
        twice, with torch's generators set back in between, and no other source of chance is.
        """

    @abstractmethod
    def targets(self, student: nn.Module, batch: dict[str, torch.Tensor], progress: float) -> dict[str, torch.Tensor]:
        """What rows are compared with, (B, ...) each, of these rows only, without gradient: a teacher's keys, ids."""

    @abstractmethod
    def compare(
        self,
        rows: dict[str, torch.Tensor],
        common: dict[str, torch.Tensor],
        targets: dict[str, torch.Tensor],
        progress: float,
    ) -> dict[str, torch.Tensor]:
        """The 0-dim parts of the loss that see the whole batch; processes gather here, with or without gradient."""

    @abstractmethod
    def weigh(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss, a weighted sum of whichever parts are given."""

    def teachers(self) -> Iterable[EMATeacher]:
        """Teachers that follow the student: an engine that spreads the student over processes spreads them alike."""
        return ()

    @abstractmethod
    def after_step(self, applied: torch.Tensor | None = None) -> None:
        """
        Called once after each step of the optimiser: teachers and queues move here.

        `applied` is 0-dim, 1 where the update was applied and 0 where it was not, for it held NaN or infinity: then
        nothing may move. It lies on the device, so that asking it makes no accelerator wait. None: it was applied.
        """

    @abstractmethod
    def to(self, device: torch.device) -> "Objective": ...

    @abstractmethod
    def state_dict(self) -> dict[str, torch.Tensor]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


def objective_classes(family: str) -> tuple[type, type]:
    """The objective of a family and its arguments' dataclass. Raises `ValueError` that lists the known families."""
    if family not in OBJECTIVES:
        raise ValueError(f"unknown family {family!r}; expected one of {', '.join(OBJECTIVES)}")
    module_name, objective, arguments = OBJECTIVES[family]
    module = import_module(module_name)
    return getattr(module, objective), getattr(module, arguments)


def build_objective(family: str, student: nn.Module, arguments: Any) -> Objective:
    """The objective over an unwrapped student with its weights in place."""
    return objective_classes(family)[0](student, arguments)
