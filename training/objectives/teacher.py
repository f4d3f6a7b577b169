"""The EMA teacher: a copy of the student in fp32 that follows it slowly and makes the targets."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from oner.training.parallel.sharding import full_state, load_full_state, own_part


class EMATeacher:
    """
    theta_t <- m theta_t + (1 - m) theta_s for every parameter, in fp32, after the optimiser's step. Buffers are not
    averaged and the copy stays in training mode, so batch norm sees the teacher's own statistics (MoCo-v3's code).

    Where an engine spreads the student's fp32 parameters over processes (FSDP2, ZeRO-3) it spreads `model` alike and
    calls `follow` again; each process then averages the parts that it holds.

    Args:
        student (`nn.Module`): The unwrapped student, with its weights in place: the copy is taken now.
        momentum (`float`): m; the paper's constant 0.996.
        unused (`tuple[str, ...]`): Names of submodules that the targets do not need; they are dropped from the copy.
    """

    def __init__(self, student: nn.Module, momentum: float = 0.996, unused: tuple[str, ...] = ()):
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"expected an EMA momentum in [0, 1], got {momentum}")
        self.momentum = momentum
        # in training mode, so that batch norm keeps statistics of its own
        self.model = copy.deepcopy(student).float().requires_grad_(False).train()
        for name in unused:
            setattr(self.model, name, None)
        self.follow(student)

    def follow(self, student: nn.Module, release: Callable[[], None] | None = None) -> None:
        """
        Takes the parameters to follow by their names, whatever an engine has put into their place.

        Args:
            student (`nn.Module`): Unwrapped.
            release: Called before each update: an engine that gathers the teacher's parameters to run it drops here
                what it still holds of them, which the update makes old.

        Raises:
            ValueError: a parameter that is not laid out as the teacher's own, which would then not be averaged.
        """
        # the student's parameters by name, as they stand now
        theirs = dict(student.named_parameters())
        self._release = release
        self._student = student
        self._names = [name for name, _ in self.model.named_parameters()]
        self._mine = list(self.model.parameters())
        self._theirs = [theirs[name] for name in self._names]
        self._check()

    def _check(self) -> None:
        for name, mine, theirs in zip(self._names, self._mine, self._theirs, strict=True):
            one = own_part(mine)
            other = own_part(theirs)
            if one.shape != other.shape:
                raise ValueError(
                    f"the teacher's {name} holds {tuple(one.shape)} here and the student's {tuple(other.shape)}; "
                    f"expected the same part of it"
                )

    @torch.no_grad()
    def update(self, applied: torch.Tensor | None = None) -> None:
        """
        One EMA step towards the student; none where `applied` (0-dim) is 0, since the student did not move.

        Raises:
            RuntimeError: an engine has replaced the parameters since `follow`, and the teacher would stand still.
        """
        # the student must hold the very parameters that are followed
        if self._names and self._student.get_parameter(self._names[-1]) is not self._theirs[-1]:
            raise RuntimeError(
                f"the student's {self._names[-1]} is not the one that the teacher follows: an engine replaced it; "
                f"expected the objective to name this teacher in `teachers()`, or a call of `follow`"
            )

        # on a CPU reading the flag costs nothing
        if applied is not None and applied.device.type == "cpu":
            if not applied:
                return
            applied = None
        if self._release is not None:
            self._release()

        # the parts that this process holds, in the teacher's precision
        mine = [own_part(parameter).detach() for parameter in self._mine]
        current = [own_part(p).detach().to(own.dtype) for p, own in zip(self._theirs, mine, strict=True)]
        if applied is None:
            torch._foreach_lerp_(mine, current, 1.0 - self.momentum)
            return
        # asking an accelerator for the flag would make the host wait
        difference = torch._foreach_sub(current, mine)
        torch._foreach_mul_(difference, (1.0 - self.momentum) * applied)
        torch._foreach_add_(mine, difference)

    @torch.no_grad()
    def __call__(self, **inputs):
        return self.model(**inputs)

    def to(self, device: torch.device) -> "EMATeacher":
        self.model.to(device)
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Collective: whole on the first process, {} on the others."""
        return full_state(self.model)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Collective. Raises `RuntimeError` with the names and shapes that are not the teacher's."""
        load_full_state(self.model, state)
