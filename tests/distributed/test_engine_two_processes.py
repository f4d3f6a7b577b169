"""Two gloo processes against one, and DeepSpeed on the CPU.

With two processes each normalises its own half of a batch in a BatchNorm (on a CPU nothing synchronises it), so the
runs compared have none: LayerNorm heads and a linear stem. The masked-word loss is left out of them too: its mean is
over the masked words of a process, and halves of a batch hold different numbers of them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_pretraining import (
    ROOT,
    forget_accelerator,
    load_example,
    read_log,
    tiny_arguments,
)

from oner.training.run.checkpoint import list_checkpoints, load_checkpoint, verify
from oner.training.run.engine import Engine

OPTIONS = {
    "losses": ["itc", "cmc", "mim"],
    "one_row_per_id": True,
    "match_ids": True,
    "save_every_epochs": 0.6,
    "keep_checkpoints": 20,
    "model_config": {"head_norm": "layer", "stem": "linear"},
}
KEY_BIAS = "oner.layers.0.attention.qkv.bias"

# every process writes the rows of each of its batches, then runs the example
SPY = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tiny_pretraining import load_example
from oner.training.run.engine import Engine
step = Engine._train_step
def spy(self, batch):
    with open(Path({output!r}) / f"rows-{{os.environ['RANK']}}.jsonl", "a") as file:
        file.write(json.dumps(batch["pairs"]["rows"].tolist()) + "\\n")
    return step(self, batch)
Engine._train_step = spy
if __name__ == "__main__":
    load_example("pretrain").main(sys.argv[1:])
"""


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(pairs, tmp_path_factory) -> Path:
    """By torchrun, where no GPU is seen and nobody says that the CPU is meant: Accelerate by itself counts one."""
    directory = tmp_path_factory.mktemp("two")
    script = directory / "spied_pretrain.py"
    script.write_text(SPY.format(tests=str(ROOT / "tests"), output=str(directory)))
    result = run(
        ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
         *tiny_arguments(pairs, directory, **OPTIONS)],
        CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "on 2 x cpu by DDP over gloo" in result.stdout
    return directory


@pytest.fixture(scope="module")
def one(pairs, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("one")
    pretrain_here(tiny_arguments(pairs, directory, **OPTIONS), directory)
    return directory


def pretrain_here(arguments: list[str], directory: Path) -> None:
    """In this process, with the rows of each batch in rows.jsonl."""
    step = Engine._train_step

    def spy(self, batch):
        with open(directory / "rows.jsonl", "a") as file:
            file.write(json.dumps(batch["pairs"]["rows"].tolist()) + "\n")
        return step(self, batch)

    forget_accelerator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_train_step", spy)
        load_example("pretrain").main(arguments)
    forget_accelerator()


def read_rows(path: Path) -> list[list[int]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_close_weights(one: Path, other: Path) -> None:
    """Within 5e-5, student and teacher, but for the bias of the keys: softmax does not feel it, so its gradient is
    rounding noise around zero, which Adam divides by its own size."""
    for stem in ("model", "objective"):
        a, b = (dict(load_checkpoint(list_checkpoints(path)[-1])[0][stem]) for path in (one, other))
        for weights in (a, b):
            name = KEY_BIAS if stem == "model" else f"teacher.{KEY_BIAS}"
            query, _, value = weights[name].chunk(3)
            weights[name] = torch.cat([query, value])
        for name in a:
            torch.testing.assert_close(
                a[name], b[name], rtol=0, atol=5e-5, msg=lambda text, name=name: f"{name} {text}"
            )


def assert_close_logs(one: list[dict], other: list[dict]) -> None:
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)


def test_two_processes_read_the_rows_of_one_in_its_order(one, two):
    halves = zip(read_rows(two / "rows-0.jsonl"), read_rows(two / "rows-1.jsonl"), strict=True)
    together = [first + second for first, second in halves]
    assert together == read_rows(one / "rows.jsonl")
    assert len(together) == 10 and {len(set(rows)) for rows in together} == {8}


def test_two_processes_end_with_the_weights_and_the_log_of_one(one, two):
    assert_close_weights(one, two)
    assert_close_logs(read_log(one), read_log(two))
    # which says something: the weights moved by a hundred times that
    early, late = (load_checkpoint(list_checkpoints(one)[place])[0]["model"] for place in (0, -1))
    assert max((early[name] - late[name]).abs().max().item() for name in early) > 1e-3
    verify(list_checkpoints(two)[-1])
    assert (two / "model" / "model.safetensors").is_file()


def test_a_checkpoint_of_two_processes_resumes_on_one(one, two, pairs, tmp_path):
    name = "checkpoint-00000003"
    shutil.copytree(two / name, tmp_path / name)
    pretrain_here(tiny_arguments(pairs, tmp_path, resume="auto", **OPTIONS), tmp_path)
    assert read_rows(tmp_path / "rows.jsonl") == read_rows(one / "rows.jsonl")[3:]
    assert_close_weights(one, tmp_path)
    assert_close_logs(read_log(one)[3:], read_log(tmp_path))


# DeepSpeed as `accelerate launch` starts it, which finds the CPU by itself where there is no GPU. Two processes of it,
# without that launcher, are in test_engines_two_processes.py.


def deepspeed(arguments: list[str], *options: str) -> subprocess.CompletedProcess:
    pytest.importorskip("deepspeed")
    if torch.cuda.is_available():
        pytest.skip("DeepSpeed takes the GPU; these are its checks on a CPU")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("DeepSpeed builds its communication for CPUs when it starts, and here is no C++ compiler")
    script = str(ROOT / "examples" / "pretrain.py")
    command = ["accelerate.commands.launch", "--num_machines", "1", "--main_process_port", "29671", *options]
    return run([*command, script, *arguments])


ZERO = ("--use_deepspeed", "--gradient_accumulation_steps", "1", "--mixed_precision", "no", "--dynamo_backend", "no")


@pytest.mark.slow
def test_zero_2_on_one_process_gives_the_run_without_it(one, pairs, tmp_path):
    arguments = tiny_arguments(pairs, tmp_path, **OPTIONS)
    result = deepspeed(arguments, *ZERO, "--zero_stage", "2", "--num_processes", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert_close_weights(one, tmp_path)
    assert_close_logs(read_log(one), read_log(tmp_path))


@pytest.mark.slow
def test_the_shipped_zero_2_configuration_in_its_own_precision(pairs, tmp_path):
    config = ROOT / "examples" / "configs" / "accelerate" / "deepspeed_zero2_a100.yaml"
    arguments = tiny_arguments(pairs, tmp_path, **{**OPTIONS, "mixed_precision": "bf16"})
    result = deepspeed(arguments, "--config_file", str(config), "--num_processes", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "on 1 x cpu by one process, precision bf16" in result.stdout
    assert len(read_log(tmp_path)) == 10
    tensors = load_checkpoint(list_checkpoints(tmp_path)[-1])[0]
    assert {value.dtype for value in tensors["objective"].values()} == {torch.float32}
    assert all(value.isfinite().all() for value in tensors["model"].values())
