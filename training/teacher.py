"""The EMA teacher: a copy of the student in fp32 that follows it slowly and makes the targets."""

import copy

import torch
from torch import nn


class EMATeacher:
    """
    theta_t <- m theta_t + (1 - m) theta_s for every parameter, in fp32, after the optimiser's step. Buffers are not
    averaged and the copy stays in training mode, so batch norm sees the teacher's own statistics (MoCo-v3's code).

    Args:
        student (`nn.Module`): The unwrapped student, with its weights in place: the copy is taken now.
        momentum (`float`): m; the paper's constant 0.996.
        unused (`tuple[str, ...]`): Names of submodules that the targets do not need; they are dropped from the copy.
    """

    def __init__(self, student: nn.Module, momentum: float = 0.996, unused: tuple[str, ...] = ()):
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"expected an EMA momentum in [0, 1], got {momentum}")
        self.momentum = momentum
        self.model = copy.deepcopy(student).float().requires_grad_(False).train()
        for name in unused:
            setattr(self.model, name, None)
        theirs = dict(student.named_parameters())
        pairs = [(parameter, theirs[name]) for name, parameter in self.model.named_parameters()]
        self._mine, self._theirs = [list(side) for side in zip(*pairs, strict=True)]

    @torch.no_grad()
    def update(self) -> None:
        """One EMA step towards the student."""
        current = [parameter.detach().float() for parameter in self._theirs]
        torch._foreach_lerp_(self._mine, current, 1.0 - self.momentum)

    @torch.no_grad()
    def __call__(self, **inputs):
        return self.model(**inputs)

    def to(self, device: torch.device) -> "EMATeacher":
        self.model.to(device)
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(state)
