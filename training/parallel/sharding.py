"""Gathers and restores the state of models and optimisers that FSDP2 or DeepSpeed's ZeRO shard over processes.

Every function is collective: all processes must call it, in the same order. Unsharded parameters are only copied.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from oner.training.private_names import has_full_precision_state, link_moments, write_zero_3_master

from .distributed import fsdp_part, fsdp_spread, fsdp_whole, rank, world_size

State = dict[str, torch.Tensor]
Groups = list[dict[str, Any]]

# entries of AdamW's state without the parameter's shape: one number per parameter, or per flat partition
COUNTS = ("step",)


def is_zero_3(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 shards a parameter; its shape here is then (0,)."""
    return hasattr(tensor, "ds_tensor")


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter, to read or to write; the whole if it is not sharded."""
    return tensor.ds_tensor if is_zero_3(tensor) else fsdp_part(tensor)


def full_shape(tensor: torch.Tensor) -> torch.Size:
    return torch.Size(tensor.ds_shape) if is_zero_3(tensor) else tensor.shape


def full_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Unsharded shapes of a module's weights and buffers by name."""
    return {name: full_shape(value) for name, value in module.state_dict(keep_vars=True).items()}


@torch.no_grad()
def full_state(module: nn.Module) -> State:
    """
    A module's weights and buffers: whole on the first process, {} on the others. Unsharded tensors are the module's
    own, on their device; sharded ones are gathered on the CPU.
    """
    return _collect((name, _whole(value)) for name, value in module.state_dict(keep_vars=True).items())


@torch.no_grad()
def load_full_state(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """
    The inverse of `full_state`: each process takes its parts of the whole. ZeRO's fp32 master weights are set too.

    Raises:
        RuntimeError: names or shapes differ from the module's, as in torch; then nothing has been written.
    """
    # check all names and shapes before anything is written
    targets = module.state_dict(keep_vars=True)
    wrong = {name: "missing" for name in targets.keys() - state.keys()}
    wrong |= {name: "unexpected" for name in state.keys() - targets.keys()}
    wrong |= {
        name: f"{tuple(state[name].shape)}, expected {tuple(full_shape(target))}"
        for name, target in targets.items()
        if name in state and state[name].shape != full_shape(target)
    }
    if wrong:
        raise RuntimeError(f"the state does not fit {type(module).__name__}: {dict(sorted(wrong.items())[:10])}")

    for name, target in targets.items():
        _fill(target, state[name])


@torch.no_grad()
def full_optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[State, Groups]:
    """
    AdamW's state by "index.name", where index counts the parameters of all groups, and the groups as JSON.

    The tensors are whole on the first process, {} on the others; all processes get the groups.
    """
    if (zero := _zero_optimizer(optimizer)) is not None:
        return _zero_state(zero)

    # without ZeRO the state is torch's own, possibly sharded by FSDP2
    state = optimizer.state_dict()
    tensors = _collect(
        (f"{index}.{name}", _whole(torch.as_tensor(value)))
        for index, entries in state["state"].items()
        for name, value in entries.items()
    )
    return tensors, state["param_groups"]


@torch.no_grad()
def load_full_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], groups: Groups
) -> None:
    """
    The inverse of `full_optimizer_state`. Learning rates, betas and decay stay the optimiser's own.

    Raises:
        ValueError: the parameters are grouped differently, or a tensor does not have its parameter's shape.
    """
    # the groups must have the same numbers of parameters
    zero = _zero_optimizer(optimizer)
    mine = [len(group) for group in _zero_groups(zero)] if zero else [len(g["params"]) for g in optimizer.param_groups]
    theirs = [len(group["params"]) for group in groups]
    if theirs != mine:
        raise ValueError(f"the optimiser state has groups of {theirs} parameters, expected {mine}")

    # "index.name" -> index, name; each tensor must have its parameter's shape
    parameters = [p for group in (_zero_groups(zero) if zero else _parameters(optimizer)) for p in group]
    state: dict[int, State] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        if name not in COUNTS and value.shape != full_shape(parameters[int(index)]):
            expected = tuple(full_shape(parameters[int(index)]))
            raise ValueError(f"the optimiser's {key} has shape {tuple(value.shape)}, expected {expected}")
        state.setdefault(int(index), {})[name] = value

    # each process takes its part
    if zero is not None:
        _load_zero_state(zero, state)
        return
    for index, entries in state.items():
        for name, value in entries.items():
            entries[name] = value if name in COUNTS else fsdp_spread(value, parameters[index])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    return [group["params"] for group in optimizer.param_groups]


def _collect(named: Iterable[tuple[str, torch.Tensor]]) -> State:
    """Collects one tensor after the other, so that at most one gathered tensor is on the device."""
    state = {}
    for name, value in named:
        if rank() == 0:
            state[name] = value.detach()
    return state


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor: itself if it is not sharded, else gathered, on the CPU for the first process."""
    if not is_zero_3(tensor):
        whole = fsdp_whole(tensor)
        return tensor if whole is tensor else _on_host(whole)
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return _on_host(tensor.detach().clone())


def _on_host(whole: torch.Tensor) -> torch.Tensor:
    return whole.cpu() if rank() == 0 else whole


def _zero_3_part(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor as ZeRO-3 shards it: flat, in equal parts, the last one padded."""
    size = parameter.ds_tensor.numel()
    flat = nn.functional.pad(value.flatten(), (0, size * world_size() - value.numel()))  # (size * world,)
    return flat[size * rank() : size * (rank() + 1)]  # (size,)


def _fill(target: torch.Tensor, value: torch.Tensor) -> None:
    value = value.to(device=target.device, dtype=target.dtype)

    # ZeRO-3: the part, and the fp32 master weights that the optimiser updates
    if is_zero_3(target):
        part = _zero_3_part(value, target)
        target.ds_tensor.copy_(part)
        if target.numel():  # small parameters that ZeRO-3 does not shard
            target.copy_(value)
        if target.requires_grad:
            write_zero_3_master(target, part)
        return

    # unsharded and FSDP2; ZeRO-1 and 2 also have fp32 master weights
    own_part(target).copy_(fsdp_part(fsdp_spread(value, target)))
    if has_full_precision_state(target):
        target.set_full_hp_param(value)


def _zero_optimizer(optimizer: torch.optim.Optimizer) -> Any | None:
    """DeepSpeed's ZeRO optimiser inside Accelerate's wrapper; None without ZeRO."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if hasattr(inner, "bit16_groups") or hasattr(inner, "fp16_groups") else None


def _is_stage_3(zero: Any) -> bool:
    return not hasattr(zero, "bit16_groups")


def _zero_groups(zero: Any) -> list[list[torch.Tensor]]:
    """The parameter groups as given to the optimiser; ZeRO replaces them by flat partitions."""
    if not _is_stage_3(zero):
        return [list(group) for group in zero.bit16_groups]
    groups: list[list[torch.Tensor]] = [[] for _ in zero.optimizer.param_groups]
    for number, part in enumerate(zero.fp16_groups):
        groups[zero.sub_group_to_group_id[number]].extend(part)
    return groups


def _flat_masters(zero: Any) -> list[torch.Tensor]:
    return zero.fp32_partitioned_groups_flat if _is_stage_3(zero) else zero.single_partition_of_fp32_groups


def _flat_of_each(zero: Any) -> list[torch.Tensor]:
    """For each parameter, in the order of `_zero_groups`, the flat master partition that contains its part."""
    parts = zero.fp16_groups if _is_stage_3(zero) else zero.bit16_groups
    return [flat for part, flat in zip(parts, _flat_masters(zero), strict=True) for _ in part]


def _link_moments(zero: Any) -> None:
    # DeepSpeed links ZeRO-1 and 2's moments after the first group's first step, when other groups have none yet
    if not _is_stage_3(zero):
        link_moments(zero)


def _zero_state(zero: Any) -> tuple[State, Groups]:
    from deepspeed.utils import safe_get_full_optimizer_state

    # moments are stored in flat partitions; DeepSpeed finds those of a parameter through links
    held = zero.optimizer.state
    _link_moments(zero)
    parameters = [parameter for group in _zero_groups(zero) for parameter in group]

    def entries() -> Iterable[tuple[str, torch.Tensor]]:
        for index, (parameter, flat) in enumerate(zip(parameters, _flat_of_each(zero), strict=True)):
            for name, value in held[flat].items() if flat in held else ():
                is_part = torch.is_tensor(value) and value.shape == flat.shape
                whole = safe_get_full_optimizer_state(parameter, name) if is_part else torch.as_tensor(value)
                yield f"{index}.{name}", _on_host(whole.clone())

    # groups as torch writes them, with parameters numbered over all groups
    tensors = _collect(entries())
    groups = []
    start = 0
    for group, settings in zip(_zero_groups(zero), zero.optimizer.param_groups, strict=True):
        options = {name: value for name, value in settings.items() if name != "params"}
        groups.append({**options, "params": list(range(start, start + len(group)))})
        start += len(group)
    return tensors, groups


def _load_zero_state(zero: Any, state: Mapping[int, State]) -> None:
    # create moments if the optimiser has not stepped yet
    parameters = [parameter for group in _zero_groups(zero) for parameter in group]
    for index, flat in enumerate(_flat_of_each(zero)):
        held = zero.optimizer.state.setdefault(flat, {})
        for name, value in state.get(index, {}).items():
            if name in COUNTS:
                held[name] = value.to(flat.device)
            elif name not in held:
                held[name] = torch.zeros_like(flat)

    # then write each parameter's part of them through the links
    _link_moments(zero)
    for index, parameter in enumerate(parameters):
        for name, value in state.get(index, {}).items():
            if name in COUNTS:
                continue
            if _is_stage_3(zero):
                part = _zero_3_part(value.to(parameter.ds_tensor), parameter)
                zero.set_local_hp_param(part, parameter, name)
            else:
                # the call inside DeepSpeed's `safe_set_full_optimizer_state`, which would first look up the stage
                parameter.set_full_hp_param(value.to(parameter.device), name)
