"""All use of torch.distributed. With one process every function here is the identity."""

import atexit
import gc
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from oner.training.private_names import local_part, undivided_layers


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


@atexit.register
def leave_gloo() -> None:
    """
    Ends gloo's threads while the interpreter still runs. A thread that frees its last tensor later requests the GIL of
    an interpreter that is shutting down, and the process aborts after its work is done (std::terminate, status 134).
    """
    if dist.is_available() and dist.is_initialized() and "gloo" in dist.get_backend():
        gc.collect()  # a DDP model in a cycle keeps the group and its threads
        dist.destroy_process_group()
        _wait_for_rest("pt_gloo_runloop", seconds=10)


def _wait_for_rest(threads: str, seconds: float) -> None:
    """Waits until the threads of that name sleep, if a script still holds their group. Only Linux shows this."""
    end, looks = time.monotonic() + seconds, 0
    while looks < 3 and time.monotonic() < end:
        states = [_name_and_state(task) for task in Path("/proc/self/task").glob("*/stat")]
        looks = 0 if (threads, "R") in states else looks + 1
        time.sleep(0.001)  # releases the GIL to a thread that waits for it


def _name_and_state(task: Path) -> tuple[str, str]:
    """Parses `12 (pt_gloo_runloop) S 1 ...`; empty strings for a thread that has just ended."""
    try:
        head, _, tail = task.read_text().rpartition(")")
    except OSError:
        return "", ""
    return head.partition("(")[2], tail.strip()[:1]


def backend() -> str:
    """The communication backend: nccl, gloo...; "none" with one process."""
    return dist.get_backend() if is_distributed() else "none"


@torch.no_grad()
def gather_without_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Gathers the rows of all processes by rank, as negatives: (B, ...) -> (B * world, ...). B must be the same."""
    if not is_distributed():
        return tensor.detach()
    chunks = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(chunks, tensor.detach().contiguous())
    return torch.cat(chunks)  # (B * world, ...)


def gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """
    Gathers the rows of all processes with gradient: (B, ...) -> (B * world, ...).

    Each row's gradient, summed over processes, returns to the process of the row. With data-parallel averaging of
    gradients this gives the gradient of the mean of the losses.
    """
    return _Gather.apply(tensor) if is_distributed() else tensor


class _Gather(torch.autograd.Function):
    """Own code: torch.distributed.nn has been deprecated in favour of a private module."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return gather_without_gradient(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        # cloned, because all_reduce works in place and this tensor is autograd's
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # (B * world, ...)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]  # (B, ...)


@torch.no_grad()
def mean_counts(counts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    0-dim counts of this process -> their means over processes; the total is at least one.

    A process divides its own sum by this mean, so that the average over processes is the mean over all items.
    """
    if not counts:
        return {}
    total = torch.stack([count.long() for count in counts.values()])  # (number of counts,)
    if is_distributed():
        dist.all_reduce(total)
    return dict(zip(counts, (total.clamp_min(1) / world_size()).unbind(), strict=True))


def any_process(flag: bool, device: torch.device) -> bool:
    """True on all processes if it is true on one: a stop signal reaches one process, but all must stop together."""
    if not is_distributed():
        return flag
    votes = torch.tensor(int(flag), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def sum_over_processes(counts: Sequence[int], device: torch.device) -> list[int]:
    """Each count summed over processes, with the same result on all. Processes wait here for each other."""
    if not is_distributed():
        return list(counts)
    total = torch.tensor(counts, device=device)
    dist.all_reduce(total)
    return total.tolist()


def minimum_over_processes(flag: torch.Tensor) -> torch.Tensor:
    """Minimum of all processes' 0-dim flags, on their device, without a host synchronisation."""
    if is_distributed():
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return flag


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """SyncBN as in MoCo-v3, before the teacher is copied from the model. torch supports it only on accelerators."""
    if is_distributed() and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def reduce_scatter_averages(device: torch.device) -> bool:
    """
    Whether reduce-scatter averages, as FSDP2 requests. Collective.

    gloo in torch 2.7 silently sums instead, so gradients would be too large by the number of processes.
    """
    if not is_distributed():
        return True
    mine = torch.empty(1, device=device)
    dist.reduce_scatter_tensor(mine, torch.ones(world_size(), device=device), op=dist.ReduceOp.AVG)
    return mine.item() == 1.0


def fsdp_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's rows of a tensor that FSDP2 has sharded, sharing its memory; any other tensor unchanged."""
    return local_part(tensor) if isinstance(tensor, DTensor) else tensor


def fsdp_whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows of a sharded tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fsdp_spread(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shards a whole tensor, equal on all processes, in the same way as `like`."""
    if not isinstance(like, DTensor):
        return whole
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def fsdp_shard_alike(frozen: nn.Module, sharded: nn.Module) -> None:
    """Applies FSDP2 to a frozen copy of a model under FSDP2, with the same sharding of each parameter."""
    # innermost layers first, on the model's own mesh
    mesh = next(parameter.device_mesh for parameter in sharded.parameters() if isinstance(parameter, DTensor))
    for module in reversed(list(frozen.modules())[1:]):
        if type(module).__name__ in undivided_layers(sharded):
            fully_shard(module, mesh=mesh)

    # by default torch keeps the root's parameters gathered until the backward, which a frozen model never has, so they
    # would remain those of the first step
    fully_shard(frozen, mesh=mesh, reshard_after_forward=True)
