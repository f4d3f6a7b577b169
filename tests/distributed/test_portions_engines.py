"""A family of two portions under every engine with two gloo processes: the run of one process.

Each portion touches parameters that the other does not; batches are 1:1 and 1:3, in one go and in chunks.
"""

import os
from pathlib import Path

import pytest
from engine_runs import main
from test_engines_two_processes import assert_same_run, check_deepspeed, launch, with_fsdp2
from tiny_pretraining import forget_accelerator, read_log
from toy_family.runs import command, write_sources

# batch sizes, chunks
SHAPES = {"even": ((8, 8), (1, 1)), "uneven": ((4, 12), (1, 1)), "chunks": ((8, 8), (2, 2))}
PARTS = {"mlm", "text contrast", "pair contrast"}


def jobs(folder: Path, engine: str) -> list[dict]:
    sources = {"pairs": str(folder / "pairs.parquet"), "texts": str(folder / "notes.txt")}
    # what rounding leaves of a gradient that is nothing else would be divided by its own size
    options = {"max_steps": 4, "model_config": '{"dropout": 0.0}', "base_learning_rate": 0.03}
    return [
        {"engine": engine, "family": "toy_family",
         "arguments": command(sources, folder / f"{name}-{engine}", sizes, chunks, **options)}
        for name, (sizes, chunks) in SHAPES.items()
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_sources(folder)
    forget_accelerator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        main(jobs(folder, "one"))
    forget_accelerator()
    launch(folder, jobs(folder, "ddp") + jobs(folder, "fsdp2"))
    return folder


@pytest.fixture(scope="module")
def zero(runs) -> Path:
    check_deepspeed()
    launch(runs, jobs(runs, "zero2") + jobs(runs, "zero3"))
    return runs


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=with_fsdp2)])
@pytest.mark.parametrize("name", SHAPES)
def test_two_processes_train_as_one(runs, name, engine):
    assert_same_run(runs / f"{name}-one", runs / f"{name}-{engine}")
    assert all(PARTS <= line.keys() for line in read_log(runs / f"{name}-{engine}"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@pytest.mark.parametrize("name", SHAPES)
def test_deepspeed_trains_as_one(zero, name, engine):
    assert_same_run(zero / f"{name}-one", zero / f"{name}-{engine}")


def test_chunks_make_the_step_of_one_go(runs):
    assert_same_run(runs / "even-one", runs / "chunks-one")
