"""A checkpoint of N processes on M: to the bit where N is M, else the same losses as far as fp32 can tell."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_runs import main
from tiny_pretraining import ROOT, assert_same_checkpoint, forget_accelerator, read_log, tiny_arguments, write_pairs

from oner.training.run.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow
# twelve rows, which one, two and three processes share evenly; no batch norm, whose statistics are a process's own
OPTIONS = {
    "batch_size": 12,
    "max_steps": 6,
    "save_every_epochs": 0.34,  # every step of an epoch of three
    "keep_checkpoints": 9,
    "one_row_per_id": True,
    "match_ids": True,
    "base_learning_rate": 0.01,
}
MODEL = {"head_norm": "layer", "stem": "linear"}
DROPOUT = {**MODEL, "attention_dropout": 0.1}
MIDDLE, LAST = "checkpoint-00000002", "checkpoint-00000006"


def job(directory: Path, engine: str, name: str, model: dict, start: str | None = None) -> dict:
    """A run; or, from the second step of the run `start`, the rest of it in a directory of its own."""
    options = {**OPTIONS, "model_config": model, "async_checkpoints": "dropout" in name}
    if start is not None:
        shutil.copytree(directory / start / MIDDLE, directory / name / MIDDLE)
        options["resume"] = "auto"
    arguments = tiny_arguments(directory / "pairs.parquet", directory / name, **options)
    return {"engine": engine, "arguments": arguments}


def launch(directory: Path, processes: int, jobs: list[dict]) -> None:
    (directory / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    result = subprocess.run(
        [sys.executable, "-m", *command, str(Path(__file__).parent / "engine_runs.py"), str(directory / "jobs.json")],
        capture_output=True, text=True, timeout=600, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-6000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("elastic")
    write_pairs(directory / "pairs.parquet")
    forget_accelerator()
    main([job(directory, "one", "one", MODEL)])
    launch(directory, 2, [job(directory, "ddp", "two", MODEL), job(directory, "ddp", "two with dropout", DROPOUT)])
    launch(
        directory,
        2,
        [
            job(directory, "ddp", "one on two", MODEL, start="one"),
            job(directory, "ddp", "two with dropout on two", DROPOUT, start="two with dropout"),
        ],
    )
    main([job(directory, "one", "two on one", MODEL, start="two")])
    forget_accelerator()
    return directory


@pytest.fixture(scope="module")
def three(runs) -> Path:
    launch(runs, 3, [job(runs, "ddp", "two on three", MODEL, start="two")])
    return runs


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in read_log(directory)]


@pytest.mark.parametrize(
    "name, where",
    [("one on two", "runs"), ("two on one", "runs"), ("two on three", "three")],
)
def test_another_number_of_processes_gives_the_same_losses(name, where, request):
    runs = request.getfixturevalue(where)
    expected = losses(runs / "one")
    assert len(set(expected)) == 6
    assert losses(runs / "two") == pytest.approx(expected, rel=1e-6)
    assert losses(runs / name) == pytest.approx(expected[2:], rel=1e-6)


def test_the_same_number_goes_on_to_the_bit_with_the_dropout_of_each(runs):
    assert_same_checkpoint(runs / "two with dropout" / LAST, runs / "two with dropout on two" / LAST)
    assert losses(runs / "two with dropout on two") == losses(runs / "two with dropout")[2:]
    generators = load_checkpoint(runs / "two with dropout" / LAST)[0]["random"]
    assert not torch.equal(*generators["cpu"])
