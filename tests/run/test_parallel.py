"""What `make_accelerator` refuses, before a model is built; what it hands on; and the teacher's guard."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny_oner import tiny_config
from tiny_pretraining import forget_accelerator

from oner import OneRForPreTraining
from oner.training.objectives.oner import OneRObjective, OneRObjectiveArguments
from oner.training.objectives.teacher import EMATeacher
from oner.training.parallel import distributed
from oner.training.parallel.sharding import (
    full_optimizer_state,
    full_state,
    load_full_optimizer_state,
    load_full_state,
)
from oner.training.run import launch as parallel
from oner.training.run.arguments import SIZES, Launch, RunArguments, read_launch
from oner.training.run.launch import ParallelError, WholeModel, make_accelerator, prepare


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*SIZES, "LOCAL_RANK", *(f"ACCELERATE_USE_{what}" for what in ("CPU", "FSDP", "DEEPSPEED"))):
        monkeypatch.delenv(name, raising=False)
    forget_accelerator()
    before = dict(os.environ)
    yield
    # what Accelerate wrote of a launcher would reach every later test
    os.environ.clear()
    os.environ.update(before)
    forget_accelerator()


def run_of(tmp_path, **fields) -> RunArguments:
    return RunArguments(**{"output_dir": str(tmp_path), "mixed_precision": "no", "batch_size": 8, **fields})


def fake_fsdp(**plugin):
    fields = {"fsdp_version": 2, "activation_checkpointing": False, "cpu_offload": False, **plugin}
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**fields))
    kept = {"device": torch.device("cpu"), "parallelism_config": None}
    return SimpleNamespace(distributed_type=DistributedType.FSDP, state=state, **kept)


def fake_deepspeed(stage: int = 2, **config):
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config)
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), num_processes=2)


# Launches


@pytest.mark.parametrize(
    ("environment", "precision", "message"),
    [
        ({"USE_FSDP": "true"}, "no", "FSDP was requested, but this is a single process .* start it with `accelerate"),
        ({"USE_DEEPSPEED": "true"}, "no", "DeepSpeed was requested, but this is a single process"),
        ({"USE_DEEPSPEED": "true", "USE_CPU": "true"}, "no", "together with the CPU .* leave out one of the two"),
        ({"USE_FSDP": "true"}, "fp16", "FSDP with mixed_precision fp16 .* use bf16 or no"),
        ({"USE_DEEPSPEED": "true"}, "fp16", "DeepSpeed with mixed_precision fp16 .* use bf16 or no"),
        ({"USE_MEGATRON_LM": "true"}, "no", "Megatron-LM supports only its own models.* use DDP, FSDP2 or DeepSpeed"),
    ],
)
def test_launches_that_would_train_another_run_are_refused(tmp_path, monkeypatch, environment, precision, message):
    for name, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    if "single process" not in message:
        monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ParallelError, match=message):
        make_accelerator(run_of(tmp_path, mixed_precision=precision))


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_nobody_joins_are_refused(tmp_path, monkeypatch, name):
    """As of a launcher that Accelerate does not know: each would train the run on a share of each batch."""
    monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    # older releases of Accelerate refuse it themselves
    message = (
        "'started': 2, \"Accelerate's\": 1, \"torch's\": 1.: they would not communicate|`MASTER_ADDR` env was not set"
    )
    with pytest.raises(ValueError, match=message):
        make_accelerator(run_of(tmp_path))


def test_the_launch_is_read_when_asked(monkeypatch):
    assert read_launch() == Launch(False, False, False, False, False, processes=1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "True")
    launch = read_launch()
    assert launch.ranked and launch.fsdp and not (launch.deepspeed or launch.cpu or launch.megatron)


@pytest.mark.parametrize(
    ("name", "engine", "stage"),
    [
        ("ddp_8", "multi_gpu", None),
        ("fsdp2_8", "use_fsdp", None),
        ("deepspeed_zero2_a100", "use_deepspeed", 2),
        ("deepspeed_zero3_8", "use_deepspeed", 3),
    ],
)
def test_shipped_configurations_launch_what_their_names_say(root, name, engine, stage):
    path = root / "examples" / "configs" / "accelerate" / f"{name}.yaml"
    given = launch_command_parser().parse_args(["--config_file", str(path), "pretrain.py"])
    given, *_ = _validate_launch_command(given)
    asked = [kind for kind in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(given, kind)]
    assert asked == [engine] and given.mixed_precision == "no"
    if engine == "use_fsdp":
        environment = prepare_multi_gpu_env(given)
        assert (environment["ACCELERATE_USE_FSDP"], environment["FSDP_VERSION"]) == ("true", "2")
        assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    if stage is not None:
        assert (int(given.zero_stage), given.gradient_accumulation_steps) == (stage, 1)


# FSDP


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ({"fsdp_version": 1}, "set fsdp_version: 2"),
        ({"activation_checkpointing": True}, "use the run's gradient_checkpointing"),
        ({"cpu_offload": True}, "fsdp_offload_params keeps the student on the host.*gradient_cache_chunks"),
    ],
)
def test_fsdp_options_that_the_teacher_cannot_follow_are_refused(plugin, message):
    with pytest.raises(ParallelError, match=message):
        parallel._take_fsdp(fake_fsdp(**plugin))


def test_the_real_plugin_is_refused_and_taken_by_the_same_names(monkeypatch):
    """A field that Accelerate renames would make the checks above look at nothing."""
    accelerator = fake_fsdp()
    accelerator.state.fsdp_plugin = plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    assert hasattr(plugin, "cpu_ram_efficient_loading") and hasattr(plugin, "mixed_precision_policy")
    plugin.cpu_ram_efficient_loading = True  # given to its constructor it looks for an accelerator
    parallel._take_fsdp(accelerator)
    assert plugin.cpu_ram_efficient_loading is False and plugin.mixed_precision_policy is None
    for options, message in (
        ({"fsdp_version": 1}, "fsdp_version is 1"),
        ({"fsdp_version": 2, "cpu_offload": True}, "fsdp_offload_params"),
        ({"fsdp_version": 2, "activation_checkpointing": True}, "gradient_checkpointing"),
    ):
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**options)
        with pytest.raises(ParallelError, match=message):
            parallel._take_fsdp(accelerator)


def test_fsdp_that_accelerate_would_leave_out_is_refused():
    accelerator = fake_fsdp()
    accelerator.distributed_type = DistributedType.NO
    with pytest.raises(ParallelError, match="Accelerate chose NO: nothing would be sharded"):
        parallel._take_fsdp(accelerator)


def test_fsdp_over_a_backend_that_sums_is_refused(monkeypatch):
    """Adam hides a gradient that is twice too large, so no loss would tell."""

    def add(output, rows, op):
        output.copy_(rows.sum(0, keepdim=True))

    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "reduce_scatter_tensor", add)
    with pytest.raises(ParallelError, match=r"on cpu torch .* sums them: use DDP, a later torch, or a GPU"):
        parallel._take_fsdp(fake_fsdp())
    monkeypatch.setattr(distributed.dist, "reduce_scatter_tensor", lambda one, rows, op: one.copy_(rows[:1]))
    parallel._take_fsdp(fake_fsdp())


def test_tensor_parallelism_is_refused():
    accelerator = fake_fsdp()
    accelerator.parallelism_config = object()
    with pytest.raises(ParallelError, match="a parallelism_config was given.* shard over all processes"):
        parallel._take_fsdp(accelerator)


# DeepSpeed


@pytest.mark.parametrize(
    ("stage", "config", "run", "message"),
    [
        (2, {"bf16": {"enabled": True}}, {}, "enables bf16, which casts the weights.* mixed_precision: bf16"),
        (2, {"fp16": {"enabled": True}}, {}, "enables fp16, which casts the weights"),
        (2, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, {}, "offload_optimizer moves"),
        (3, {"zero_optimization": {"offload_param": {"device": "nvme"}}}, {}, "offload_param moves"),
        (3, {"zero_optimization": {"zero_quantized_weights": True}}, {}, "zero_quantized_weights.* leave them out"),
        (3, {"zero_optimization": {"zero_hpz_partition_size": 8}}, {}, "zero_hpz_partition_size"),
        (3, {}, {"compile": True}, "ZeRO-3 gathers weights in hooks .* or use ZeRO-2 or DDP"),
    ],
)
def test_deepspeed_options_that_train_another_run_are_refused(tmp_path, stage, config, run, message):
    with pytest.raises(ParallelError, match=message):
        parallel._take_deepspeed(fake_deepspeed(stage, **config), run_of(tmp_path, **run))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_gets_its_share_of_the_batch_and_clips_as_the_run_says(tmp_path, stage):
    none = {"device": "none", "nvme_path": None}
    accelerator = fake_deepspeed(
        stage,
        bf16={"enabled": False},
        zero_optimization={"offload_optimizer": none, "zero_hpz_partition_size": 1},
    )
    parallel._take_deepspeed(accelerator, run_of(tmp_path))
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_clipping"] == 0.0  # never; absent, it would be Accelerate's 1.0
    parallel._take_deepspeed(accelerator, run_of(tmp_path, max_grad_norm=0.7))
    assert config["gradient_clipping"] == 0.7


# One process


def tiny(**options) -> OneRForPreTraining:
    torch.manual_seed(0)
    return OneRForPreTraining(tiny_config(head_norm="layer", **options))


def test_a_plain_model_is_its_own_whole(tmp_path):
    model = tiny()
    whole = WholeModel(make_accelerator(run_of(tmp_path)), model)
    with whole() as found:
        assert found is model
    assert whole.copy is None


def test_states_go_out_and_in(tmp_path):
    model, other = tiny(), tiny()
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.1) for one in (model, other)]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers[0].step()
    load_full_state(other, full_state(model))
    tensors, groups = full_optimizer_state(optimizers[0])
    tensors = {name: value.clone() for name, value in tensors.items()}  # as a file would have them
    load_full_optimizer_state(optimizers[1], tensors, groups)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        two.grad = one.grad
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_states_that_do_not_fit_are_named_and_leave_everything_as_it_is():
    model = tiny()
    before, state = full_state(model), full_state(tiny())
    before = {name: value.clone() for name, value in before.items()}
    state["stranger"] = state.pop("oner.norm.weight")
    state["oner.norm.bias"] = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"norm.bias.*\(3,\), expected \(32,\).*norm.weight.*missing.*stranger"):
        load_full_state(model, {name: value + 1 for name, value in state.items()})
    assert all(torch.equal(value, before[name]) for name, value in full_state(model).items())
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters, expected \[\d+\]"):
        load_full_optimizer_state(optimizer, {}, [{"params": [0]}])
    _, groups = full_optimizer_state(optimizer)
    with pytest.raises(ValueError, match=r"0.exp_avg has shape \(7, 7\), expected"):
        load_full_optimizer_state(optimizer, {"0.exp_avg": torch.ones(7, 7)}, groups)


# The teacher


def test_a_teacher_whose_student_was_replaced_says_so_instead_of_standing_still():
    student = tiny()
    teacher = EMATeacher(student, 0.5)
    # as FSDP2 does with every parameter
    path, _, leaf = teacher._names[-1].rpartition(".")
    old = student.get_parameter(teacher._names[-1])
    setattr(student.get_submodule(path), leaf, torch.nn.Parameter(old.detach() + 1))
    with pytest.raises(RuntimeError, match="an engine replaced it.*`teachers\\(\\)`"):
        teacher.update()
    teacher.follow(student)
    teacher.update()
    torch.testing.assert_close(teacher.model.get_parameter(teacher._names[-1]), old.detach() + 0.5)


def test_a_teacher_of_another_part_is_refused():
    with pytest.raises(ValueError, match=r"holds \(1, 1, 32\) here and the student's \(1, 1, 64\); expected the same"):
        EMATeacher(tiny()).follow(tiny(hidden_size=64))


def test_weights_in_half_precision_are_refused(tmp_path):
    student = tiny().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(student.parameters())
    objective = OneRObjective(student, OneRObjectiveArguments(losses=["itc"]))
    with pytest.raises(ValueError, match=r"\d+ weights are in half precision, .*; expected float32, with which"):
        prepare(make_accelerator(run_of(tmp_path)), student, optimizer, objective)


def test_oner_names_its_teacher():
    student = tiny()
    objective = OneRObjective(student, OneRObjectiveArguments(losses=["itc"]))
    assert [*objective.teachers()] == [objective.teacher]
    assert not [*OneRObjective(student, OneRObjectiveArguments(losses=["itc"], teacher=False)).teachers()]
