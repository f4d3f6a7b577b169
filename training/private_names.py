"""Private names of other libraries, each behind a function of ours: what they do without is no promise of theirs.

tests/test_private_names.py has a test for each, which fails when a release moves or drops the name, and keeps such
names out of all other files. Files that travel to the Hub cannot import this one; that test lists what they use.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from transformers import PreTrainedConfig, PreTrainedModel

# as torch calls those of Intel's matrix units, of AVX-512, and of Arm
BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")

# FakeTensorMode: tensors that have shapes, dtypes and devices but no contents
# BatchNorm: what every batch norm of torch is, SyncBatchNorm too
__all__ = [
    "BatchNorm",
    "FakeTensorMode",
    "attention_implementation",
    "drop_overflown_step",
    "fused_attention_of_the_cpu",
    "has_fast_bf16",
    "has_full_precision_state",
    "link_moments",
    "local_part",
    "most_alive",
    "raise_recompile_limit",
    "registered_models",
    "set_distributed_type",
    "storage_id",
    "undivided_layers",
    "write_zero_3_master",
]


# transformers


def registered_models(auto: type) -> Mapping[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Configuration -> model, of an auto class such as `AutoModel`."""
    return auto._model_mapping


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """`eager`, `sdpa` and so on, as `set_attn_implementation` takes it."""
    return config._attn_implementation


def undivided_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the classes that a transformers model wants kept whole on a device; none for another module."""
    return tuple(getattr(model, "_no_split_modules", None) or ())


# torch


def has_fast_bf16() -> bool:
    """Whether the CPU has instructions that multiply bf16, and torch the library that uses them, oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    # older releases have no public name for what a CPU can do, and do not tell of Arm's
    if not hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in BF16_INSTRUCTIONS)


def raise_recompile_limit(graphs: int) -> None:
    """Lets one compiled function have so many graphs, or more if that is allowed already."""
    torch._dynamo.config.recompile_limit = max(graphs, torch._dynamo.config.recompile_limit)


def fused_attention_of_the_cpu() -> tuple[Any, Any]:
    """The operators, forward and backward, that `scaled_dot_product_attention` becomes on a CPU."""
    aten = torch.ops.aten
    return (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )


def local_part(tensor: Any) -> torch.Tensor:
    """This process's part of a DTensor, the very tensor; `to_local` gives a view that autograd follows."""
    return tensor._local_tensor


def storage_id(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory, fake ones too, which have no address."""
    return tensor.untyped_storage()._cdata


def most_alive(function: Callable[[], object]) -> int:
    """Bytes of the tensors that a call makes, as many as live at once: each storage once, on any device."""
    tracker = MemTracker()
    with tracker:
        function()
    return sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())


# accelerate


def set_distributed_type(kind: DistributedType) -> None:
    """What every later `Accelerator` or `PartialState` of this process takes itself for."""
    PartialState._shared_state["distributed_type"] = kind


# DeepSpeed


def write_zero_3_master(parameter: torch.Tensor, part: torch.Tensor) -> None:
    """This process's part of a parameter into ZeRO-3's fp32 copy of it, if it has one."""
    optimizer = getattr(parameter, "_z3_optimizer", None)
    if optimizer is not None:
        optimizer.set_local_hp_param(part, parameter)


def has_full_precision_state(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-1 or 2 keeps a fp32 copy of it, to be written by `parameter.set_full_hp_param`."""
    return getattr(parameter, "_hp_mapping", None) is not None


def link_moments(zero: Any) -> None:
    """Lets the parameters of a ZeRO-1 or 2 optimiser find their moments, as it does by itself after a first step."""
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def drop_overflown_step(engine: nn.Module) -> None:
    """Ends a step of ZeRO-3 without applying it, as its own `step` does where fp16 gradients overflow."""
    engine.optimizer._loss_scale_update_and_overflow_cleanup()
    engine._step_applied = False
