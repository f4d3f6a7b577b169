"""Runs a training step on torch's fake tensors, to count its operations and memory without allocating anything.

The family's own code runs, so no formulas are needed here.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from oner.training.objectives.objective import Batch, Example, Portion, objective_classes
from oner.training.private_names import FakeTensorMode, storage_id
from oner.training.run.arguments import Arguments
from oner.training.run.building import build_model

from .flops import flop_counter

PROGRESS = 0.5


@dataclass(frozen=True)
class Rehearsal:
    """
    Costs of one step of one process.

    Attributes:
        pairs (`int`): Pairs of the step.
        parameters (`int`): Parameters of the student.
        trained (`int`): Parameters of the student with a gradient.
        teacher (`int`): Parameters of the teachers.
        buffers (`int`): Bytes of the buffers of student and teachers.
        forward, targets, backward (`float`): Operations of the student's forward with the losses, of the targets (a
            teacher's forward), and of the backward with its recomputation.
        repeated (`float`): Additional operations of a batch in chunks: the student's first pass.
        activations (`int`): Bytes saved for the backward, each storage once, without parameters.
        inputs (`int`): Bytes of the batch.
    """

    pairs: int
    parameters: int
    trained: int
    teacher: int
    buffers: int
    forward: float
    targets: float
    repeated: float
    backward: float
    activations: int
    inputs: int

    @property
    def flops(self) -> float:
        return self.forward + self.targets + self.backward


def rehearse(
    arguments: Arguments, config: PreTrainedConfig, lengths: Sequence[int], precision: str = "no"
) -> Rehearsal:
    """Runs the step of `arguments` on texts of these lengths; `precision` is `no`, `bf16` or `fp16`."""
    # the model of the run, without weights
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    family = objective_classes(arguments.model.family)[0]
    with torch.device("meta"):  # meta, because fake tensors cannot be deep-copied, as a teacher copies its student
        model = build_model(replace(arguments, model=replace(arguments.model, initial_model=None)), config)
        objective = family(model, family.without_files(arguments.objective))

    # then as fake tensors on the CPU, with its teachers and queues
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        _fake(_modules(model, objective))
        for teacher in objective.teachers():
            teacher.follow(model)
        objective.to(torch.device("cpu"))  # state outside modules: queues
        fake.allow_non_fake_inputs = False  # from here on a real tensor would be a mistake

        # a batch of the given lengths, and the storages in memory before the step
        masking = arguments.data.masking
        keep = getattr(arguments.objective, "image_keep", 1.0)
        masked = Example(masking.mlm_probability, sum(masking.mim_ratio) / 2, image_keep=keep)
        batches = family.example_batches(config, lengths, masked)
        inputs = [tensor for batch in batches.values() for tensor in batch.values()]
        owned = {storage_id(tensor) for module in _modules(model, objective) for tensor in _tensors(module)}
        owned |= {storage_id(tensor) for tensor in inputs}

        # each portion once
        model.train()
        autocast = nullcontext if half is None else partial(torch.autocast, "cpu", half)
        passes = [_run(portion, model, batches[name], owned, autocast) for name, portion in objective.portions.items()]
        forward, targets, repeated, backward, activations = map(sum, zip(*passes, strict=True))

    # the counts of the step, and the sizes of the state between steps
    teachers = [teacher.model for teacher in objective.teachers()]
    return Rehearsal(
        pairs=len(lengths),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        teacher=sum(parameter.numel() for teacher in teachers for parameter in teacher.parameters()),
        buffers=sum(b.numel() * b.element_size() for m in (model, *teachers) for b in m.buffers()),
        forward=forward,
        targets=targets,
        repeated=repeated,
        backward=backward,
        activations=activations,
        inputs=sum(tensor.numel() * tensor.element_size() for tensor in inputs),
    )


class Pass(NamedTuple):
    """Operations of a portion's forward, targets, repeated pass (gradient cache) and backward; bytes saved."""

    forward: float
    targets: float
    repeated: float
    backward: float
    activations: int


def _run(portion: Portion, model: nn.Module, batch: Batch, owned: set[int], autocast: Callable) -> Pass:
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if storage_id(tensor) not in owned:
            saved[storage_id(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    # parts of the step: the targets, and the pass that the gradient cache repeats
    with autocast(), torch.no_grad():
        targets, values = _counted(lambda: portion.targets(model, batch, PROGRESS))
        repeated, _ = _counted(lambda: portion.represent(model, batch, values, PROGRESS))

    # the whole step, with every tensor that autograd saves for the backward
    with autocast(), torch.autograd.graph.saved_tensors_hooks(keep, _same):
        whole, taken = _counted(lambda: portion.take(model, batch, PROGRESS))
    backward, _ = _counted(taken.loss.backward)
    return Pass(whole - targets, targets, repeated, backward, sum(saved.values()))


def _counted(function: Callable[[], Any]) -> tuple[float, Any]:
    """Operations of a call, and its result."""
    with flop_counter() as counter:
        result = function()
    return float(counter.get_total_flops()), result


def _modules(model: torch.nn.Module, objective) -> list[torch.nn.Module]:
    return [model, *(teacher.model for teacher in objective.teachers())]


def _fake(modules: list[torch.nn.Module]) -> None:
    """Replaces meta parameters and buffers by fake ones on the CPU, where autocast works; tied ones stay tied."""
    # id of the replaced parameter -> its fake
    fakes: dict[int, torch.Tensor] = {}
    for module in (part for whole in modules for part in whole.modules()):
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            fakes.setdefault(id(parameter), torch.nn.Parameter(empty, parameter.requires_grad))
            setattr(module, name, fakes[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
