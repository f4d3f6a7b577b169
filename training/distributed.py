"""The only user of torch.distributed. With one process every function here is the identity."""

import torch
import torch.distributed as dist
from torch import nn


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


@torch.no_grad()
def gather_without_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of all processes in the order of their ranks, as negatives: (B, ...) -> (B * world, ...). B must agree."""
    if not is_distributed():
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def any_process(flag: bool, device: torch.device) -> bool:
    """True everywhere as soon as one process says so: a stop signal reaches one process, all must stop together."""
    if not is_distributed():
        return flag
    votes = torch.tensor(int(flag), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """SyncBN as MoCo-v3 has it, before the teacher is copied from the model. torch has it on accelerators only."""
    if is_distributed() and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model
