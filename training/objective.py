"""What the engine knows of a family: a loss to minimise, something to do after the step, and state to keep."""

from importlib import import_module
from typing import Any, Protocol

import torch
from torch import nn

# family -> module of the objective and of its arguments; a new family adds its line here
OBJECTIVES = {"oner": ("oner.training.objective_oner", "OneRObjective", "OneRObjectiveArguments")}


class Objective(Protocol):
    """Student, teacher and losses of one family. It owns no trainable parameter and knows no engine."""

    def __call__(
        self, student: nn.Module, batch: dict[str, torch.Tensor], progress: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch, and the parts to log as 0-dim tensors. `student` may be wrapped by an engine."""

    def after_step(self) -> None:
        """Called once after each step of the optimiser: teachers and queues move here."""

    def to(self, device: torch.device) -> "Objective": ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...

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
