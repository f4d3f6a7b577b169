"""How processes share a run: precision, and the engines that Accelerate was launched with (DDP, FSDP2, DeepSpeed).

Every engine trains the same run: fp32 weights under torch's autocast, a teacher spread as the student is. What an
engine cannot do so is refused here, before anything is read or built.
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

# options of ZeRO that the teacher cannot follow, and what they are when off
LOSSY = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "mics_shard_size": -1,
}


class ParallelError(ValueError):
    """An engine was asked for that would train another run than one process does; the message has the alternative."""


def make_accelerator(run: RunArguments) -> Accelerator:
    """
    Accelerate as the command line launched it, with this run's precision and trackers.

    Raises:
        ValueError: a tracker that is not there.
        ParallelError: what would train another run than one process does, such as plain gradient accumulation.
    """
    installed = {tracker.value for tracker in get_available_trackers()}
    if absent := [name for name in run.report_to if name not in {*installed, "all"}]:
        # Accelerate would only warn, and the numbers be lost
        raise ValueError(f"report_to names {absent}, which is not installed; there are {sorted(installed)}")

    # engine and precision; what cannot go together is refused here
    launch = read_launch()
    precision = choose_precision(run.mixed_precision)
    _check_launch(launch, precision)
    sharded = launch.fsdp or launch.deepspeed
    options: dict[str, Any] = {}
    if launch.deepspeed and launch.ranked and not torch.accelerator.is_available():
        # else Accelerate counts one process under DeepSpeed on CPUs, however many there are
        options["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
    elif launch.processes > 1 and not torch.accelerator.is_available():
        # else Accelerate counts one process where no accelerator is seen, and each would train the whole run alone
        options["cpu"] = True
    accelerator = Accelerator(
        # both would cast the weights, and drop what an update changes below a half's precision
        mixed_precision="no" if sharded else precision,
        log_with=run.report_to or None,
        project_dir=run.output_dir,
        step_scheduler_with_optimizer=False,
        **options,
    )

    # all processes that were started are in it: else each would train a run of its own on a share of each batch
    counts = {"started": launch.processes, "Accelerate's": accelerator.num_processes, "torch's": world_size()}
    if len(set(counts.values())) > 1:
        raise ParallelError(
            f"the launcher, Accelerate and torch.distributed count different processes, {counts}: nothing would be "
            f"exchanged between them; start the run by `accelerate launch` or torchrun, on devices that are visible"
        )

    # what the configuration of `accelerate launch` may hold besides
    if accelerator.gradient_accumulation_steps != 1:
        raise ParallelError(
            f"gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}: accumulating a contrastive "
            f"loss leaves only a micro-batch's negatives, which is another loss; gradient_cache_chunks passes the "
            f"batch in chunks and keeps all its negatives, or lower batch_size, or add processes"
        )
    if launch.fsdp:
        _take_fsdp(accelerator)
    if launch.deepspeed:
        _take_deepspeed(accelerator, run)
    if sharded and precision == "bf16":
        accelerator.autocast = lambda *_: torch.autocast(accelerator.device.type, dtype=torch.bfloat16)
    return accelerator


# trackers that give a run a name of its own, and what they call it
NAMES_OF_RUNS = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "swanlab": "experiment_name",
}


def tracker_options(arguments: Arguments) -> dict[str, Any]:
    """What `Accelerator.init_trackers` takes: project, names, and the configuration flat, as they compare it."""
    flat = {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in plain(arguments.to_dict()).items()
    }
    name = arguments.run.run_name
    names = {} if name is None else {tracker: {called: name} for tracker, called in NAMES_OF_RUNS.items()}
    return {"project_name": arguments.run.tracker_project, "config": flat, "init_kwargs": names}


def engine_of(accelerator: Accelerator) -> str:
    """How the processes of a run share it, in a word or two."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return "FSDP2"
    return "one process" if kind == DistributedType.NO else f"DDP over {backend()}"


def choose_precision(asked: str) -> str:
    """`auto` is bf16 on accelerators that have it and on CPUs that multiply it (AMX, AVX-512, Arm), else no."""
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    # without such instructions bf16 on a CPU is slower than fp32
    return "bf16" if has_fast_bf16() else "no"


def _check_launch(launch: Launch, precision: str) -> None:
    # each engine with what it cannot train as one process does
    engine = "FSDP" if launch.fsdp else "DeepSpeed"
    if (launch.fsdp or launch.deepspeed) and precision == "fp16":
        raise ParallelError(
            f"{engine} with mixed_precision fp16 would keep its weights in half precision, which the teacher cannot "
            f"follow: use bf16 or no, or plain data parallelism, which scales an fp16 loss over fp32 weights"
        )
    if launch.megatron:
        raise ParallelError("Megatron-LM takes its own models apart, not these: use DDP, FSDP2 or DeepSpeed")
    if (launch.fsdp or launch.deepspeed) and not launch.ranked:
        raise ParallelError(
            f"{engine} was asked for, but this is a single process that no launcher numbered, which Accelerate would "
            f"train without it: start it by `accelerate launch` or torchrun, or leave {engine} out"
        )
    if launch.deepspeed and launch.cpu:
        raise ParallelError(
            "DeepSpeed was asked for together with the CPU (use_cpu, --cpu), for which Accelerate would quietly take "
            "plain data parallelism: leave out one of the two; DeepSpeed finds the CPU by itself"
        )


def _take_fsdp(accelerator: Accelerator) -> None:
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate gives FSDP to accelerators only, and would quietly train without it on CPUs
        accelerator.state.distributed_type = DistributedType.FSDP
        set_distributed_type(DistributedType.FSDP)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.distributed_type != DistributedType.FSDP:
        raise ParallelError(
            f"FSDP was asked for and Accelerate took {accelerator.distributed_type.value}: nothing would be sharded; "
            f"leave FSDP out, or start it on devices that it knows"
        )

    if not reduce_scatter_averages(accelerator.device):
        raise ParallelError(
            f"FSDP2 needs gradients that are averaged, and on {accelerator.device} torch {torch.__version__} sums "
            f"them: use DDP, a later torch, or a GPU"
        )

    # options that leave the teacher nothing to follow
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ParallelError(
            "fsdp_version is 1, which flattens parameters of several modules into one, so that the teacher has no "
            "parameters to follow: set fsdp_version: 2"
        )
    if plugin.activation_checkpointing:
        raise ParallelError(
            "fsdp_activation_checkpointing does not replay random numbers, so that the second forward drops other "
            "units than the first: use gradient_checkpointing of the run, which does"
        )
    if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy" or plugin.cpu_offload is True:
        raise ParallelError(
            "fsdp_offload_params keeps the student on the host, where its teacher is not: leave it out; "
            "gradient_checkpointing and gradient_cache_chunks save more memory"
        )
    if accelerator.parallelism_config is not None:
        raise ParallelError(
            "a parallelism_config was given: tensors, sequences or contexts split over processes are not gathered "
            "for contrast or teacher; leave it out and shard over all processes"
        )
    # that way stops at buffers, such as batch norm's, and is not needed: every process has the same weights already
    plugin.cpu_ram_efficient_loading = False
    plugin.mixed_precision_policy = None


def _take_deepspeed(accelerator: Accelerator, run: RunArguments) -> None:
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config

    # weights stay fp32
    for half in ("bf16", "fp16"):
        if config.get(half, {}).get("enabled") is True:
            raise ParallelError(
                f"the DeepSpeed configuration enables {half}, which casts the weights, so that one process trains "
                f"another run: leave it out; the run's mixed_precision: bf16 computes in bf16 over fp32 weights"
            )

    # and on the device, unrounded
    zero = config.setdefault("zero_optimization", {})
    for part in ("optimizer", "param"):
        if (zero.get(f"offload_{part}") or {}).get("device", "none") not in ("none", None):
            raise ParallelError(
                f"offload_{part} moves the {part} to the host, where DeepSpeed steps with an AdamW of its own and "
                f"the teacher finds nothing to follow: leave it out; gradient_cache_chunks saves more memory"
            )
    if lossy := [name for name, off in LOSSY.items() if zero.get(name, off) not in (None, off)]:
        raise ParallelError(f"{lossy} cut or round parameters in a way that the teacher cannot follow: leave them out")
    if plugin.zero_stage == 3 and run.compile:
        raise ParallelError(
            "ZeRO-3 gathers weights in hooks of modules inside the compiled layers, never shown to train the "
            "same run: leave compile out, or use ZeRO-2 or DDP"
        )
    # else transformers would build the weights in parts, before the teacher is copied from them
    unset_hf_deepspeed_config()
    config["train_micro_batch_size_per_gpu"] = run.batch_size // accelerator.num_processes
    # DeepSpeed clips by itself, at Accelerate's 1.0 unless told; 0 is never
    config["gradient_clipping"] = run.max_grad_norm or 0.0


def prepare(
    accelerator: Accelerator, model: PreTrainedModel, optimizer: torch.optim.Optimizer, objective: Objective
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """
    The student as `objective` calls it, and the optimiser over what this process holds of its parameters. The
    objective moves to the device and its teachers are spread as the student is.

    Raises:
        ValueError: weights in half precision; a teacher that could not be spread alike.
    """
    if half := [name for name, one in model.named_parameters() if one.dtype in (torch.float16, torch.bfloat16)]:
        raise ValueError(
            f"{len(half)} weights are in half precision, {half[:3]}, where small updates and the teacher's are lost; "
            f"expected float32, over which mixed_precision computes in bf16"
        )

    # the engine wraps the student, then each teacher is spread as the student now is
    student, wrapped = accelerator.prepare(model, optimizer)
    objective.to(accelerator.device)
    engines = []
    for teacher in objective.teachers():
        release = None
        if accelerator.distributed_type == DistributedType.FSDP:
            fsdp_shard_alike(teacher.model, model)
            # torch 2.7 keeps the root's parameters gathered until a backward, which a frozen model never has
            release = teacher.model.reshard
        elif any(is_zero_3(parameter) for parameter in model.parameters()):
            engines.append(_spread_by_zero_3(teacher.model))
            # a parameter that a forward returns stays gathered, and the next forward would take it for new
            release = engines[-1].optimizer.partition_all_parameters
        teacher.follow(model, release)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.deepspeed_engine_wrapped = GuardedEngine(student, engines)
    return student, wrapped


@contextlib.contextmanager
def exchanging_gradients(accelerator: Accelerator, student: nn.Module, now: bool) -> Iterator[None]:
    """Whether a backward inside ends with the exchange of gradients between processes."""
    if now:
        yield
        return
    accelerator.sync_gradients = False  # DeepSpeed goes by this, the others by no_sync
    try:
        with accelerator.no_sync(student):
            yield
    finally:
        accelerator.sync_gradients = True


def reach_all(accelerator: Accelerator, student: nn.Module) -> torch.Tensor | float:
    """
    Zero, with a gradient of zero at each trained parameter, where DDP would else wait for those that the last backward
    of a step does not reach. The other engines exchange whatever was reached before.
    """
    if accelerator.distributed_type not in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        return 0.0
    return 0.0 * sum(one.sum() for one in student.parameters() if one.requires_grad)


def forget_gradients(accelerator: Accelerator, student: nn.Module) -> None:
    """
    Before a step of several backwards: ZeRO-3 keeps the gradients of the step before, and the first backward writes
    over those alone that it reaches.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        student.optimizer.grad_partitions_flat_buffer.zero_()


def _spread_by_zero_3(frozen: nn.Module) -> nn.Module:
    import deepspeed

    # parameters below the threshold would be gathered once and stay as they were then, whatever the average does
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    return deepspeed.initialize(model=frozen, config=config)[0]


class GuardedEngine(DeepSpeedEngineWrapper):
    """Accelerate's, which steps in `backward`; ZeRO-3 too skips the step, and says so, where a gradient is not finite.

    ZeRO-1 and 2 look at the norm themselves whatever the precision, ZeRO-3 under fp16 only.

    Args:
        engine: DeepSpeed's, of the student.
        kept: Engines of the teachers, which would take their hooks away when nobody holds them.
    """

    def __init__(self, engine: nn.Module, kept: Sequence[nn.Module] = ()):
        super().__init__(engine)
        self.kept = list(kept)

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """One step of the optimiser, or none where `optimizer.overflow` is true afterwards."""
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
    The student as one process can run, keep and export it: itself, or where its parameters are spread over processes a
    copy on the first one, filled at each entry.

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
        Collective. On the device inside the block, to be run by the first process only; on the CPU afterwards. The
        other processes get the spread student, which they cannot run alone.
        """
        # every process takes part in gathering, though only the first has a copy to fill
        state = full_state(self.model) if self.spread else {}
        if self.copy is None:
            yield self.model
            return
        self.copy.load_state_dict(state)
        yield self.copy.to(self.accelerator.device)
        self.copy.to("cpu")
