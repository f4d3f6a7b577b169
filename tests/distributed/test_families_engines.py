"""Each family in examples/pretrain.py on two gloo processes: plain data parallelism, FSDP2, and resumed.

Whether two processes compute what one does is the objective's to say (test_objective_two_processes.py); here, that
engines agree, and that a run goes on from its checkpoint to the bit.
"""

import shutil
from pathlib import Path

import pytest
from families import FAMILIES
from safetensors.torch import load_file
from test_engines_two_processes import assert_same_run, check_deepspeed, launch, with_fsdp2
from tiny_pretraining import assert_same_checkpoint, read_log, tiny_arguments, write_pairs

from oner.training.run.checkpoint import list_checkpoints, verify

MIDDLE, ZERO = "checkpoint-00000002", ("zero2", "zero3")


def job(directory: Path, name: str, engine: str, suffix: str = "", **options) -> dict:
    """Four steps of a family under an engine, with a checkpoint after each."""
    fields = {"max_steps": 4, "save_every_epochs": 0.2, "keep_checkpoints": 9, "one_row_per_id": True}
    fields |= {"model_config": FAMILIES[name].tiny.APART, **options}
    arguments = tiny_arguments(directory / "pairs.parquet", directory / f"{name}-{engine}{suffix}", name, **fields)
    return {"engine": engine, "arguments": arguments}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Of every family a run under each engine in the same two processes, then the last two steps once more."""
    directory = tmp_path_factory.mktemp("runs")
    write_pairs(directory / "pairs.parquet")
    launch(directory, [job(directory, name, engine) for name in FAMILIES for engine in ("ddp", "fsdp2")])
    for name in FAMILIES:
        shutil.copytree(directory / f"{name}-ddp" / MIDDLE, directory / f"{name}-ddp-resumed" / MIDDLE)
    launch(directory, [job(directory, name, "ddp", "-resumed", resume="auto") for name in FAMILIES])
    return directory


@pytest.fixture(scope="module")
def zero(runs) -> Path:
    check_deepspeed()
    launch(runs, [job(runs, name, engine) for name in FAMILIES for engine in ZERO])
    return runs


@with_fsdp2
def test_engines_agree(family, runs):
    plain, sharded = (runs / f"{family.name}-{engine}" for engine in ("ddp", "fsdp2"))
    assert_same_run(plain, sharded)
    lines = read_log(plain)
    assert len({line["loss"] for line in lines}) == 4 and set(family.run["losses"]) <= lines[0].keys()
    for directory in (plain, sharded):
        verify(list_checkpoints(directory)[-1])
        weights = load_file(directory / "model" / "model.safetensors")
        assert len(weights) > 20 and all(value.isfinite().all() for value in weights.values())


def test_two_processes_go_on_to_the_bit(family, runs):
    whole, resumed = runs / f"{family.name}-ddp", runs / f"{family.name}-ddp-resumed"
    assert_same_checkpoint(list_checkpoints(whole)[-1], list_checkpoints(resumed)[-1])
    assert read_log(whole)[2:] == read_log(resumed)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ZERO)
def test_deepspeed_agrees(family, zero, engine):
    assert_same_run(zero / f"{family.name}-ddp", zero / f"{family.name}-{engine}")
