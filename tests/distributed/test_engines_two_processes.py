"""DDP, FSDP2 and DeepSpeed's ZeRO-1, 2 and 3 with two gloo processes on the CPU: the run of one process.

Loss, student, teacher, queue and optimiser, after each of the two checkpoints; from any engine's checkpoint under any
other; in bf16; by cached gradients; and past a loss that is NaN in one of the processes. LayerNorm heads and a linear
stem, for a BatchNorm normalises each process's half by itself on a CPU.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_runs import QUEUE, main
from safetensors.torch import load_file
from tiny_pretraining import ROOT, forget_accelerator, read_log, tiny_arguments, write_pairs

from oner.training.run.checkpoint import list_checkpoints, load_checkpoint

OPTIONS = {
    "max_steps": 6,
    "save_every_epochs": 0.6,  # three steps
    "keep_checkpoints": 9,
    "one_row_per_id": True,
    "match_ids": True,
    "mim_ratio": [0.5, 0.5],
    "max_grad_norm": 1.0,
    "model_config": {
        "head_norm": "layer",
        "stem": "linear",
        "learnable_temperature": True,
        "num_hidden_layers": 2,
    },
}
ZERO = ("zero1", "zero2", "zero3")
# softmax does not feel the bias of the keys: its gradient is rounding noise, which Adam divides by its own size
NOISE = (".attention.qkv.bias",)
ALL_NOISE = ".key.bias"
# gloo of torch 2.7 sums where FSDP2 asks it to average, so FSDP2 is refused there (tests/run/test_parallel.py)
FSDP2 = not torch.__version__.startswith("2.7.")
with_fsdp2 = pytest.mark.skipif(not FSDP2, reason="gloo of this torch cannot average")


def arguments(directory: Path, name: str, **overrides) -> list[str]:
    return tiny_arguments(directory / "pairs.parquet", directory / name, **{**OPTIONS, **overrides})


def launch(directory: Path, jobs: list[dict], processes: int = 2) -> None:
    """Runs the jobs one after another in the same processes, less those of an engine that this torch lacks."""
    jobs = [job for job in jobs if FSDP2 or job["engine"] != "fsdp2"]
    file = directory / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    result = subprocess.run(
        [sys.executable, "-m", *command, str(Path(__file__).parent / "engine_runs.py"), str(file)],
        capture_output=True, text=True, timeout=120 + 300 * len(jobs), cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-6000:]


def jobs_of(engine: str, directory: Path, sources: tuple[str, ...]) -> list[dict]:
    """Everything that is asked of an engine, and the last three steps from each source's third."""
    variants = [
        # what is spread is gathered, and written while the run goes on
        {"name": engine, "async_checkpoints": engine != "one"},
        {"name": f"{engine}-chunks", "max_steps": 3, "gradient_cache_chunks": 2},
        {"name": f"{engine}-bf16", "max_steps": 3, "mixed_precision": "bf16"},
        {"name": f"{engine}-spoilt", "max_steps": 3, "spoilt": 2},
        {"name": f"{engine}-itc", "max_steps": 3, "losses": ["itc"]},
    ]
    for source in sources:
        path = directory / source / "checkpoint-00000003"
        variants.append({"name": f"{source}-{engine}", "resume": path})
    jobs = []
    for variant in variants:
        name, spoilt = variant.pop("name"), variant.pop("spoilt", 0)
        jobs.append({"engine": engine, "spoilt": spoilt, "arguments": arguments(directory, name, **variant)})
    return jobs


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One process and plain data parallelism."""
    directory = tmp_path_factory.mktemp("runs")
    write_pairs(directory / "pairs.parquet")
    forget_accelerator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        main([job for job in jobs_of("one", directory, ()) if "--gradient_cache_chunks" not in job["arguments"]])
    forget_accelerator()
    launch(directory, jobs_of("ddp", directory, ("one",)))
    return directory


@pytest.fixture(scope="module")
def fsdp2(runs) -> Path:
    launch(runs, jobs_of("fsdp2", runs, ("ddp",)))
    return runs


def check_deepspeed() -> None:
    """Skips where DeepSpeed cannot run on a CPU."""
    pytest.importorskip("deepspeed")
    if torch.cuda.is_available():
        pytest.skip("DeepSpeed takes the GPU; these are its checks on a CPU")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("DeepSpeed builds its communication for CPUs when it starts, and here is no C++ compiler")


@pytest.fixture(scope="module")
def zero(fsdp2) -> Path:
    check_deepspeed()
    sources = {"zero1": ("ddp",), "zero2": ("fsdp2", "zero1"), "zero3": ("fsdp2", "zero2")}
    launch(fsdp2, [job for engine in ZERO for job in jobs_of(engine, fsdp2, sources[engine])])
    path = fsdp2 / "zero3" / "checkpoint-00000003"
    back = [{"engine": e, "arguments": arguments(fsdp2, f"zero3-{e}", resume=path)} for e in ("fsdp2", "ddp")]
    launch(fsdp2, back)
    return fsdp2


def assert_same_run(one: Path, other: Path, rtol: float = 1e-6, atol: float = 2e-5) -> None:
    """Lines of the log from where both have them, and every tensor of the last checkpoint."""
    logs = [{line["step"]: line for line in read_log(path)} for path in (one, other)]
    steps = sorted(logs[1])
    assert steps[-1] == max(logs[0])
    for step in steps:
        assert logs[1][step] == pytest.approx(logs[0][step], rel=1e-5, abs=1e-6), step
    tensors, state = load_checkpoint(list_checkpoints(one)[-1])
    tensors_other, state_other = load_checkpoint(list_checkpoints(other)[-1])
    assert state["step"] == state_other["step"] and state["optimizer_groups"] == state_other["optimizer_groups"]
    for stem in ("model", "objective", "optimizer"):
        assert tensors[stem].keys() == tensors_other[stem].keys(), stem
        for name, value in tensors[stem].items():
            found = tensors_other[stem][name]
            assert (found.shape, found.dtype) == (value.shape, value.dtype), f"{stem} {name}"
            if name.endswith(ALL_NOISE):
                continue
            if name.endswith(NOISE):
                value, found = (torch.cat([part.chunk(3)[0], part.chunk(3)[2]]) for part in (value, found))
            told = f"{stem} {name}"
            torch.testing.assert_close(found, value, rtol=rtol, atol=atol, msg=lambda m, n=told: f"{n} {m}")


def engines(*names: str):
    """FSDP2 with every run of the suite; ZeRO, of which DeepSpeed builds parts, with the slow ones."""
    marks = {"fsdp2": with_fsdp2, **dict.fromkeys(ZERO, pytest.mark.slow)}
    return pytest.mark.parametrize("engine", [pytest.param(name, marks=marks.get(name, ())) for name in names])


def folder_of(engine: str, request) -> Path:
    return request.getfixturevalue("zero" if engine in ZERO else "runs" if engine == "ddp" else engine)


def test_the_run_says_something(runs):
    early, late = (load_checkpoint(path)[0] for path in list_checkpoints(runs / "one"))
    moved = {name: (value - late["model"][name]).abs().max().item() for name, value in early["model"].items()}
    assert max(moved.values()) > 1e-3 and moved["logit_scale"] > 1e-4
    teacher = "teacher.oner.layers.0.feed_forward.fc1.weight"
    assert (early["objective"][teacher] - late["objective"][teacher]).abs().max() > 1e-6
    # three batches of eight have pushed everything out
    assert late["objective"]["queue"].shape[0] == QUEUE
    assert not torch.isin(late["objective"]["queue"], early["objective"]["queue"]).all(1).any()
    assert {"itc", "cmc", "mlm", "mim", "queue"} <= read_log(runs / "one")[0].keys()


@engines("ddp", "fsdp2", *ZERO)
def test_loss_student_teacher_queue_and_optimiser_are_those_of_one_process(engine, request):
    directory = folder_of(engine, request)
    assert_same_run(directory / "one", directory / engine)


@engines("ddp", "fsdp2", *ZERO)
def test_the_exported_model_is_whole(engine, request):
    directory = folder_of(engine, request)
    one, other = (load_file(directory / name / "model" / "model.safetensors") for name in ("one", engine))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert not name.endswith(NOISE) or value.shape == other[name].shape
        if not name.endswith(NOISE):
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n} {m}")


@engines("ddp", "fsdp2", *ZERO)
def test_cached_gradients_give_the_same_run(engine, request):
    directory = folder_of(engine, request)
    whole, pieces = (read_log(directory / name)[:3] for name in ("one", f"{engine}-chunks"))
    for one, other in zip(whole, pieces, strict=True):
        # the cosine of three steps is not that of six
        rates = [line.pop("learning_rate") for line in (one, other)]
        assert min(rates) >= 0
    assert pieces[0] == pytest.approx(whole[0], rel=1e-5)
    assert_same_run(directory / "ddp-chunks", directory / f"{engine}-chunks")


@engines("ddp", "fsdp2", *ZERO)
def test_heads_that_no_loss_reads_are_frozen_and_never_called(engine, request):
    """The words' head shares its weights with the words, which an engine that shards has to gather all the same."""
    directory = folder_of(engine, request)
    assert_same_run(directory / "one-itc", directory / f"{engine}-itc")


@engines("fsdp2", *ZERO)
def test_bf16_computes_as_plain_data_parallelism_does_over_fp32_weights(engine, request):
    directory = folder_of(engine, request)
    plain, other = (read_log(directory / f"{name}-bf16") for name in ("ddp", engine))
    full = read_log(directory / "ddp")
    assert plain[0]["itc"] != full[0]["itc"], "nothing was computed in bf16"
    for one, two in zip(plain, other, strict=True):
        assert two == pytest.approx(one, rel=1e-2)
    tensors = load_checkpoint(list_checkpoints(directory / f"{engine}-bf16")[-1])[0]
    for stem in ("model", "objective", "optimizer"):
        assert {value.dtype for value in tensors[stem].values()} == {torch.float32}, stem
    # an average of weights that were rounded to bf16 on the way would be off by their last bit, 2^-9 of each
    mine = load_checkpoint(list_checkpoints(directory / "ddp-bf16")[-1])[0]["objective"]
    for name, value in tensors["objective"].items():
        if name != "queue" and not name.endswith(NOISE):
            torch.testing.assert_close(value, mine[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n} {m}")


@engines("ddp", "fsdp2", *ZERO)
def test_a_loss_that_is_nan_in_one_process_moves_nothing_in_any(engine, request):
    directory = folder_of(engine, request)
    lines = read_log(directory / f"{engine}-spoilt")
    assert [line["loss"] is None for line in lines] == [False, True, False]
    assert lines[-1]["nonfinite_steps"] == 1
    one, other = (load_checkpoint(list_checkpoints(directory / f"{name}-spoilt")[-1])[0] for name in ("one", engine))
    for stem in ("model", "objective"):
        for name, value in one[stem].items():
            assert other[stem][name].isfinite().all(), name
            if not name.endswith(NOISE):
                torch.testing.assert_close(other[stem][name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(
    ("source", "engine"),
    [
        ("one", "ddp"),
        pytest.param("ddp", "fsdp2", marks=with_fsdp2),
        *[
            pytest.param(
                source,
                engine,
                marks=[pytest.mark.slow, with_fsdp2] if "fsdp2" in (source, engine) else pytest.mark.slow,
            )
            for source, engine in (
                ("ddp", "zero1"),
                ("fsdp2", "zero2"),
                ("zero1", "zero2"),
                ("fsdp2", "zero3"),
                ("zero2", "zero3"),
                ("zero3", "fsdp2"),
                ("zero3", "ddp"),
            )
        ],
    ],
)
def test_a_checkpoint_of_one_engine_resumes_under_another(source, engine, request):
    directory = folder_of("zero1" if source in ZERO else engine, request)
    assert [line["step"] for line in read_log(directory / f"{source}-{engine}")] == [4, 5, 6]
    assert_same_run(directory / "one", directory / f"{source}-{engine}")
