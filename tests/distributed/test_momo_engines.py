"""MoMo's stages of two portions under every engine with two gloo processes: the run of one process.

Stage 2 reads texts and images, stage 3 texts and pairs. Matching draws its negatives within a process, or within a
chunk: two pairs leave nothing to draw, so that one process in chunks of two is the oracle of two processes.
"""

import json
import os
from pathlib import Path

import pytest
from engine_runs import main
from test_engines_two_processes import assert_same_run, check_deepspeed, launch, with_fsdp2
from tiny_pretraining import ROOT, forget_accelerator, read_log, tiny_arguments
from toy_family.runs import write_sources

# losses and decoders of a stage, batch sizes and masked shares of its portions
STAGES = {
    "stage2": (["mlm", "mim"], ["image", "text"], {"texts": (8, 0.3), "images": (8, None)}),
    "stage3": (["mlm", "itc", "cmm", "itm"], ["text", "pair"], {"texts": (8, 0.3), "pairs": (4, 0.75)}),
}
COLUMNS = {
    "texts": {"text_column": None, "id_column": None},
    "images": {"id_column": None},
    "pairs": {"one_row_per_id": True},
}
# (stage, chunks of each portion in one process, and in each of two)
SHAPES = {"stage2": ("stage2", 1, 1), "stage3": ("stage3", 2, 1), "stage2-chunks": ("stage2", 1, 2)}
ENGINES = ("ddp", pytest.param("fsdp2", marks=with_fsdp2))
ZERO = ("zero2", "zero3")


def job(folder: Path, name: str, engine: str) -> dict:
    """Four steps of a stage under an engine."""
    stage, alone, shared = SHAPES[name]
    losses, decoders, kinds = STAGES[stage]
    chunks = alone if engine == "one" else shared
    portions = {}
    for kind, (size, masked) in kinds.items():
        source = {"train_data": [str(folder / ("notes.txt" if kind == "texts" else "pairs.parquet"))]}
        portions[kind] = {"kind": kind, "batch_size": size, "gradient_cache_chunks": chunks, **source, **COLUMNS[kind]}
        portions[kind] |= {} if masked is None else {"mlm_probability": masked}
    options = {
        "portions": json.dumps(portions),
        "losses": losses,
        "model_config": {"decoders": decoders},
        "max_steps": 4,
        "save_every_epochs": 1,
        "base_learning_rate": 0.01,
        "tokenizer": ROOT / "examples" / "checkpoints" / "oner-emoji",
    }
    output = folder / f"{name}-{engine}"
    return {"engine": engine, "arguments": tiny_arguments(folder / "pairs.parquet", output, "momo", **options)}


def jobs(folder: Path, *engines: str) -> list[dict]:
    return [job(folder, name, engine) for engine in engines for name in SHAPES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_sources(folder)
    forget_accelerator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        main(jobs(folder, "one"))
    forget_accelerator()
    launch(folder, jobs(folder, "ddp", "fsdp2"))
    return folder


@pytest.fixture(scope="module")
def zero(runs) -> Path:
    check_deepspeed()
    launch(runs, jobs(runs, *ZERO))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SHAPES)
def test_two_processes_train_as_one(runs, name, engine):
    assert_same_run(runs / f"{name}-one", runs / f"{name}-{engine}")
    lines = read_log(runs / f"{name}-{engine}")
    assert set(STAGES[SHAPES[name][0]][0]) <= lines[0].keys() and len({line["loss"] for line in lines}) == 4


@pytest.mark.slow
def test_chunks_make_the_step_of_one_go(runs):
    assert_same_run(runs / "stage2-one", runs / "stage2-chunks-ddp")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ZERO)
@pytest.mark.parametrize("name", SHAPES)
def test_deepspeed_trains_as_one(zero, name, engine):
    assert_same_run(zero / f"{name}-one", zero / f"{name}-{engine}")
