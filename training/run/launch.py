"""Sets up precision and the parallel engine of a run: the one Accelerate was launched with (DDP, FSDP2, DeepSpeed).

Every engine gives the same training: fp32 weights under torch's autocast, with the teacher sharded like the student.
Options with which an engine would train differently are refused here, before anything is read or built.
"""

import contextlib
import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper  # accelerate.utils has it only beside DeepSpeed
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from oner.training.objectives.objective import Objective
from oner.training.parallel.distributed import backend, fsdp_shard_alike, reduce_scatter_averages, world_size
from oner.training.parallel.sharding import full_state, is_zero_3
from oner.training.private_names import drop_overflown_step, has_fast_bf16, set_distributed_type
from oner.training.publishing.public import plain

from .arguments import Arguments, Launch, RunArguments, read_launch

# options of ZeRO that the teacher cannot follow, and their values when off
LOSSY = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "mics_shard_size": -1,
}


class ParallelError(ValueError):
    """The engine or its options would train differently from a single process; the message names an alternative."""


def make_accelerator(run: RunArguments) -> Accelerator:
    """
    Accelerate as it was launched, with this run's precision and trackers.

    Raises:
        ValueError: a tracker is not installed.
        ParallelError: the options would train differently from one process, such as plain gradient accumulation.
    """
    installed = {tracker.value for tracker in get_available_trackers()}
    if absent := [name for name in run.report_to if name not in {*installed, "all"}]:
        # Accelerate would only warn, and the numbers would be lost
        raise ValueError(f"report_to names {absent}, which is not installed; installed are {sorted(installed)}")

    # engine and precision; conflicting options are refused
    launch = read_launch()
    precision = choose_precision(run.mixed_precision)
    _check_launch(launch, precision)
    sharded = launch.fsdp or launch.deepspeed
    options: dict[str, Any] = {}
    if launch.deepspeed and launch.ranked and not torch.accelerator.is_available():
        # otherwise Accelerate counts one process under DeepSpeed on CPUs, for any number of processes
        options["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
    elif launch.processes > 1 and not torch.accelerator.is_available():
        # otherwise, without a visible accelerator, Accelerate counts one process, and each would train by itself
        options["cpu"] = True
    accelerator = Accelerator(
        # FSDP and DeepSpeed would cast the weights, and lose updates below half precision
        mixed_precision="no" if sharded else precision,
        log_with=run.report_to or None,
        project_dir=run.output_dir,
        step_scheduler_with_optimizer=False,
        **options,
    )

    # all started processes must take part: otherwise each would train by itself on a part of each batch
    counts = {"started": launch.processes, "Accelerate's": accelerator.num_processes, "torch's": world_size()}
    if len(set(counts.values())) > 1:
        raise ParallelError(
            f"the launcher, Accelerate and torch.distributed count different numbers of processes, {counts}: they "
            "would not communicate; start the run with `accelerate launch` or torchrun, on visible devices"
        )

    # other options in the configuration of `accelerate launch`
    if accelerator.gradient_accumulation_steps != 1:
        raise ParallelError(
            f"gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}: with accumulation, a "
            "contrastive loss has only the negatives of a micro-batch, which is another loss; use "
            "gradient_cache_chunks, which processes the batch in chunks and keeps all its negatives, or lower "
            "batch_size, or add processes"
        )
    if launch.fsdp:
        _take_fsdp(accelerator)
    if launch.deepspeed:
        _take_deepspeed(accelerator, run)
    if sharded and precision == "bf16":
        accelerator.autocast = lambda *_: torch.autocast(accelerator.device.type, dtype=torch.bfloat16)
    return accelerator


# trackers with names for runs -> their option for it
NAMES_OF_RUNS = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "swanlab": "experiment_name",
}


def tracker_options(arguments: Arguments) -> dict[str, Any]:
    """Arguments of `Accelerator.init_trackers`: project, names, and the configuration as a flat dictionary."""
    flat = {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in plain(arguments.to_dict()).items()
    }
    name = arguments.run.run_name
    names = {} if name is None else {tracker: {called: name} for tracker, called in NAMES_OF_RUNS.items()}
    return {"project_name": arguments.run.tracker_project, "config": flat, "init_kwargs": names}


def engine_of(accelerator: Accelerator) -> str:
    """Short name of the parallel engine."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return "FSDP2"
    return "one process" if kind == DistributedType.NO else f"DDP over {backend()}"


def choose_precision(asked: str) -> str:
    """`auto` is bf16 on GPUs that support it, else fp16; on CPUs bf16 if they have instructions for it, else no."""
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    # without such instructions (AMX, AVX-512, Arm) bf16 on a CPU is slower than fp32
    return "bf16" if has_fast_bf16() else "no"


def _check_launch(launch: Launch, precision: str) -> None:
    # combinations in which an engine would train differently from one process
    engine = "FSDP" if launch.fsdp else "DeepSpeed"
    if (launch.fsdp or launch.deepspeed) and precision == "fp16":
        raise ParallelError(
            f"{engine} with mixed_precision fp16 would keep its weights in half precision, which the teacher cannot "
            "follow: use bf16 or no, or plain data parallelism, which scales an fp16 loss and keeps fp32 weights"
        )
    if launch.megatron:
        raise ParallelError("Megatron-LM supports only its own models, not these: use DDP, FSDP2 or DeepSpeed")
    if (launch.fsdp or launch.deepspeed) and not launch.ranked:
        raise ParallelError(
            f"{engine} was requested, but this is a single process without a launcher, which Accelerate would train "
            f"without it: start it with `accelerate launch` or torchrun, or leave {engine} out"
        )
    if launch.deepspeed and launch.cpu:
        raise ParallelError(
            "DeepSpeed was requested together with the CPU (use_cpu, --cpu), for which Accelerate would silently use "
            "plain data parallelism: leave out one of the two; DeepSpeed finds the CPU by itself"
        )


def _take_fsdp(accelerator: Accelerator) -> None:
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate supports FSDP only on accelerators, and would silently train without it on CPUs
        accelerator.state.distributed_type = DistributedType.FSDP
        set_distributed_type(DistributedType.FSDP)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.distributed_type != DistributedType.FSDP:
        raise ParallelError(
            f"FSDP was requested, but Accelerate chose {accelerator.distributed_type.value}: nothing would be "
            "sharded; leave FSDP out, or use devices that it supports"
        )

    if not reduce_scatter_averages(accelerator.device):
        raise ParallelError(
            f"FSDP2 needs averaged gradients, but on {accelerator.device} torch {torch.__version__} sums them: use "
            "DDP, a later torch, or a GPU"
        )

    # options that the teacher cannot follow
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ParallelError(
            "fsdp_version is 1, which flattens the parameters of several modules into one, so that the teacher cannot "
            "follow them: set fsdp_version: 2"
        )
    if plugin.activation_checkpointing:
        raise ParallelError(
            "fsdp_activation_checkpointing does not replay random numbers, so that the recomputed forward has other "
            "dropout than the first: use the run's gradient_checkpointing, which replays them"
        )
    if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy" or plugin.cpu_offload is True:
        raise ParallelError(
            "fsdp_offload_params keeps the student on the host, but its teacher is on the device: leave it out; "
            "gradient_checkpointing and gradient_cache_chunks save more memory"
        )
    if accelerator.parallelism_config is not None:
        raise ParallelError(
            "a parallelism_config was given: tensors, sequences or contexts split over processes are not gathered for "
            "contrastive losses or the teacher; leave it out and shard over all processes"
        )
    # it fails for buffers, such as batch norm's, and is not needed: all processes have the same weights already
    plugin.cpu_ram_efficient_loading = False
    plugin.mixed_precision_policy = None


def _take_deepspeed(accelerator: Accelerator, run: RunArguments) -> None:
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config

    # weights stay fp32
    for half in ("bf16", "fp16"):
        if config.get(half, {}).get("enabled") is True:
            raise ParallelError(
                f"the DeepSpeed configuration enables {half}, which casts the weights and so trains differently from "
                "one process: leave it out; the run's mixed_precision: bf16 computes in bf16 with fp32 weights"
            )

    # and on the device, without rounding
    zero = config.setdefault("zero_optimization", {})
    for part in ("optimizer", "param"):
        if (zero.get(f"offload_{part}") or {}).get("device", "none") not in ("none", None):
            raise ParallelError(
                f"offload_{part} moves the {part} to the host, where DeepSpeed uses its own AdamW and the teacher "
                "cannot follow: leave it out; gradient_cache_chunks saves more memory"
            )
    if lossy := [name for name, off in LOSSY.items() if zero.get(name, off) not in (None, off)]:
        raise ParallelError(f"{lossy} split or round parameters so that the teacher cannot follow: leave them out")
    if plugin.zero_stage == 3 and run.compile:
        raise ParallelError(
            "ZeRO-3 gathers weights in hooks of modules inside the compiled layers, which has not been shown to train "
            "correctly: leave compile out, or use ZeRO-2 or DDP"
        )
    # otherwise transformers would shard the weights before the teacher is copied from them
    unset_hf_deepspeed_config()
    config["train_micro_batch_size_per_gpu"] = run.batch_size // accelerator.num_processes
    # DeepSpeed clips by itself, at Accelerate's default of 1.0; 0 turns it off
    config["gradient_clipping"] = run.max_grad_norm or 0.0


def prepare(
    accelerator: Accelerator, model: PreTrainedModel, optimizer: torch.optim.Optimizer, objective: Objective
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """
    Returns the wrapped student that `objective` calls, and the optimiser for this process's part of its parameters.
    The objective moves to the device, and its teachers are sharded like the student.

    Raises:
        ValueError: weights are in half precision; a teacher cannot be sharded like the student.
    """
    if half := [name for name, one in model.named_parameters() if one.dtype in (torch.float16, torch.bfloat16)]:
        raise ValueError(
            f"{len(half)} weights are in half precision, {half[:3]}, in which small updates of student and teacher "
            "are lost; expected float32, with which mixed_precision computes in bf16"
        )

    # the engine wraps the student, then each teacher is sharded like it
    student, wrapped = accelerator.prepare(model, optimizer)
    objective.to(accelerator.device)
    engines = []
    for teacher in objective.teachers():
        release = None
        if accelerator.distributed_type == DistributedType.FSDP:
            fsdp_shard_alike(teacher.model, model)
            # torch 2.7 keeps the root's parameters gathered until the backward, which a frozen model never has
            release = teacher.model.reshard
        elif any(is_zero_3(parameter) for parameter in model.parameters()):
            engines.append(_spread_by_zero_3(teacher.model))
            # a parameter that a forward returns stays gathered, and the next forward would treat it as new
            release = engines[-1].optimizer.partition_all_parameters
        teacher.follow(model, release)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.deepspeed_engine_wrapped = GuardedEngine(student, engines)
    return student, wrapped


@contextlib.contextmanager
def exchanging_gradients(accelerator: Accelerator, student: nn.Module, now: bool) -> Iterator[None]:
    """Inside the block, a backward exchanges gradients between processes if `now`."""
    if now:
        yield
        return
    accelerator.sync_gradients = False  # DeepSpeed reads this, the others use no_sync
    try:
        with accelerator.no_sync(student):
            yield
    finally:
        accelerator.sync_gradients = True


def reach_all(accelerator: Accelerator, student: nn.Module) -> torch.Tensor | float:
    """
    A zero with zero gradient at each trained parameter, for DDP, which would otherwise wait for parameters that the
    last backward of a step does not use. The other engines exchange all accumulated gradients.
    """
    if accelerator.distributed_type not in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        return 0.0
    return 0.0 * sum(one.sum() for one in student.parameters() if one.requires_grad)


def forget_gradients(accelerator: Accelerator, student: nn.Module) -> None:
    """
    Clears ZeRO-3's gradients before a step with several backwards: it keeps those of the previous step, and the first
    backward overwrites only those that it reaches.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        student.optimizer.grad_partitions_flat_buffer.zero_()


def _spread_by_zero_3(frozen: nn.Module) -> nn.Module:
    import deepspeed

    # parameters below the threshold would be gathered once and never follow the moving average
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    return deepspeed.initialize(model=frozen, config=config)[0]


class GuardedEngine(DeepSpeedEngineWrapper):
    """Accelerate's, which steps in `backward`; ZeRO-3 too skips the step, and says so, where a gradient is not finite.

    ZeRO-1 and 2 look at the norm themselves whatever the precision, ZeRO-3 under fp16 only.

    Args:
        engine: DeepSpeed's engine of the student.
        kept: Engines of the teachers; if they were garbage-collected, their hooks would be removed.
    """

    def __init__(self, engine: nn.Module, kept: Sequence[nn.Module] = ()):
        super().__init__(engine)
        self.kept = list(kept)

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Backward and optimiser step; no step if `optimizer.overflow` is true afterwards."""
        optimizer = self.engine.optimizer
        if self.engine.zero_optimization_stage() != 3 or not sync_gradients:
            super().backward(loss, sync_gradients=sync_gradients, **kwargs)
            return
        self.engine.set_gradient_accumulation_boundary(is_boundary=True)
        self.engine.backward(loss, **kwargs)
        optimizer.check_overflow()
        if optimizer.overflow:
            drop_overflown_step(self.engine)
            return
        self.engine.step()


class WholeModel:
    """
    The whole student, which one process can run, save and export: itself, or if its parameters are sharded, a copy on
    the first process that is filled at each entry.

    Args:
        accelerator (`Accelerator`): From `make_accelerator`.
        model (`PreTrainedModel`): The student before `prepare`.
    """

    def __init__(self, accelerator: Accelerator, model: PreTrainedModel):
        self.accelerator = accelerator
        self.model = model
        plugin = accelerator.state.deepspeed_plugin
        stage_3 = plugin is not None and plugin.zero_stage == 3
        self.spread = stage_3 or accelerator.distributed_type == DistributedType.FSDP
        self.copy = copy.deepcopy(model) if self.spread and accelerator.is_main_process else None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[PreTrainedModel]:
        """
        Collective. The first process gets the whole model, on the device inside the block and on the CPU afterwards.
        The other processes get the sharded student, which they cannot run alone.
        """
        # all processes take part in gathering, but only the first fills a copy
        state = full_state(self.model) if self.spread else {}
        if self.copy is None:
            yield self.model
            return
        self.copy.load_state_dict(state)
        yield self.copy.to(self.accelerator.device)
        self.copy.to("cpu")
