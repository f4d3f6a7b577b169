"""What only an accelerator can show: half precision, its attention kernels, compiled layers, exact resume, NCCL.

Run by `pytest -m gpu`, and as the first part of examples/gpu_check.py.
"""

import os
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, PRETRAINING, Family
from tiny_pretraining import (
    EVERY_STEP,
    ROOT,
    assert_same_checkpoint,
    forget_accelerator,
    read_log,
    tiny_arguments,
)

from oner.training.run.optimization import compile_regions

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
LENGTHS = [3, 12, 1, 7, 5, 6, 2, 9]
DEVICE = "cuda"


def one_step(family: Family, half: torch.dtype | None = None, compiled: bool = False, **fields) -> tuple:
    """Loss, parts and gradients of a first step of a tiny model. The same weights and batch for any arguments."""
    torch.manual_seed(0)
    model = family.build(PRETRAINING, **{"hidden_size": 64, **fields}).train().to(DEVICE)
    objective = family.objective(model)
    objective.to(torch.device(DEVICE))
    if compiled:
        compile_regions([model, *(teacher.model for teacher in objective.teachers())])
    batch = {name: value.to(DEVICE) for name, value in family.tiny.make_batch(LENGTHS).items()}
    with torch.autocast(DEVICE, half or torch.bfloat16, enabled=half is not None):
        loss, parts, _ = objective(model, batch, 0.5)
    loss.backward()
    gradients = {name: one.grad.float().cpu() for name, one in model.named_parameters() if one.grad is not None}
    return float(loss.detach()), {name: float(part) for name, part in parts.items()}, gradients


def relative(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of the second."""
    assert one.keys() == other.keys()
    difference = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (difference / sum(float(value.square().sum()) for value in other.values())) ** 0.5


# errors of the gradient are three times what they are on a CPU, at most
@pytest.mark.parametrize(("half", "error"), [(torch.bfloat16, 0.15), (torch.float16, 0.01)], ids=["bf16", "fp16"])
def test_a_step_in_half_precision_is_that_of_fp32(family, half, error):
    """Without batch norm: over eight rows it makes of a bf16 rounding half of the gradient, on a CPU as well."""
    expected, parts, gradients = one_step(family, **family.tiny.APART)
    loss, parts_in_half, gradients_in_half = one_step(family, half, **family.tiny.APART)
    assert loss == pytest.approx(expected, rel=0.005)
    assert parts_in_half == pytest.approx(parts, rel=0.01)
    assert relative(gradients_in_half, gradients) < error


# flex_attention compiles a kernel for each shape: minutes
@pytest.mark.parametrize("attention", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_every_attention_computes_the_same(family, attention):
    if attention == "flex_attention" and not family.classes[PRETRAINING]._supports_flex_attn:
        pytest.skip(f"{family.name} does not say that it works with flex_attention")
    expected, parts, gradients = one_step(family, attn_implementation="sdpa")
    loss, other_parts, other_gradients = one_step(family, attn_implementation=attention)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert other_parts == pytest.approx(parts, rel=1e-3)
    assert relative(other_gradients, gradients) < 5e-3


def test_compiled_layers_compute_the_same():
    expected, _, gradients = one_step(FAMILIES["oner"])
    loss, _, compiled_gradients = one_step(FAMILIES["oner"], compiled=True)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert relative(compiled_gradients, gradients) < 5e-3


@pytest.fixture
def deterministic(monkeypatch, fresh_accelerator):
    """Where torch has a deterministic kernel it is taken: flash attention's own backward adds in any order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_run_is_the_same_to_the_bit(example, pairs, tmp_path, deterministic, precision):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    example.main(tiny_arguments(pairs, whole, mixed_precision=precision, **EVERY_STEP))
    forget_accelerator()
    stopped.mkdir()
    (whole / "checkpoint-00000004").rename(stopped / "checkpoint-00000004")
    example.main([*tiny_arguments(pairs, stopped, mixed_precision=precision, **EVERY_STEP), "--resume"])
    assert_same_checkpoint(whole / "checkpoint-00000010", stopped / "checkpoint-00000010")


def test_one_process_under_nccl_trains_as_one_without(example, pairs, tmp_path, fresh_accelerator):
    example.main(tiny_arguments(pairs, tmp_path / "plain"))
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    command = [sys.executable, "examples/pretrain.py", *tiny_arguments(pairs, tmp_path / "ddp")]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, **launcher, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plain, ddp = (read_log(tmp_path / name) for name in ("plain", "ddp"))
    losses = [[line["loss"] for line in log if "loss" in line] for log in (plain, ddp)]
    assert len(losses[0]) == 10 and losses[0] == pytest.approx(losses[1], rel=1e-3)
